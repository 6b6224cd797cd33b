"""The shape of a Llama model, without torch: what presets, checkpoints and cost formulas share."""

from dataclasses import dataclass, fields


@dataclass
class RopeScaling:
    """Llama 3.1's frequency scaling (Llama 3 herd paper, section 3.2): long waves are slowed by `factor`."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass
class ModelConfig:
    """A Llama model's sizes. B batch, S tokens, D=dim, H=n_heads, G=n_kv_heads, K=head_dim, F=ffn_dim, V=vocab_size."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    head_dim: int | None = None  # null = dim / n_heads
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):
            self.rope_scaling = RopeScaling(**self.rope_scaling)
        self.head_dim = self.head_dim or self.dim // self.n_heads

    @classmethod
    def of(cls, values: dict) -> "ModelConfig":
        """The model among `values`, a resolved `model` section that may hold more (its name, its path)."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
