"""Ring attention (Liu et al. 2023): queries stay, keys and values come by, and partial softmaxes are merged.

How they come by is ring.kv. Over P ranks:

    rotate       forward makes P - 1 hops of one buffer that holds k and v. Backward makes P - 1 hops of it again, and
                 P - 1 hops of the gradients: they start on the rank after the owner, because the owner adds its own
                 part at the end.
    all_gather   all k and v are gathered at once, in backward again, and their gradients reduce-scattered (Llama 3,
                 section 3.3.2): fewer messages, and memory for all keys.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strategies.ops.collectives import Pending, shift, start_all_gather, start_reduce_scatter
from strategies.ops.kernels import attend
from strategies.ops.layouts import tiles
from strategies.ops.mesh import Axis


class RingAttention(Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, axis: Axis, layout: str, kv: str, grad_dtype, kernel) -> Tensor:
        local_kv = torch.stack([k, v])  # [2, B, S_ring, G, K]: travels as one message
        out = lse = None
        for source, (k_block, v_block) in TRAVELS[kv](axis, layout, grad_dtype).visits(local_kv):
            for tile in tiles(layout, axis.rank, source, q.shape[1]):
                block = kernel.forward(q[:, tile.q], k_block[:, tile.kv], v_block[:, tile.kv], tile.causal)
                if out is None:  # the first block is our own, and covers all queries
                    out, lse = accumulator(block[0]), block[1]
                else:
                    merge(out[:, tile.q], lse[:, :, tile.q], *block)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, local_kv, out, lse)
        ctx.axis, ctx.layout, ctx.kv, ctx.grad_dtype, ctx.kernel = axis, layout, kv, grad_dtype, kernel
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, local_kv, out, lse = ctx.saved_tensors
        grad_q = accumulator(torch.zeros_like(q))
        travel = TRAVELS[ctx.kv](ctx.axis, ctx.layout, ctx.grad_dtype)
        for source, kv in travel.visits(local_kv):
            grad_kv = accumulator(torch.zeros_like(kv))
            for tile in tiles(ctx.layout, ctx.axis.rank, source, q.shape[1]):
                k_block, v_block = kv[:, :, tile.kv]
                here = (grad[:, tile.q], q[:, tile.q], k_block, v_block, out[:, tile.q], lse[:, :, tile.q])
                block_q, block_k, block_v = ctx.kernel.backward(*here, tile.causal)
                grad_q[:, tile.q] += block_q
                grad_kv[0][:, tile.kv] += block_k
                grad_kv[1][:, tile.kv] += block_v
            travel.give(source, grad_kv)
        grad_k, grad_v = travel.own_grad().to(q.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None, None


class Rotate:
    """Blocks travel around the ring, and in backward their gradients behind them."""

    def __init__(self, axis: Axis, layout: str, grad_dtype: torch.dtype) -> None:
        self.axis, self.layout, self.grad_dtype = axis, layout, grad_dtype
        self.in_flight: Pending | None = None  # the gradient of the block that visits next, as far as others have it

    def visits(self, kv: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(source rank, its kv) for every rank of the ring, our own first, the next hop already in flight."""
        for hop in self.hops():
            arriving = shift(kv, self.axis) if hop + 1 < self.axis.size else None
            yield (self.axis.rank - hop) % self.axis.size, kv
            kv = arriving.wait() if arriving else None

    def hops(self) -> Iterable[int]:
        return range(self.axis.size)

    def give(self, source: int, grad_kv: Tensor) -> None:
        """Our part of the gradient of the block that is visiting."""
        if source == self.axis.rank:
            self.own = grad_kv
            return
        if self.in_flight is not None:
            grad_kv += self.in_flight.wait()
        self.in_flight = shift(grad_kv.to(self.grad_dtype), self.axis)

    def own_grad(self) -> Tensor:
        return self.own.add_(self.in_flight.wait())


class Gather:
    """All blocks are gathered at once."""

    def __init__(self, axis: Axis, layout: str, grad_dtype: torch.dtype) -> None:
        self.axis, self.grad_dtype = axis, grad_dtype
        self.grads: dict[int, Tensor] = {}

    def visits(self, kv: Tensor) -> Iterator[tuple[int, Tensor]]:
        blocks = start_all_gather(kv[None], 0, self.axis).wait()
        for hop in range(self.axis.size):
            source = (self.axis.rank - hop) % self.axis.size
            yield source, blocks[source]

    def give(self, source: int, grad_kv: Tensor) -> None:
        self.grads[source] = grad_kv.to(self.grad_dtype)

    def own_grad(self) -> Tensor:
        grads = torch.stack([self.grads[source] for source in range(self.axis.size)])
        return start_reduce_scatter(grads, 0, self.axis).wait()[0]


TRAVELS = {"rotate": Rotate, "all_gather": Gather}


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
    return RingAttention.apply(q, k, v, axis, options.ring_layout, options.ring_kv, travels, options.kernel)
