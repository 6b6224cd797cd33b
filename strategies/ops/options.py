"""What a strategy may be told, and hands on to the ops."""

from dataclasses import dataclass, field, fields

import torch

from conf.keys import Config, RingConfig, UlyssesConfig
from conf.mask import PLAIN, Mask
from strategies.ops.kernels import Kernel


@dataclass
class Options:
    """What a strategy may be told beside its mesh: its kernel, and the keys of the configuration that are its own."""

    kernel: Kernel
    compute_dtype: torch.dtype = torch.float32
    zero_stage: int = 3
    grad_dtype: str | None = None  # of weights that have masters in fp32: fp32, or the same as the activations
    mask: Mask = PLAIN  # which keys a token sees, in the batch that is here
    ring: RingConfig = field(default_factory=RingConfig)
    ulysses: UlyssesConfig = field(default_factory=UlyssesConfig)

    @property
    def gradients_in(self) -> torch.dtype:
        """The dtype in which gradients are kept and reduced."""
        return torch.float32 if self.grad_dtype == "fp32" else self.compute_dtype

    @classmethod
    def of(cls, config: Config, kernel: Kernel, compute_dtype: torch.dtype) -> "Options":
        """Those of a configuration."""
        told = {each.name: getattr(config, each.name) for each in fields(cls) if hasattr(config, each.name)}
        return cls(kernel, compute_dtype, **told)
