"""From what the user wrote to what will run: every null filled, every rule checked, before any rank starts."""

import copy
import importlib.util
import math

from bench import data
from bench.config import did_you_mean
from models.checkpoint import Checkpoint, CheckpointError, read_config
from models.config import ModelConfig

AXES = ("dp", "tp", "ulysses", "ring")
CHOICES = {
    "precision": ("fp32", "bf16", "bf16_mixed"),
    "device": ("cpu", "cuda"),
    "mode": ("real", "emulate", "simulate"),
    "search": ("none", "max_seq_len"),
    "workload": ("step", "attention"),
    "direction": ("forward", "forward_backward"),
    "recompute": ("none", "block"),
    "zero_stage": (0, 1, 2, 3),
    "ring.layout": ("contiguous", "zigzag", "striped"),
    "ring.kv": ("rotate", "all_gather"),
    "ring.grad_dtype": ("fp32", "same"),
    "placement": ("ulysses_inner", "ring_inner"),
    "attention.kernel": ("auto", "flash_attn", "sdpa", "math"),
    "rerun": ("none", "failed", "all"),
}
AT_LEAST = {
    "world_size": 1,
    "seq_len": 1,
    "batch_size": 1,
    "steps": 1,
    "warmup": 0,
    "rounds": 1,
    "ulysses.chunks": 1,
    "mlp.chunks": 1,
    "loss.chunks": 1,
}
POSITIVE_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")


class Invalid(ValueError):
    """What is wrong with a configuration: the key, the fault and what would do, in one sentence."""


def resolve(config: dict) -> dict:
    """The configuration with every null filled, and `notes` of what a reader of the row should know, or Invalid."""
    config = copy.deepcopy(config)
    config["notes"] = []
    check_choices(config)
    check_mode(config)
    check_peer(config)
    fill_model(config)
    fill_mesh(config)
    if config["workload"] == "attention":
        check_attention(config)
    else:
        check_batch(config)
    if config["workload"] == "step" and config["mode"] != "simulate":
        check_data(config)
    pick_device(config)
    return config


def check_choices(config: dict) -> None:
    from strategies import ALL

    for key, allowed in {"strategy.name": tuple(ALL), **CHOICES}.items():
        value = value_of(config, key)
        if value not in allowed:
            written = [str(a) for a in allowed]
            hint = did_you_mean(str(value), written)
            raise Invalid(f"{key.removesuffix('.name')}={value} is not one of {', '.join(written)}{hint}")
    for key, least in AT_LEAST.items():
        if (value := value_of(config, key)) < least:
            raise Invalid(f"{key}={value} must be at least {least}")
    if config["timeout_s"] <= 0:
        raise Invalid(f"timeout_s={config['timeout_s']} must be more than 0")


def check_mode(config: dict) -> None:
    mode, search = config["mode"], config["search"]
    if mode == "simulate" and config["rounds"] > 1:
        raise Invalid(
            f"rounds={config['rounds']}: mode=simulate has no clock yet, so there is nothing to repeat; 1 would do"
        )
    if mode == "simulate" and config["profile"]:
        raise Invalid("profile=true: mode=simulate has no clock yet, so there is no trace; mode=emulate would do")
    if mode == "simulate" and config["compile"]:
        raise Invalid("compile=true: mode=simulate computes nothing, and knows no fused kernels; mode=emulate would do")
    if mode != "real" and config["save_path"] is not None:
        raise Invalid(
            f"save_path={config['save_path']}: mode={mode} trains nothing worth saving; null or mode=real would do"
        )
    if mode != "real" and config["exposed_comm"]:
        raise Invalid(f"exposed_comm=true needs real collectives to compare with, and mode={mode}; mode=real would do")
    if mode != "simulate" and (search != "none" or config["full_depth"]):
        key = "full_depth=true" if search == "none" else f"search={search}"
        raise Invalid(f"{key} is for mode=simulate, and mode={mode}")
    if search != "none" and config["cluster"] is None:
        raise Invalid(f"search={search} needs to know how much memory there is; cluster=h100 would do")


def check_peer(config: dict) -> None:
    """Is the library here, and is there anything to measure of it but time?"""
    from strategies import PEERS

    name, mode = config["strategy"]["name"], config["mode"]
    if (peer := PEERS.get(name)) is None:
        return
    if importlib.util.find_spec(peer.package) is None:
        raise Invalid(
            f"strategy={name} needs the package {peer.package}: ./run.sh peers installs it; {peer.ours} is ours"
        )
    if mode != "real":
        raise Invalid(f"strategy={name} is raced, and mode={mode} has no race; mode=real or {peer.ours} would do")
    if config["workload"] == "attention" and "core_attention" not in vars(peer):
        raise Invalid(f"workload=attention: {name} has no attention of its own; workload=step would do")
    for key, value in peer.fixed.items():
        section, leaf = place_of(config, key)
        if section[leaf] != value:
            config["notes"].append(f"{name} has {key}={value} alone")
            section[leaf] = value
    if peer.adapted and config["device"] == "cpu":
        config["notes"].append(f"{name}'s schedule on this project's kernel")


def value_of(config: dict, key: str):
    """The value of a key as written on the command line."""
    section, leaf = place_of(config, key)
    return section[leaf]


def place_of(config: dict, key: str) -> tuple[dict, str]:
    """Where a key as written on the command line is: the section that holds it, and its name there."""
    section, _, leaf = key.rpartition(".")
    return (config[section] if section else config), leaf


def fill_model(config: dict) -> None:
    """Sizes from the preset, the checkpoint's config.json, and the user's overrides, the last word."""
    model = config["model"]
    try:
        if model["name"] == "hf":
            if model["path"] is None:
                raise Invalid("model.path is missing: model=hf reads a Hugging Face Llama directory")
            for key, value in read_config(model["path"]).items():
                if model[key] is None:
                    model[key] = value
        for key in POSITIVE_SIZES:
            if model[key] is not None and model[key] < 1:
                raise Invalid(f"model.{key}={model[key]} must be at least 1")
        if model["head_dim"] is None:
            if model["dim"] % model["n_heads"]:
                below, above = around(model["dim"], lambda d: d % model["n_heads"] == 0)
                raise Invalid(
                    f"model.dim={model['dim']} is no multiple of model.n_heads={model['n_heads']} and model.head_dim "
                    f"is null; {either(below, above)} would do"
                )
            model["head_dim"] = model["dim"] // model["n_heads"]
        if model["head_dim"] % 2:
            raise Invalid(
                f"model.head_dim={model['head_dim']} must be even: rotary embedding pairs dims; "
                f"{either(model['head_dim'] - 1, model['head_dim'] + 1)} would do"
            )
        if model["n_heads"] % model["n_kv_heads"]:
            below, above = around(model["n_kv_heads"], lambda g: model["n_heads"] % g == 0)
            raise Invalid(
                f"model.n_kv_heads={model['n_kv_heads']} must divide model.n_heads={model['n_heads']}; "
                f"{either(below, above)} would do"
            )
        if model["name"] == "hf":
            checkpoint = Checkpoint(model["path"])
            checkpoint.check(ModelConfig.of(model))
            if "BF16" in checkpoint.dtypes and config["precision"] == "fp32":
                config["notes"].append("the bfloat16 checkpoint was read into fp32")
    except CheckpointError as error:
        raise Invalid(f"model.path: {error}") from None


def fill_mesh(config: dict) -> None:
    """Degrees whose product is world_size, on axes that the strategy has, and that divide what they split."""
    from strategies import ALL

    name, mesh, world_size = config["strategy"]["name"], config["mesh"], config["world_size"]
    strategy = ALL[name]
    has = ("dp", *strategy.axes)
    shape = shape_of(config)

    for axis in AXES:
        if mesh[axis] is not None and mesh[axis] < 1:
            raise Invalid(f"mesh.{axis}={mesh[axis]} must be at least 1")
        if axis not in has and (mesh[axis] or 1) > 1:
            raise Invalid(f"mesh.{axis}={mesh[axis]}: strategy {name} has no {axis} axis, only {' and '.join(has)}")
    if "ring" in strategy.axes and mesh["ulysses"] is not None:
        check_context_parallel(world_size, mesh)
    given = {axis: degree for axis, degree in mesh.items() if degree is not None}
    product = math.prod(given.values())
    left_open = [axis for axis in strategy.axes if mesh[axis] is None]
    if not left_open and mesh["dp"] is None:
        left_open = ["dp"]
    if world_size % product or (not left_open and product != world_size):
        written = " * ".join(f"mesh.{axis}" for axis in given)
        wrong = "is not" if not left_open else "is no multiple of"
        below, above = around(world_size, lambda n: n % product == 0 if left_open else n == product)
        raise Invalid(f"world_size={world_size} {wrong} {written} = {product}; {either(below, above)} would do")
    free = world_size // product
    filled = strategy.degrees(free, left_open, shape) if left_open else {}
    for axis in AXES:
        mesh[axis] = given.get(axis, filled.get(axis, 1))

    for rule in strategy.rules(shape):
        if not rule.fits(rule.value):
            below, above = around(rule.value, rule.fits)
            raise Invalid(f"{rule.key}={rule.value} {rule.why}; {either(below, above)} would do")


def shape_of(config: dict):
    """What a strategy's rules are about; its degrees are the configuration's, as they are filled."""
    from strategies.base import Shape

    model = config["model"]
    return Shape(
        model["n_heads"],
        model["n_kv_heads"],
        config["seq_len"],
        config["mesh"],
        config["ring"]["layout"],
        config["ulysses"]["chunks"],
    )


def check_context_parallel(world_size: int, mesh: dict) -> None:
    """Ulysses' ranks are a part of the context-parallel ranks, and the ring's are the rest (MindSpeed's rule)."""
    outside = (mesh["dp"] or 1) * (mesh["tp"] or 1)
    context_parallel, ulysses = world_size // outside, mesh["ulysses"]
    if mesh["ring"] is None and world_size % outside == 0 and context_parallel % ulysses:
        below, above = around(ulysses, lambda u: context_parallel % u == 0)
        raise Invalid(
            f"the context-parallel size, world_size / (mesh.dp * mesh.tp) = {context_parallel}, must be divisible by "
            f"mesh.ulysses={ulysses}; {either(below, above)} would do"
        )


def check_attention(config: dict) -> None:
    from strategies import ALL
    from strategies.base import Strategy

    name, dp, batch_size = config["strategy"]["name"], config["mesh"]["dp"], config["batch_size"]
    if ALL[name].core_attention is Strategy.core_attention:
        raise Invalid(f"workload=attention: strategy {name} has no core_attention; workload=step would do")
    if batch_size < dp:
        raise Invalid(f"batch_size={batch_size} must be at least mesh.dp = {dp} for workload=attention; {dp} would do")


def check_batch(config: dict) -> None:
    dp, batch_size = config["mesh"]["dp"], config["batch_size"]
    if dp > batch_size:
        config["notes"].append(f"batch_size={batch_size} leaves {dp - batch_size} of mesh.dp={dp} without a sequence")


def check_data(config: dict) -> None:
    source, needed = config["data"], tokens_needed(config)
    try:
        tokens = data.load(source["name"], source["path"], needed, config["model"]["vocab_size"], config["seed"])
    except data.DataError as error:
        raise Invalid(str(error)) from None
    if tokens.size < needed:
        per_step = config["batch_size"] * config["seq_len"]
        most = (tokens.size - 1) // per_step - config["warmup"]
        raise Invalid(
            f"steps={config['steps']} needs {needed} tokens, (warmup + steps) * batch_size * seq_len + 1, and "
            f"data={source['name']} has {tokens.size}; {f'steps={most}' if most > 0 else 'a smaller seq_len'} would do"
        )


def tokens_needed(config: dict) -> int:
    return (config["warmup"] + config["steps"]) * config["batch_size"] * config["seq_len"] + 1


def pick_device(config: dict) -> None:
    """Is the device there, with a GPU a rank, and which attention kernel runs on it?"""
    import torch

    from strategies.ops.kernels import pick_kernel

    mode, device, name = config["mode"], config["device"], config["attention"]["kernel"]
    needed = {"real": config["world_size"], "emulate": 1, "simulate": 0}[mode]
    if device == "cuda" and (gpus := torch.cuda.device_count()) < needed:
        would_do = f"world_size={gpus}, mode=emulate or device=cpu" if gpus else "mode=simulate or device=cpu"
        ranks = f"world_size={config['world_size']}" if mode == "real" else f"mode={mode}"
        raise Invalid(f"device=cuda: {ranks} needs {needed} GPUs and there are {gpus}; {would_do} would do")
    if mode == "simulate":
        if name == "flash_attn":
            raise Invalid(
                "attention.kernel=flash_attn has no implementation on fake tensors; sdpa, which keeps as much, would do"
            )
        device = "cpu"  # where fake tensors are
    dtype = torch.float32 if config["precision"] == "fp32" else torch.bfloat16
    try:
        kernel = pick_kernel(name, device, dtype, config["model"]["head_dim"])
    except ValueError as error:
        raise Invalid(str(error)) from None
    config["attention"]["kernel"] = kernel.name


def around(value: int, fits) -> tuple[int | None, int | None]:
    """The nearest smaller and larger values that fit, where there are any within reach."""
    below = next((v for v in range(value - 1, 0, -1) if fits(v)), None)
    above = next((v for v in range(value + 1, 2 * value + 4096) if fits(v)), None)
    return below, above


def either(below: int | None, above: int | None) -> str:
    return " or ".join(str(v) for v in (below, above) if v is not None) or "nothing near"
