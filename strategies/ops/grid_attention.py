"""Attention on a grid of ranks: a row's queries against a column's keys (Mesh-Attention, StarTrail).

The N ranks of a ring, c of them in a row (ring.inner) and N / c in a column, each own S/N tokens. A rank gathers the
queries of its row and the keys and values of its column. While they arrive it computes its own queries with its own
keys, then those of others; and while these parts of outputs, and their log-sum-exp, are on their way home, where they
are merged in fp32, the rest of its own. A reduce-scatter would send as much.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from strategies.ops.attention import add_backward, attend
from strategies.ops.collectives import Pending, exchange, here, start_all_gather, start_reduce_scatter
from strategies.ops.hooks import hooks
from strategies.ops.kernels import merge, wide
from strategies.ops.layouts import Tile, tiles_of
from strategies.ops.mesh import Axis
from strategies.ops.options import Options
from strategies.ops.ring_attention import attend_to, attend_to_all, attend_too
from strategies.ops.travels import Visit, looks, travelling_dtype


class GridAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis, options: Options) -> Tensor:
        grid, local_kv, kernel = Grid(axis, q.shape[1], options), torch.stack([k, v]), options.kernel
        queries, keys = Blocks(q, grid.row), Blocks(local_kv, grid.column)
        outs = q.new_empty(grid.row.size - 1, *q.shape)  # of others' queries, by rank
        lses = q.new_empty(grid.row.size - 1, len(q), q.shape[2], q.shape[1], dtype=wide(q.dtype))
        visits = grid.visits(grid.row.rank, keys)
        out, lse = attend_to(q, next(visits), kernel)
        for place in grid.others():
            number = place - (place > grid.row.rank)
            outs[number], lses[number] = attend_to_all(queries.of(place), grid.visits(place, keys), kernel)
        arriving = [grid.send(part) for part in (outs, lses)]
        attend_too(out, lse, q, visits, kernel)
        for part in zip(*(parts.wait() for parts in arriving), strict=True):
            merge(out, lse, *part)
        ctx.grid, ctx.options = grid, options
        ctx.save_for_backward(q, local_kv, out := out.to(q.dtype), lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (q, local_kv, out, lse), grid, options = ctx.saved_tensors, ctx.grid, ctx.options
        queries, lses = Blocks(torch.stack([grad, q, out]), grid.row), Blocks(lse, grid.row)
        keys, dtype = Blocks(local_kv, grid.column), travelling_dtype(q.dtype, options)
        grad_q = torch.zeros_like(q, dtype=wide(q.dtype))
        grads_q = grad_q.new_zeros(grid.row.size, *q.shape)  # of others' queries
        grads_kv = grad_q.new_zeros(grid.column.size, *local_kv.shape)

        def add(grad_q: Tensor, rows: Iterable[Tensor], lse: Tensor, visits: Iterable[Visit]) -> None:
            grad, q, out = rows
            for source, (kv,), tiles in visits:
                tensors = grad, q, *kv, out, lse
                add_backward((grad_q, *grads_kv[source]), *tensors, tiles, options.kernel)

        own, visits = (grad, q, out), grid.visits(grid.row.rank, keys)
        add(grad_q, own, lse, [next(visits)])
        for place in grid.others():
            add(grads_q[place], queries.of(place), lses.of(place), grid.visits(place, keys))
        of_q = summed(grads_q.to(dtype), grid.row)
        del queries, lses, grads_q  # room for the rest
        add(grad_q, own, lse, visits)
        of_kv = summed(grads_kv.to(dtype), grid.column)
        grad_q = grad_q.add_(of_q.wait()[0]).to(q.dtype)
        return grad_q, *of_kv.wait()[0].to(q.dtype), None, None


class Grid:
    """Who owns what. Places are those of ranks in the row of this one, sources those in its column."""

    def __init__(self, ring: Axis, local_seq_len: int, options: Options) -> None:
        self.ring, self.local_seq_len, self.options = ring, local_seq_len, options
        self.row, self.column = ring.parts

    def tiles(self, place: int, source: int, local_seq_len: int) -> list[Tile]:
        """What its queries see of its keys."""
        owners = self.ring.rank - self.row.rank + place, self.row.rank + source * self.row.size
        return tiles_of(*owners, self.ring.size, local_seq_len, self.options)

    def others(self) -> Iterator[int]:
        """The row without this rank; those that are run (ops/hooks.py)."""

        def look(hop: int) -> list[Any]:
            tiles = partial(self.tiles, self.row.place(-1 - hop))
            return [looks(tiles, source, self.options) for source in range(self.column.size)]

        for hop in hooks.hops(self.row.size - 1, look):
            yield self.row.place(-1 - hop)

    def visits(self, place: int, keys: "Blocks") -> Iterator[Visit]:
        """To the queries of a rank in the row: the keys and values of the column, our own first; those that are run."""
        tiles = partial(self.tiles, place)

        def look(hop: int) -> Any:
            return hop == 0, looks(tiles, self.column.place(-hop), self.options)

        for hop in hooks.hops(self.column.size, look):
            source = self.column.place(-hop)
            yield Visit(source, (keys.of(source),), tiles(source, self.local_seq_len))

    def send(self, parts: Tensor) -> Pending:
        """A part to each other rank of the row -> Pending of what they have for us."""
        each = [int(place != self.row.rank) for place in range(self.row.size)]
        return exchange(parts, each, each, self.row) if self.row.size > 1 else here(parts)


class Blocks:
    """What the ranks along an axis own: ours is there, the others' are waited for when they are asked for."""

    def __init__(self, own: Tensor, axis: Axis) -> None:
        self.own, self.rank = own, axis.rank
        self.all: Tensor | None = None
        if axis.size > 1:
            self.arriving = start_all_gather(own[None], 0, axis)

    def of(self, place: int) -> Tensor:
        if place == self.rank:
            return self.own
        if self.all is None:
            self.all = self.arriving.wait()
        return self.all[place]


def summed(x: Tensor, axis: Axis) -> Pending:
    """[size, ..], of all along the axis -> Pending of the ranks' sum of ours, [1, ..]."""
    return start_reduce_scatter(x, 0, axis) if axis.size > 1 else here(x)


def grid_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis, options: Options) -> Tensor:
    """Attention in a sequence split over the ring in options.ring.layout, of whatever options.mask lets a token see.

    q [B, S_local, H, K], k and v [B, S_local, G, K] -> [B, S_local, H, K]
    """
    return attend(q, k, v, options) if axis.size == 1 else GridAttention.apply(q, k, v, axis, options)
