"""Ring attention (Liu et al. 2023): queries stay, keys and values come by, and partial softmaxes are merged.

How they come by is ring.kv. Over P ranks:

    rotate       forward makes P - 1 hops of one buffer that holds k and v. Backward makes P - 1 hops of it again, and
                 P - 1 hops of the gradients: they start on the rank after the owner, because the owner adds its own
                 part at the end.
    all_gather   all k and v are gathered at once, in backward again, and their gradients reduce-scattered (Llama 3,
                 section 3.3.2): fewer messages, and memory for all keys.
    needed       each rank is sent the keys that its queries see and no others, in one exchange of uneven parts, in
                 backward again, and sends their gradients back the same way.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from strategies.ops.attention import attend, tiled_backward, tiled_forward
from strategies.ops.collectives import Pending, exchange, shift, start_all_gather, start_reduce_scatter
from strategies.ops.hooks import hooks
from strategies.ops.kernels import accumulator, merge, wide
from strategies.ops.layouts import ALL, Keys, Tile, seen_keys, tiles_of, tiles_of_others
from strategies.ops.mesh import Axis
from strategies.ops.options import Options


class Visit(NamedTuple):
    """Keys and values [2, B, S_kv, G, K] that a rank of the ring owns, and what our queries see of them."""

    source: int
    kv: Tensor
    tiles: list[Tile]


class RingAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis, options: Options) -> Tensor:
        local_kv = torch.stack([k, v])  # [2, B, S_ring, G, K]: travels as one message
        for source, kv, tiles in TRAVELS[options.ring.kv](local_kv, axis, options).visits():
            if source == axis.rank:  # our own block comes first, and every query sees some of it
                out, lse = tiled_forward(q, *kv, tiles, options.kernel)
                out = accumulator(out)
                continue
            for tile in tiles:
                part = q[tile.queries], *(t[tile.keys] for t in kv)
                merge(out[tile.queries], lse[tile.lse], *options.kernel.forward(*part, tile.causal, tile.windowed))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, local_kv, out, lse)
        ctx.axis, ctx.options = axis, options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, local_kv, out, lse = ctx.saved_tensors
        axis, options = ctx.axis, ctx.options
        travel = TRAVELS[options.ring.kv](local_kv, axis, options)
        for visit in travel.visits():
            if visit.source == axis.rank:
                block_q, *block_kv = tiled_backward(grad, q, *visit.kv, out, lse, visit.tiles, options.kernel)
                grad_q = accumulator(block_q)
                travel.give(visit, [(OWN, block_kv)])
                continue
            given = []
            for tile in visit.tiles:
                part = grad[tile.queries], q[tile.queries], *(t[tile.keys] for t in visit.kv), out[tile.queries]
                block_q, *block_kv = options.kernel.backward(*part, lse[tile.lse], tile.causal, tile.windowed)
                grad_q[tile.queries].add_(block_q)
                given.append((tile.keys, block_kv))
            travel.give(visit, given)
        grad_k, grad_v = travel.own_grad().to(q.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None


Given = Sequence[tuple[tuple[slice, slice], Sequence[Tensor]]]  # of which keys of a block, and their (dk, dv)
OWN = ALL, ALL
OTHERS = -1  # the source of what came from all other ranks together


class Rotate:
    """Blocks travel around the ring, and in backward their gradients behind them."""

    def __init__(self, local_kv: Tensor, axis: Axis, options: Options) -> None:
        self.local_kv, self.axis, self.options = local_kv, axis, options
        self.grad_dtype = travelling_dtype(local_kv.dtype, options)
        self.own: Given = ()  # our part of our own block's gradient
        self.in_flight: Pending | None = None  # the gradient of the block that visits next, as far as others have it

    def visits(self) -> Iterator[Visit]:
        """Of every rank of the ring, our own block first, the next hop already in flight."""
        kv = self.local_kv
        for hop in hooks.hops(self.axis, self.options):
            arriving = shift(kv, self.axis) if hop + 1 < self.axis.size else None
            source = (self.axis.rank - hop) % self.axis.size
            yield Visit(source, kv, tiles_of(self.axis.rank, source, self.axis.size, kv.shape[2], self.options))
            kv = arriving.wait() if arriving else None

    def give(self, visit: Visit, given: Given) -> None:
        """Our part of the gradient of the block that is visiting, none where it is hidden."""
        if visit.source == self.axis.rank:
            self.own = given
            return
        grad_kv = self.in_flight.wait() if self.in_flight else torch.zeros_like(self.local_kv, dtype=self.grad_dtype)
        add(grad_kv, given)
        self.in_flight = shift(grad_kv, self.axis)

    def own_grad(self) -> Tensor:
        grad_kv = self.in_flight.wait()
        add(grad_kv, self.own)
        return grad_kv


class Gather:
    """All blocks are gathered at once."""

    def __init__(self, local_kv: Tensor, axis: Axis, options: Options) -> None:
        self.local_kv, self.axis, self.options = local_kv, axis, options
        self.grads: Tensor | None = None  # [ranks, 2, B, S_ring, G, K]

    def visits(self) -> Iterator[Visit]:
        blocks = start_all_gather(self.local_kv[None], 0, self.axis).wait()
        for hop in range(self.axis.size):
            source = (self.axis.rank - hop) % self.axis.size
            tiles = tiles_of(self.axis.rank, source, self.axis.size, self.local_kv.shape[2], self.options)
            yield Visit(source, blocks[source], tiles)

    def give(self, visit: Visit, given: Given) -> None:
        if self.grads is None:
            dtype = travelling_dtype(self.local_kv.dtype, self.options)
            self.grads = self.local_kv.new_zeros(self.axis.size, *self.local_kv.shape, dtype=dtype)
        add(self.grads[visit.source], given)

    def own_grad(self) -> Tensor:
        return start_reduce_scatter(self.grads, 0, self.axis).wait()[0]


class Needed:
    """Each rank is sent the keys that its queries see, in one exchange, while its own block is computed.

    What arrives is [H, B, 2, G, K], H keys of all other ranks one after the other; where sequences are not alike, each
    has keys of its own, and it is [H, 1, 2, G, K].
    """

    def __init__(self, local_kv: Tensor, axis: Axis, options: Options) -> None:
        self.local_kv, self.axis, self.options = local_kv, axis, options
        ranks, n = range(axis.size), local_kv.shape[2]
        self.leaves = [seen_keys(other, axis.rank, axis.size, n, options) for other in ranks]
        self.arrives = [seen_keys(axis.rank, other, axis.size, n, options) for other in ranks]

    def visits(self) -> Iterator[Visit]:
        nothing = self.local_kv[:, ALL if self.options.mask.alike else slice(1), :0].permute(2, 1, 0, 3, 4)
        tokens = [self.local_kv[:, rows, keys].permute(2, 1, 0, 3, 4) for part in self.leaves for rows, keys in part]
        arriving = exchange(torch.cat([nothing, *tokens]), *map(sizes, (self.leaves, self.arrives)), self.axis)
        here, n = self.axis.rank, self.local_kv.shape[2]
        yield Visit(here, self.local_kv, tiles_of(here, here, self.axis.size, n, self.options))
        arrived = arriving.wait()
        self.grads = torch.zeros_like(arrived, dtype=travelling_dtype(arrived.dtype, self.options))
        yield Visit(
            OTHERS, arrived.permute(2, 1, 0, 3, 4), list(tiles_of_others(here, self.axis.size, n, self.options))
        )

    def give(self, visit: Visit, given: Given) -> None:
        if visit.source == self.axis.rank:
            self.own = given
        else:
            add(self.grads.permute(2, 1, 0, 3, 4), given)
            self.returning = exchange(self.grads, *map(sizes, (self.arrives, self.leaves)), self.axis)

    def own_grad(self) -> Tensor:
        grad_kv = torch.zeros_like(self.local_kv, dtype=self.grads.dtype)
        add(grad_kv, self.own)
        returned = self.returning.wait().permute(2, 1, 0, 3, 4)
        start = 0
        for rows, keys in (each for part in self.leaves for each in part):
            stop = start + keys.stop - keys.start
            grad_kv[:, rows, keys].add_(returned[:, :, start:stop])
            start = stop
        return grad_kv


def sizes(parts: Sequence[list[Keys]]) -> list[int]:
    """Of each rank, how many keys."""
    return [sum(keys.stop - keys.start for _, keys in part) for part in parts]


def travelling_dtype(dtype: torch.dtype, options: Options) -> torch.dtype:
    """In which dK and dV travel: at least fp32, or as k and v."""
    return dtype if options.ring.grad_dtype == "same" else wide(dtype)


def add(grad_kv: Tensor, given: Given) -> None:
    """Add (dk, dv) of some keys to the gradient [2, B, S_ring, G, K] in place."""
    for keys, block_kv in given:
        for whole, block in zip(grad_kv, block_kv, strict=True):
            whole[keys].add_(block)  # += would copy the sum onto itself


TRAVELS = {"rotate": Rotate, "all_gather": Gather, "needed": Needed}


def ring_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis, options: Options) -> Tensor:
    """Attention in a sequence split around the ring in options.ring.layout, of whatever options.mask lets a token see.

    q [B, S_ring, H, K], k and v [B, S_ring, G, K] -> [B, S_ring, H, K]
    """
    return attend(q, k, v, options) if axis.size == 1 else RingAttention.apply(q, k, v, axis, options)
