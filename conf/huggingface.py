"""The config.json of a Hugging Face Llama, as transformers 4 or 5 writes it."""

import json
from pathlib import Path

from conf.keys import RopeScaling
from conf.words import Invalid


class CheckpointError(Invalid):
    """What is wrong with a checkpoint, in one sentence that names the file."""


def read_config(folder: str) -> dict:
    """config.json -> the sizes of a ModelConfig. Raises CheckpointError."""
    file = Path(folder) / "config.json"
    theirs = read_json(file)
    if theirs.get("model_type") != "llama":
        raise CheckpointError(f"{file}: model_type is {theirs.get('model_type')!r}, and only 'llama' can be read")
    for key, supported in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if theirs.get(key, supported) != supported:
            raise CheckpointError(f"{file}: {key} is {theirs[key]!r}, and only {supported!r} can be read")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    try:
        return {
            "dim": theirs["hidden_size"],
            "n_layers": theirs["num_hidden_layers"],
            "n_heads": theirs["num_attention_heads"],
            "n_kv_heads": theirs.get("num_key_value_heads") or theirs["num_attention_heads"],
            "head_dim": theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"],
            "ffn_dim": theirs["intermediate_size"],
            "vocab_size": theirs["vocab_size"],
            "rope_theta": float(rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0),
            "rope_scaling": read_rope_scaling(file, rope),
            "norm_eps": theirs.get("rms_norm_eps", 1e-6),
            "tie_embeddings": theirs.get("tie_word_embeddings", False),
        }
    except KeyError as missing:
        raise CheckpointError(f"{file}: {missing} is missing") from None


def read_rope_scaling(file: Path, rope: dict) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"{file}: rope_type is {kind!r}, and only 'default' and 'llama3' can be read")
    return RopeScaling(
        rope["factor"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from None
