"""Ring attention (Liu et al. 2023): queries stay, keys and values travel, and partial softmaxes are merged.

Over P ranks, forward makes P - 1 hops of one buffer that holds k and v. Backward makes P - 1 hops of it again, and
P - 1 hops of the gradients: they start on the rank after the owner, because the owner adds its own part at the end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strategies.ops.collectives import Pending, shift
from strategies.ops.kernels import attend
from strategies.ops.layouts import tiles
from strategies.ops.mesh import Axis


class RingAttention(Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, axis: Axis, layout: str, grad_dtype, kernel) -> Tensor:
        local_kv = torch.stack([k, v])  # [2, B, S_ring, G, K]: travels as one message
        out = lse = None
        for source, kv in visiting(local_kv, axis):
            for tile in tiles(layout, axis.rank, source, q.shape[1]):
                block = kernel.forward(q[:, tile.q], kv[0][:, tile.kv], kv[1][:, tile.kv], tile.causal)
                if out is None:  # the first block is our own, and covers all queries
                    out, lse = accumulator(block[0]), block[1]
                else:
                    merge(out[:, tile.q], lse[:, :, tile.q], *block)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, local_kv, out, lse)
        ctx.axis, ctx.layout, ctx.grad_dtype, ctx.kernel = axis, layout, grad_dtype, kernel
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, local_kv, out, lse = ctx.saved_tensors
        axis = ctx.axis
        grad_q = accumulator(torch.zeros_like(q))
        in_flight: Pending | None = None  # the gradient of the block that visits next, as far as others have it
        for source, kv in visiting(local_kv, axis):
            grad_kv = accumulator(torch.zeros_like(kv))  # of the block that visits now
            for q_part, kv_part, causal in tiles(ctx.layout, axis.rank, source, q.shape[1]):
                block_q, block_k, block_v = ctx.kernel.backward(
                    grad[:, q_part],
                    q[:, q_part],
                    kv[0][:, kv_part],
                    kv[1][:, kv_part],
                    out[:, q_part],
                    lse[:, :, q_part],
                    causal,
                )
                grad_q[:, q_part] += block_q
                grad_kv[0][:, kv_part] += block_k
                grad_kv[1][:, kv_part] += block_v
            if source == axis.rank:
                grad_own = grad_kv
                continue
            if in_flight is not None:
                grad_kv += in_flight.wait()
            in_flight = shift(grad_kv.to(ctx.grad_dtype), axis)
        grad_own += in_flight.wait()
        grad_k, grad_v = grad_own.to(q.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None


def visiting(kv: Tensor, axis: Axis):
    """Yield (source rank, its kv) for every rank of the ring, our own first, the next hop already in flight."""
    for hop in range(axis.size):
        arriving = shift(kv, axis) if hop + 1 < axis.size else None
        yield (axis.rank - hop) % axis.size, kv
        kv = arriving.wait() if arriving else None


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Fold the attention over more keys into out [B, S, H, K] and lse [B, H, S], in place.

    Sigmoids of differences, not quotients of exponentials: those overflow (jzhang38/EasyContext#14).
    """
    weight = torch.sigmoid(block_lse - lse).transpose(1, 2).unsqueeze(-1)  # the block's share of the softmax
    out.lerp_(block_out.to(out.dtype), weight.to(out.dtype))
    lse -= F.logsigmoid(lse - block_lse)


def accumulator(x: Tensor) -> Tensor:
    """x in at least fp32. The caller owns x: `.to` of an fp32 tensor is the tensor itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ring_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis, options) -> Tensor:
    """Causal attention of a sequence split around the ring in options.ring_layout.

    q [B, S_ring, H, K], k and v [B, S_ring, G, K] -> [B, S_ring, H, K]. The gradients of k and v travel in fp32, or
    in k's dtype if options.ring_grad_dtype is `same`.
    """
    if axis.size == 1:
        return attend(q, k, v, options.kernel)
    travels = k.dtype if options.ring_grad_dtype == "same" else torch.promote_types(k.dtype, torch.float32)
    return RingAttention.apply(q, k, v, axis, options.ring_layout, travels, options.kernel)
