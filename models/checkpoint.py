"""Hugging Face Llama checkpoints: a directory with config.json (conf/huggingface.py) and its safetensors files."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from conf.files import FileFault, read_json, size_of
from conf.keys import ModelConfig

NAMES = {  # ours -> theirs
    "embed.table.weight": "model.embed_tokens.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn.q.weight": "self_attn.q_proj.weight",
    "attn.k.weight": "self_attn.k_proj.weight",
    "attn.v.weight": "self_attn.v_proj.weight",
    "attn.o.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "head.norm.weight": "model.norm.weight",
    "head.linear.weight": "lm_head.weight",
}
DTYPES = {"F64", "F32", "F16", "BF16"}
FILE_BYTES = 2 << 30  # written files hold at most about this much: what the writer keeps in memory


def their_name(name: str) -> str:
    """blocks.3.attn.q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        return f"model.layers.{match[1]}.{NAMES[match[2]]}"
    return NAMES[name]


class Checkpoint:
    """The tensors of a Hugging Face directory by our names, each read from disk when it is asked for.

    Opening it reads headers only. Raises FileFault for a missing or torn file.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            files = [self.folder / name for name in files_of(index)]
        else:
            files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            pickles = [file.name for file in sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt*"))]
            beside = f", and {pickles[0]} is not read, for a pickle can run any code" if pickles else ""
            raise FileFault(f"{self.folder}: no *.safetensors file there{beside}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: set[str] = set()
        self.file_of: dict[str, Path] = {}
        for file in files:
            with opened(file, "np") as content:
                for name in content.keys():  # noqa: SIM118 (not a dict)
                    header = content.get_slice(name)
                    self.file_of[name] = file
                    self.shapes[name] = tuple(header.get_shape())
                    self.dtypes.add(header.get_dtype())
        if others := self.dtypes - DTYPES:
            raise FileFault(f"{self.folder}: has tensors of {min(others)}, and floats are needed")

    def check(self, config: ModelConfig) -> None:
        """Raise FileFault unless every tensor of the model is there with its shape."""
        for name, shape in parameter_shapes(config).items():
            theirs = their_name(name)
            if theirs not in self.shapes:
                raise FileFault(f"{self.folder}: tensor {theirs} is missing")
            if self.shapes[theirs] != shape:
                raise FileFault(f"{self.folder}: tensor {theirs} is {self.shapes[theirs]}, the model has {shape}")

    def tensor(self, name: str) -> Any:
        """The whole tensor of our parameter `name`, on CPU, in the file's dtype."""
        theirs = their_name(name)
        with opened(self.file_of[theirs], "pt") as content:
            return content.get_tensor(theirs)


def files_of(index: Path) -> list[str]:
    """The names in model.safetensors.index.json, which are of files beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise FileFault(f"{index}: weight_map is no object, {{...}}, from tensors to the names of files")
    names = sorted(set(places.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise FileFault(f"{index}: weight_map has {outside[0]!r}, and a file of the same folder is needed")
    return names


def opened(file: Path, framework: str) -> Any:
    size_of(file)
    try:
        return safe_open(file, framework)
    except (SafetensorError, OSError) as error:
        raise FileFault(f"{file}: torn or not a safetensors file ({error})") from None


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the unsharded model, by our names."""
    d, f, q, kv = config.dim, config.ffn_dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    block = {"attn_norm": (d,), "attn.q": (q, d), "attn.k": (kv, d), "attn.v": (kv, d), "attn.o": (d, q)}
    block |= {"mlp_norm": (d,), "mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f)}
    shapes = {"embed.table": (config.vocab_size, d)}
    for i in range(config.n_layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes["head.norm"] = (d,)
    if not config.tie_embeddings:
        shapes["head.linear"] = (config.vocab_size, d)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def write(folder: str, config: ModelConfig, tensors: Iterable[tuple[str, Any]], dtype: str) -> None:
    """Write a directory that transformers (4 or 5) reads. tensors: (our name, whole tensor), one at a time."""
    from safetensors.torch import save_file

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, str]] = []
    pending: dict[str, Any] = {}
    size = 0

    def flush() -> None:
        part = f"part-{len(parts)}.safetensors"
        save_file(pending, target / part, metadata={"format": "pt"})
        parts.append(dict.fromkeys(pending, part))
        pending.clear()

    total = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if pending and size + nbytes > FILE_BYTES:
            flush()
            size = 0
        pending[their_name(name)] = tensor.contiguous().cpu()
        size, total = size + nbytes, total + nbytes
    flush()

    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        final = f"model-{i + 1:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        (target / f"part-{i}.safetensors").replace(target / final)
        weight_map |= dict.fromkeys(part, final)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (target / "config.json").write_text(json.dumps(their_config(config, dtype), indent=2))


def their_config(config: ModelConfig, dtype: str) -> dict:
    """config.json in the form that transformers 4 writes and 5 still reads."""
    theirs = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }
    if config.rope_scaling is not None:
        scaling = asdict(config.rope_scaling)
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_position")
        theirs["rope_scaling"] = {"rope_type": "llama3", **scaling}
    return theirs
