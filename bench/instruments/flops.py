"""Floating-point operations of one step on one rank: matrix products as dispatched, attention pair by pair.

A causal mask lets S (S + 1) / 2 of the S^2 query-key pairs through, documents and windows fewer, and only these are
counted, whatever the kernel computes. A pair costs 4 K a head forward (scores and output) and 10 K backward (five
products: Dao 2023, section 3.1).
Recomputation is not counted: it is the model's operations that MFU relates to the peak (Chowdhery et al. 2022).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bench.instruments.instrument import Instrument
from bench.instruments.ledger import recomputing
from strategies.ops.kernels import Grads, Kernel
from strategies.ops.layouts import pairs


class FlopCounter(Instrument):
    """Counts matrix products; wrap the attention kernel in CountedKernel so that it is counted by pairs."""

    def __init__(self) -> None:
        self.total = 0
        self.in_attention = False

    def saw(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        formula = flop_registry.get(func._overloadpacket)
        if formula and not self.in_attention and not recomputing():
            self.add(formula(*args, **kwargs, out_val=out))

    def add(self, flops: int) -> None:
        self.total += flops * self.times


class CountedKernel:
    """An attention kernel that reports the pairs that it was asked for."""

    def __init__(self, kernel: Kernel, counter: FlopCounter) -> None:
        self.kernel, self.counter, self.name = kernel, counter, kernel.name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *mask: bool) -> tuple[Tensor, Tensor]:
        with self.counted(4, q, k, *mask):
            return self.kernel.forward(q, k, v, *mask)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *mask: bool) -> Grads:
        with self.counted(10, q, k, *mask):
            return self.kernel.backward(grad, q, k, v, out, lse, *mask)

    @contextmanager
    def counted(self, flops_per_dim: int, q: Tensor, k: Tensor, causal: bool, windowed: bool = False) -> Iterator[None]:
        batch, s_q, heads, head_dim = q.shape
        if not recomputing():
            self.counter.add(flops_per_dim * batch * heads * head_dim * pairs(s_q, k.shape[1], causal, windowed))
        self.counter.in_attention = True
        try:
            yield
        finally:
            self.counter.in_attention = False
