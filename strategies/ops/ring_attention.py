"""Ring attention (Liu et al. 2023): queries stay, keys and values come by, and partial softmaxes are merged.

How they come by is ring.kv. Over P ranks:

    rotate       forward makes P - 1 hops of one buffer that holds k and v. Backward makes P - 1 hops of it again, and
                 P - 1 hops of the gradients: they start on the rank after the owner, because the owner adds its own
                 part at the end.
    all_gather   all k and v are gathered at once, in backward again, and their gradients reduce-scattered (Llama 3,
                 section 3.3.2): fewer messages, and memory for all keys.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strategies.ops.collectives import Pending, shift, start_all_gather, start_reduce_scatter
from strategies.ops.hooks import hooks
from strategies.ops.kernels import attend
from strategies.ops.layouts import ALL, visible
from strategies.ops.mesh import Axis
from strategies.ops.options import Options


class RingAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis, options: Options) -> Tensor:
        local_kv = torch.stack([k, v])  # [2, B, S_ring, G, K]: travels as one message
        out = lse = None
        for source, (k_block, v_block) in TRAVELS[options.ring.kv](local_kv, axis, options).visits():
            if (tile := visible(options.ring.layout, axis.rank, source, q.shape[1])) is None:
                continue
            block = options.kernel.forward(q[:, tile.q], k_block[:, tile.kv], v_block[:, tile.kv], tile.causal)
            if out is None:  # our own block comes first, and every query sees it
                out, lse = accumulator(block[0]), block[1]
            else:
                merge(out[:, tile.q], lse[:, :, tile.q], *block)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, local_kv, out, lse)
        ctx.axis, ctx.options = axis, options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, local_kv, out, lse = ctx.saved_tensors
        axis, options = ctx.axis, ctx.options
        travel = TRAVELS[options.ring.kv](local_kv, axis, options)
        grad_q = None
        for source, (k_block, v_block) in travel.visits():
            if (tile := visible(options.ring.layout, axis.rank, source, q.shape[1])) is None:
                travel.give(source, ALL, ())
                continue
            here = (grad[:, tile.q], q[:, tile.q], k_block[:, tile.kv], v_block[:, tile.kv], out[:, tile.q])
            block_q, *block_kv = options.kernel.backward(*here, lse[:, :, tile.q], tile.causal)
            if grad_q is None:
                grad_q = accumulator(block_q)
            else:
                grad_q[:, tile.q].add_(block_q)  # += would copy the sum onto itself
            travel.give(source, tile.kv, block_kv)
        grad_k, grad_v = travel.own_grad().to(q.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None


class Rotate:
    """Blocks travel around the ring, and in backward their gradients behind them."""

    def __init__(self, local_kv: Tensor, axis: Axis, options: Options) -> None:
        self.local_kv, self.axis, self.layout = local_kv, axis, options.ring.layout
        self.grad_dtype = travelling_dtype(local_kv.dtype, options)
        self.own: tuple[slice, Sequence[Tensor]] | None = None  # our part of our own block's gradient
        self.in_flight: Pending | None = None  # the gradient of the block that visits next, as far as others have it

    def visits(self) -> Iterator[tuple[int, Tensor]]:
        """(source rank, its kv) for every rank of the ring, our own first, the next hop already in flight."""
        kv = self.local_kv
        for hop in hooks.hops(self.axis, self.layout):
            arriving = shift(kv, self.axis) if hop + 1 < self.axis.size else None
            yield (self.axis.rank - hop) % self.axis.size, kv
            kv = arriving.wait() if arriving else None

    def give(self, source: int, keys: slice, block_kv: Sequence[Tensor]) -> None:
        """Our part of the gradient of the block that is visiting: of which keys, and (dk, dv), none if it is hidden."""
        if source == self.axis.rank:
            self.own = keys, block_kv
            return
        grad_kv = self.in_flight.wait() if self.in_flight else torch.zeros_like(self.local_kv, dtype=self.grad_dtype)
        add(grad_kv, keys, block_kv)
        self.in_flight = shift(grad_kv, self.axis)

    def own_grad(self) -> Tensor:
        grad_kv = self.in_flight.wait()
        add(grad_kv, *self.own)
        return grad_kv


class Gather:
    """All blocks are gathered at once."""

    def __init__(self, local_kv: Tensor, axis: Axis, options: Options) -> None:
        self.local_kv, self.axis, self.grad_dtype = local_kv, axis, travelling_dtype(local_kv.dtype, options)
        self.grads: Tensor | None = None  # [ranks, 2, B, S_ring, G, K]

    def visits(self) -> Iterator[tuple[int, Tensor]]:
        blocks = start_all_gather(self.local_kv[None], 0, self.axis).wait()
        for hop in range(self.axis.size):
            source = (self.axis.rank - hop) % self.axis.size
            yield source, blocks[source]

    def give(self, source: int, keys: slice, block_kv: Sequence[Tensor]) -> None:
        if self.grads is None:
            self.grads = self.local_kv.new_zeros(self.axis.size, *self.local_kv.shape, dtype=self.grad_dtype)
        add(self.grads[source], keys, block_kv)

    def own_grad(self) -> Tensor:
        return start_reduce_scatter(self.grads, 0, self.axis).wait()[0]


def travelling_dtype(dtype: torch.dtype, options: Options) -> torch.dtype:
    """In which dK and dV travel: at least fp32, or as k and v."""
    return dtype if options.ring.grad_dtype == "same" else torch.promote_types(dtype, torch.float32)


def add(grad_kv: Tensor, keys: slice, block_kv: Sequence[Tensor]) -> None:
    """Add a block's (dk, dv), of these keys, to the gradient [2, B, S_ring, G, K] in place."""
    for whole, block in zip(grad_kv, block_kv, strict=False):
        whole[:, keys].add_(block)  # += would copy the sum onto itself


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


def ring_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis, options: Options) -> Tensor:
    """Causal attention of a sequence split around the ring in options.ring.layout.

    q [B, S_ring, H, K], k and v [B, S_ring, G, K] -> [B, S_ring, H, K]
    """
    return attend(q, k, v, options.kernel) if axis.size == 1 else RingAttention.apply(q, k, v, axis, options)
