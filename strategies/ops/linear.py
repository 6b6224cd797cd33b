"""Column-parallel linears on a sequence shard, gathering again in backward (Korthikanti et al. 2022, section 4.2.2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from strategies.ops.collectives import start_all_gather, start_reduce_scatter
from strategies.ops.mesh import Axis

SEQUENCE = 1


class GatheredLinear(Function):
    """y_i = all_gather(x) W_i^T for several W_i, one gather for all, of which only the shard of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = axis
        ctx.save_for_backward(x, *weights)  # [B, S_tp, D]: 1/N of the input that the products see
        whole = start_all_gather(x, SEQUENCE, axis).wait()  # [B, S, D]
        return tuple(F.linear(whole, w.to(x.dtype)) for w in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        gathering = start_all_gather(x, SEQUENCE, ctx.axis)  # in flight beside the input's gradient
        grad_whole = grads[0] @ weights[0].to(x.dtype)
        for grad, w in zip(grads[1:], weights[1:], strict=True):
            grad_whole = torch.addmm(grad_whole.flatten(0, 1), grad.flatten(0, 1), w.to(x.dtype)).view_as(grad_whole)
        scattering = start_reduce_scatter(grad_whole, SEQUENCE, ctx.axis)  # beside the weights' gradients
        whole = gathering.wait().flatten(0, 1)
        grad_weights = [(g.flatten(0, 1).T @ whole).to(w.dtype) for g, w in zip(grads, weights, strict=True)]
        return scattering.wait(), None, *grad_weights


def gathered_linear(x: Tensor, linears: list[nn.Module], axis: Axis) -> tuple[Tensor, ...]:
    """x [B, S_tp, D] -> for each column-sharded linear [B, S, out_tp]."""
    if axis.size == 1:
        return tuple(linear(x) for linear in linears)
    return GatheredLinear.apply(x, axis, *(linear.weight for linear in linears))
