"""The config.json of a Hugging Face Llama, as transformers 4 or 5 writes it."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from reprlib import repr as short
from typing import Any, get_type_hints

from conf.files import FileFault, read_json
from conf.keys import ModelConfig, RopeScaling, beyond, not_of

SIZES = {  # ours -> theirs
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": "original_max_position_embeddings",
}
DEFAULTS = {"head_dim": None, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
ONLY = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def read_config(folder: str) -> dict[str, Any]:
    """config.json -> the sizes of a ModelConfig. Raises FileFault for a field that is missing or cannot be."""
    file = Path(folder) / "config.json"
    theirs = {name: value for name, value in read_json(file).items() if value is not None}
    if "model_type" not in theirs:
        raise FileFault(f"{file}: model_type is missing")
    for name, supported in ONLY.items():
        if theirs.get(name, supported) != supported:
            raise FileFault(f"{file}: {name} is {short(theirs[name])}, and only {supported!r} can be read")
    scaling = "rope_parameters" if theirs.get("rope_parameters") else "rope_scaling"  # of transformers 5, and of 4
    rope = theirs.get(scaling) or {}
    if not isinstance(rope, Mapping):
        raise FileFault(f"{file}: {scaling} is {short(rope)}, and an object, {{...}}, is needed")
    theta = {"rope_theta": rope["rope_theta"]} if rope.get("rope_theta") is not None else {}
    same = {"num_key_value_heads": theirs.get("num_attention_heads")}
    sizes = read_fields(f"{file}: ", ModelConfig, SIZES, {**DEFAULTS, **same, **theirs, **theta})
    sizes["head_dim"] = sizes["head_dim"] or sizes["dim"] // sizes["n_heads"]
    return {
        **sizes,
        "rope_theta": float(sizes["rope_theta"]),
        "rope_scaling": read_rope_scaling(f"{file}: {scaling}.", rope),
    }


def read_end(folder: str) -> int:
    """config.json -> the token that ends a document, the first where there are several. Raises FileFault."""
    file = Path(folder) / "config.json"
    found = read_json(file).get("eos_token_id")
    first: Any = found[0] if isinstance(found, list) and found else found
    if not_of(int, first) or first < 0:
        raise FileFault(f"{file}: eos_token_id={short(found)} is no token, and data=hf ends documents with it")
    return first


def read_rope_scaling(where: str, rope: Mapping) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise FileFault(f"{where}rope_type is {short(kind)}, and only 'default' and 'llama3' can be read")
    return RopeScaling(**read_fields(where, RopeScaling, SCALING, rope))


def read_fields(where: str, cls: type, names: Mapping[str, str], theirs: Mapping) -> dict[str, Any]:
    """Fields of ours by their names there, each of its type and within its bounds."""
    hints, rules = get_type_hints(cls), {field.name: field.metadata for field in fields(cls)}
    found = {}
    for ours, name in names.items():
        if name not in theirs:
            raise FileFault(f"{where}{name} is missing")
        found[ours] = value = theirs[name]
        if fault := not_of(hints[ours], value) or beyond(rules[ours], value):
            raise FileFault(f"{where}{name}={short(value)} {fault}")
    return found
