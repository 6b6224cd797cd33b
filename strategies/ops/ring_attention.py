"""Ring attention (Liu et al. 2023): queries stay, keys and values come by, and partial softmaxes are merged.

How they come by is ring.kv. Over P ranks:

    rotate       forward makes P - 1 hops of one buffer that holds k and v. Backward makes P - 1 hops of it again, and
                 P - 1 hops of the gradients. Or there keys stay and queries come by, with ring.backward=q.
    all_gather   all k and v are gathered at once, in backward again, and their gradients reduce-scattered (Llama 3,
                 section 3.3.2): fewer messages, and memory for all keys.
    needed       each rank is sent the keys that its queries see and no others, in one exchange of uneven parts, in
                 backward again, and sends their gradients back the same way.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from strategies.ops.attention import attend, tiled_backward, tiled_forward
from strategies.ops.kernels import Grads, Kernel, accumulator, merge
from strategies.ops.layouts import Tile, tiles_of
from strategies.ops.mesh import Axis
from strategies.ops.options import Options
from strategies.ops.travels import OWN, Gather, Given, Needed, Rotate, Visit


class RingAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis, options: Options) -> Tensor:
        local_kv = torch.stack([k, v])  # [2, B, S_ring, G, K]: travels as one message
        visits = TRAVELS[options.ring.kv](local_kv, axis, options).visits()
        out, lse = attend_to_all(q, visits, options.kernel)
        ctx.save_for_backward(q, local_kv, out := out.to(q.dtype), lse)
        ctx.axis, ctx.options = axis, options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        backward = BACKWARD[ctx.options.ring.backward]
        return *backward(grad, *ctx.saved_tensors, ctx.axis, ctx.options), None, None


def attend_to_all(q: Tensor, visits: Iterator[Visit], kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Blocks that come by, our own first -> out [B, S, H, K], in at least fp32, and lse [B, H, S]."""
    out, lse = attend_to(q, next(visits), kernel)
    attend_too(out, lse, q, visits, kernel)
    return out, lse


def attend_to(q: Tensor, visit: Visit, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """The same of one block."""
    (kv,) = visit.block
    out, lse = tiled_forward(q, *kv, visit.tiles, kernel)
    return accumulator(out), lse


def attend_too(out: Tensor, lse: Tensor, q: Tensor, visits: Iterable[Visit], kernel: Kernel) -> None:
    """Fold in more keys and values, a block after the other."""
    for _, (kv,), tiles in visits:
        for tile in tiles:
            part = q[tile.queries], *(t[tile.keys] for t in kv)
            merge(out[tile.queries], lse[tile.lse], *kernel.forward(*part, tile.causal, tile.windowed))


def backward_of_visiting_keys(
    grad: Tensor, q: Tensor, local_kv: Tensor, out: Tensor, lse: Tensor, axis: Axis, options: Options
) -> Grads:
    """Keys and values come by again. Their gradients travel behind them, that of q adds up here."""
    travel = TRAVELS[options.ring.kv](local_kv, axis, options)
    for visit in travel.visits():
        (kv,) = visit.block
        if visit.source == axis.rank:
            block_q, *block_kv = tiled_backward(grad, q, *kv, out, lse, visit.tiles, options.kernel)
            grad_q = accumulator(block_q)
            travel.give(visit, [(OWN, block_kv)])
            continue
        given = []
        for tile in visit.tiles:
            part = grad[tile.queries], q[tile.queries], *(t[tile.keys] for t in kv), out[tile.queries]
            block_q, *block_kv = options.kernel.backward(*part, lse[tile.lse], tile.causal, tile.windowed)
            grad_q[tile.queries].add_(block_q)
            given.append((tile.keys, block_kv))
        travel.give(visit, given)
    grad_k, grad_v = travel.own_grad().to(q.dtype)
    return grad_q.to(q.dtype), grad_k, grad_v


def backward_of_visiting_queries(
    grad: Tensor, q: Tensor, local_kv: Tensor, out: Tensor, lse: Tensor, axis: Axis, options: Options
) -> Grads:
    """Queries come by, with dO, lse and the rows' sums of dO * O (BurstAttention, Sun et al. 2024, section 3.2).

    Their gradients travel behind them, those of k and v add up here. Fewer bytes than keys, if there are as many heads
    of these.
    """
    sums = (grad.to(lse.dtype) * out).sum(-1).transpose(1, 2)  # [B, H, S_ring], as lse
    queries, numbers = torch.stack([q, grad]), torch.stack([lse, sums])

    def tiles(source: int, n: int) -> list[Tile]:
        return tiles_of(source, axis.rank, axis.size, n, options)

    travel = Rotate((queries, numbers), queries[:1], axis, options, tiles)
    for visit in travel.visits():
        if visit.source == axis.rank:
            block_q, *grad_kv = tiled_backward(grad, q, *local_kv, out, lse, visit.tiles, options.kernel)
            grad_kv = [accumulator(t) for t in grad_kv]
            travel.give(visit, [(OWN, [block_q])])
        else:
            travel.give(visit, backward_of_visit(visit, local_kv, grad_kv, options.kernel))
    (grad_q,) = travel.own_grad().to(q.dtype)
    return grad_q, *(t.to(q.dtype) for t in grad_kv)


def backward_of_visit(visit: Visit, local_kv: Tensor, grad_kv: Sequence[Tensor], kernel: Kernel) -> Given:
    """Of queries that are visiting: adds to dk and dv here, and returns what is added to dq."""
    (q, grad), (lse, sums) = visit.block
    out, given = with_row_sums(sums, grad), []
    for tile in visit.tiles:
        part = grad[tile.queries], q[tile.queries], *(t[tile.keys] for t in local_kv), out[tile.queries]
        block_q, *block_kv = kernel.backward(*part, lse[tile.lse], tile.causal, tile.windowed)
        given.append((tile.queries, [block_q]))
        for whole, block in zip(grad_kv, block_kv, strict=True):
            whole[tile.keys].add_(block)
    return given


def with_row_sums(sums: Tensor, grad: Tensor) -> Tensor:
    """An output whose product with dO has these sums over a row, which is all that a kernel's backward takes from it.

    sums [B, H, S], grad [B, S, H, K] -> [B, S, H, K]
    """
    squares = torch.linalg.vector_norm(grad, dim=-1, dtype=sums.dtype).square()
    share = (sums.transpose(1, 2) / squares).nan_to_num(0.0)  # where dO is 0, so are the sums
    return torch.mul(grad, share[..., None], out=torch.empty_like(grad))


def rotate(local_kv: Tensor, axis: Axis, options: Options) -> Rotate:
    """Keys and values around the ring."""

    def tiles(source: int, n: int) -> list[Tile]:
        return tiles_of(axis.rank, source, axis.size, n, options)

    return Rotate((local_kv,), local_kv, axis, options, tiles)


TRAVELS = {"rotate": rotate, "all_gather": Gather, "needed": Needed}
BACKWARD = {"kv": backward_of_visiting_keys, "q": backward_of_visiting_queries}


def ring_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis, options: Options) -> Tensor:
    """Attention in a sequence split around the ring in options.ring.layout, of whatever options.mask lets a token see.

    q [B, S_ring, H, K], k and v [B, S_ring, G, K] -> [B, S_ring, H, K]
    """
    return attend(q, k, v, options) if axis.size == 1 else RingAttention.apply(q, k, v, axis, options)
