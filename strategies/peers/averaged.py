"""Peers that average gradients over N ranks, where the loss was already divided by all tokens."""

from typing import Any

from torch import Tensor
from torch.autograd import Function


class Summed(Function):
    """The loss itself; its gradient times N, which makes the average of the gradients their sum."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return loss.clone()  # FSDP2 warns of views

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad * ctx.ranks, None
