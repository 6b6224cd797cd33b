"""What of a configuration depends on this machine: a peer's package, a checkpoint's files, the data, the device."""

import importlib.util

from bench.instruments.capacity import memory_bytes
from bench.workloads import data
from conf import hub
from conf.documents import mask_of
from conf.files import FileFault, check_writable
from conf.kernels import kernel_that_runs
from conf.keys import OF_A_MACHINE, Config
from conf.meshes import PEERS
from conf.resolve import Resolved
from conf.words import Invalid

RANK_BYTES = 64 << 20  # that a process of its own with torch takes at the least


def check(resolved: Resolved) -> None:
    """Raises Invalid for what is not here; `auto` kernels become the one that runs here."""
    config = resolved.config
    check_package(config)
    if config.model.name == "hf":
        check_checkpoint(resolved)
    if config.workload == "step" and (config.mode != "simulate" or config.documents.name == "eos"):
        data.check(config)
    if config.documents.name == "eos":
        note_eos(resolved)
    elif config.workload not in OF_A_MACHINE:
        mask_of(config)  # or a sentence about its file
    if config.launch.name == "torchrun" and config.mode == "real":
        fill_hosts(config)
    check_device(config)
    check_ranks(config)
    if config.save_path is not None:
        check_save_path(config.save_path)
    pick_kernel(config)


def note_eos(resolved: Resolved) -> None:
    """Where the token that ends documents never comes, or comes at other places in every step."""
    config = resolved.config
    source, steps = data.load(config), range(config.warmup + config.steps)
    if not any((data.samples(source, step, config)[:, :-1] == config.documents.eos).any() for step in steps):
        resolved.notes.append(f"documents.eos={config.documents.eos} does not come in the tokens that are read")
    else:
        resolved.notes.append("every step has other documents; what is counted is the last step's")


def fill_hosts(config: Config) -> None:
    """How many ranks each host that torchrun has started has."""
    from bench.ranks.hosts import of_torchrun, ranks_per_host

    _, hosts = of_torchrun()
    each = ranks_per_host(config, hosts)
    config.launch.ranks_per_host = each if hosts > 1 else None


def check_package(config: Config) -> None:
    name = config.strategy.name
    if (peer := PEERS.get(name)) is not None and importlib.util.find_spec(peer.package) is None:
        raise Invalid(
            f"strategy={name} needs the package {peer.package}: ./run.sh peers installs it; {peer.ours} is ours"
        )


def check_checkpoint(resolved: Resolved) -> None:
    """Is every tensor there, with its shape? Shapes alone need no weights that would have to be fetched."""
    from models.checkpoint import Checkpoint

    model, path = resolved.config.model, str(resolved.config.model.path)
    if resolved.config.mode == "simulate" and hub.by_name(path):
        return
    try:
        checkpoint = Checkpoint(hub.folder(path, hub.SIZES + hub.WEIGHTS))
        checkpoint.check(model)
    except FileFault as error:
        raise Invalid(f"model.path: {error}") from None
    if "BF16" in checkpoint.dtypes and resolved.config.precision == "fp32":
        resolved.notes.append("the bfloat16 checkpoint was read into fp32")


def check_device(config: Config) -> None:
    """Is there a GPU for each rank that runs at a time?"""
    each = config.launch.ranks_per_host if config.launch.name == "torchrun" else None
    needed = {"real": each or config.world_size, "emulate": 1, "simulate": 0}[config.mode]
    if config.device == "cuda" and needed and (gpus := count_gpus()) < needed:
        would_do = f"world_size={gpus}, mode=emulate or device=cpu" if gpus else "mode=simulate or device=cpu"
        ranks = f"world_size={config.world_size}" if config.mode == "real" else f"mode={config.mode}"
        raise Invalid(f"device=cuda: {ranks} needs {needed} GPUs and there are {gpus}; {would_do} would do")


def check_ranks(config: Config) -> None:
    """Can this machine hold so many processes?"""
    most = memory_bytes() // RANK_BYTES
    if config.mode == "real" and config.launch.name == "local" and config.world_size > most:
        raise Invalid(
            f"world_size={config.world_size}: mode=real starts as many processes, and this machine has memory for "
            f"{most}; mode=simulate would do"
        )


def check_save_path(path: str) -> None:
    try:
        check_writable(path)
    except FileFault as fault:
        raise Invalid(f"save_path: {fault}") from None


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def pick_kernel(config: Config) -> None:
    """Fake tensors are on the CPU, whatever they stand for."""
    device = "cpu" if config.mode == "simulate" else config.device
    dtype = "float32" if config.precision == "fp32" else "bfloat16"
    head_dim = config.model.dim_of_head
    config.attention.kernel = kernel_that_runs(config.attention.kernel, device, dtype, head_dim, generation(device))


def generation(device: str) -> int:
    """The first number of the GPUs' compute capability; 0 of a CPU."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
