"""How blocks of the ranks of a ring come by all the others, and how what is added to their gradients comes home.

A travel yields its visits, our own block first. In backward it is given our part of the gradient of each block that
visits, in turn, and own_grad() is what all have given to ours.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from strategies.ops.collectives import Pending, exchange, shift, start_all_gather, start_reduce_scatter
from strategies.ops.hooks import hooks
from strategies.ops.kernels import wide
from strategies.ops.layouts import ALL, Keys, Tile, seen_keys, tiles_of, tiles_of_others
from strategies.ops.mesh import Axis
from strategies.ops.options import Options

Block = tuple[Tensor, ...]  # what travels of a rank, a message each
Given = Sequence[tuple[tuple[slice, slice], Sequence[Tensor]]]  # of which tokens of a block, and their gradients
OWN = ALL, ALL
OTHERS = -1  # the source of what came from all other ranks together
SHORT = 8  # tokens of a rank, with which it sees the same as with more, where it sees all that come before


class Visit(NamedTuple):
    """A block that a rank of the ring owns, and which queries see which keys where it is."""

    source: int
    block: Block
    tiles: list[Tile]


class Ring:
    """Blocks travel around a ring, and in backward their gradients behind them.

    P - 1 hops of each: a gradient starts on the rank after the owner, because the owner adds its own part at the end.
    """

    def __init__(self, block: Block, like: Tensor, dtype: torch.dtype, axis: Axis, hops: Iterable[int]) -> None:
        """like, dtype: of the gradient of what we own. hops: those that are run (ops/hooks.py)."""
        self.block, self.like, self.dtype, self.axis, self.hops = block, like, dtype, axis, hops
        self.own: Given = ()  # our part of our own block's gradient
        self.in_flight: Pending | None = None  # the gradient of the block that visits next, as far as others have it

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """Of every rank, the next hop already in flight."""
        block = self.block
        for hop in self.hops:
            arriving = [shift(part, self.axis) for part in block] if hop + 1 < self.axis.size else []
            yield self.axis.place(-hop), block
            block = tuple(part.wait() for part in arriving)

    def give(self, source: int, given: Given) -> None:
        """Our part of the gradient of the block that is visiting, none where it is hidden."""
        if source == self.axis.rank:
            self.own = given
            return
        grad = self.so_far()
        add(grad, given)
        self.in_flight = shift(grad, self.axis)

    def own_grad(self) -> Tensor:
        grad = self.so_far()
        add(grad, self.own)
        return grad

    def so_far(self) -> Tensor:
        return self.in_flight.wait() if self.in_flight else torch.zeros_like(self.like, dtype=self.dtype)


class DoubleRing:
    """Rings inside a ring (Gu et al. 2024, LoongTrain): while a block goes around one of them, the next is on its way.

    As many hops as around one ring, and all but outer - 1 of them between neighbours.
    """

    def __init__(self, block: Block, like: Tensor, dtype: torch.dtype, axis: Axis, hops: Iterable[int]) -> None:
        """hops: of the outer ring."""
        self.like, self.dtype = like, dtype
        self.inner_axis, outer_axis = axis.parts
        self.outer = Ring(block, like, dtype, outer_axis, hops)

    def blocks(self) -> Iterator[tuple[int, Block]]:
        size = self.inner_axis.size
        for ring, block in self.outer.blocks():
            self.inner = Ring(block, self.like, self.dtype, self.inner_axis, range(size))
            yield from ((ring * size + place, visiting) for place, visiting in self.inner.blocks())

    def give(self, source: int, given: Given) -> None:
        """The sum that has gone around an inner ring goes on to the next one."""
        ring, place = divmod(source, self.inner_axis.size)
        self.inner.give(place, given)
        if place == (self.inner_axis.rank + 1) % self.inner_axis.size:  # the last that comes by
            self.outer.give(ring, [(OWN, self.inner.own_grad())])

    def own_grad(self) -> Tensor:
        return self.outer.own_grad()


class Rotate:
    """What a rank owns goes around the ring, or around its inner rings and from each to the next (ring.inner)."""

    def __init__(
        self, block: Block, like: Tensor, axis: Axis, options: Options, tiles: Callable[[int, int], list[Tile]]
    ) -> None:
        """like: the gradient of what we own. tiles: of what another rank owns, where each owns so many tokens."""
        self.tiles, dtype = tiles, travelling_dtype(like.dtype, options)

        def look(source: int) -> Any:
            return looks(tiles, source, options)

        if axis.parts is None:
            hops = hooks.hops(axis.size, lambda hop: look(axis.place(-hop)))
            self.ring: Ring | DoubleRing = Ring(block, like, dtype, axis, hops)
            return
        inner, outer = axis.parts

        def look_around(hop: int) -> Any:
            ring = outer.place(-hop)
            return [look(ring * inner.size + place) for place in range(inner.size)]

        hops = hooks.hops(outer.size, look_around)
        self.ring = DoubleRing(block, like, dtype, axis, hops)

    def visits(self) -> Iterator[Visit]:
        for source, block in self.ring.blocks():
            yield Visit(source, block, self.tiles(source, block[0].shape[2]))

    def give(self, visit: Visit, given: Given) -> None:
        self.ring.give(visit.source, given)

    def own_grad(self) -> Tensor:
        return self.ring.own_grad()


def looks(tiles: Callable[[int, int], list[Tile]], source: int, options: Options) -> Any:
    """What tells a visit from others: which tiles there are, or, where tokens are not split by a rule, whose it is."""
    even = options.mask.plain and options.ring.layout != "balanced"
    return tiles(source, SHORT) if even else source


class Gather:
    """All blocks are gathered at once."""

    def __init__(self, local_kv: Tensor, axis: Axis, options: Options) -> None:
        self.local_kv, self.axis, self.options = local_kv, axis, options
        self.grads: Tensor | None = None  # [ranks, 2, B, S_ring, G, K]

    def visits(self) -> Iterator[Visit]:
        blocks = start_all_gather(self.local_kv[None], 0, self.axis).wait()
        for hop in range(self.axis.size):
            source = self.axis.place(-hop)
            tiles = tiles_of(self.axis.rank, source, self.axis.size, self.local_kv.shape[2], self.options)
            yield Visit(source, (blocks[source],), tiles)

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
        yield Visit(here, (self.local_kv,), tiles_of(here, here, self.axis.size, n, self.options))
        arrived = arriving.wait()
        self.grads = torch.zeros_like(arrived, dtype=travelling_dtype(arrived.dtype, self.options))
        tiles = list(tiles_of_others(here, self.axis.size, n, self.options))
        yield Visit(OTHERS, (arrived.permute(2, 1, 0, 3, 4),), tiles)

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
    """In which dK and dV, or dQ, travel: at least fp32, or as what they are gradients of."""
    return dtype if options.ring.grad_dtype == "same" else wide(dtype)


def add(grad: Tensor, given: Given) -> None:
    """Add gradients of some tokens to those of all, [2, B, S_ring, G, K] of k and v or [1, B, S_ring, H, K] of q."""
    for tokens, parts in given:
        for whole, part in zip(grad, parts, strict=True):
            whole[tokens].add_(part)  # += would copy the sum onto itself
