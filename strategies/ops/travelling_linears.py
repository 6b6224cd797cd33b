"""Linears whose weights travel: tokens stay, and shards of the matrices come by around a ring of ranks (TSP).

Over P ranks forward makes P - 1 hops of one buffer that holds a rank's shards of all matrices of a pass; while one is
multiplied the next is on its way, so two are there at a time. Backward makes P - 1 hops of it again, and P - 1 hops of
the gradients, a hop behind: they start on the rank after the owner, because the owner adds its own part at the end.

A matrix need not divide into equal shards: the buffer has room for the largest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from strategies.ops.collectives import Pending, shift
from strategies.ops.hooks import hooks, meaning
from strategies.ops.kernels import wide
from strategies.ops.mesh import Axis
from strategies.ops.options import Options


class Visit(NamedTuple):
    """A rank's shards of the matrices, and which of their rows or columns these are."""

    source: int
    weights: list[Tensor]
    spans: list[slice]


class Travel:
    """Shards of matrices that are cut along `dim`, where they are `sizes` long in all, on their way around the ring."""

    def __init__(self, weights: Sequence[Tensor], dim: int, sizes: Sequence[int], axis: Axis, options: Options) -> None:
        self.weights, self.dim, self.sizes, self.axis, self.options = weights, dim, sizes, axis, options
        across = [weight.shape[1 - dim] for weight in weights]
        self.room = sum(-(-size // axis.size) * other for size, other in zip(sizes, across, strict=True))
        self.in_flight: Pending | None = None  # the gradients of the shards that visit next, as far as others have them

    def spans(self, source: int) -> list[slice]:
        of = replace(self.axis, rank=source)
        return [slice(*of.span(size)) for size in self.sizes]

    def shards(self, buffer: Tensor, source: int) -> list[Tensor]:
        """The parts of a buffer that holds a rank's shards."""
        views, start = [], 0
        for weight, span in zip(self.weights, self.spans(source), strict=True):
            shape = list(weight.shape)
            shape[self.dim] = span.stop - span.start
            views.append(buffer[start : start + shape[0] * shape[1]].view(shape))
            start += views[-1].numel()
        return views

    def visits(self) -> Iterator[Visit]:
        """Of every rank of the ring, our own shards first, the next hop in flight from one buffer to the other."""
        here, other = (self.weights[0].new_empty(self.room) for _ in range(2))
        for shard, weight in zip(self.shards(here, self.axis.rank), self.weights, strict=True):
            shard.copy_(weight)
        for hop in hooks.hops(self.axis.size, self.like):
            source = self.axis.place(-hop)
            arriving = self.sent(here, other) if hop + 1 < self.axis.size else None
            yield Visit(source, self.shards(here, source), self.spans(source))
            if arriving:
                here, other = arriving.wait(), here

    def like(self, hop: int) -> tuple:
        """What decides what is computed in a hop: is it our own shards', and how large are they?"""
        spans = self.spans(self.axis.place(-hop))
        return hop == 0, [span.stop - span.start for span in spans]

    def sent(self, buffer: Tensor, into: Tensor | None = None) -> Pending:
        with meaning(weights=True):
            return shift(buffer, self.axis, into)

    def give(self, visit: Visit, parts: Sequence[Tensor]) -> None:
        """Our part of the gradients of the shards that are visiting."""
        dtype = self.options.gradients_in
        grads = self.in_flight.wait() if self.in_flight else self.weights[0].new_zeros(self.room, dtype=dtype)
        self.add(grads, visit.source, parts)
        self.in_flight = self.sent(grads)

    def own_grads(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Those of our own shards, once all others have added their parts and we have ours."""
        assert self.in_flight is not None
        return self.add(self.in_flight.wait(), self.axis.rank, parts)

    def add(self, grads: Tensor, source: int, parts: Sequence[Tensor]) -> list[Tensor]:
        shards = self.shards(grads, source)
        for shard, part in zip(shards, parts, strict=True):
            shard.add_(part)
        return shards


class ColumnLinears(Function):
    """y_i = x W_i^T of several W_i whose rows come by, and with them columns of the y_i; x alone is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, options: Options, sizes: list[int], *weights: Tensor) -> Any:
        ctx.axis, ctx.options, ctx.sizes = axis, options, sizes
        ctx.save_for_backward(x, *weights)
        tokens = x.flatten(0, -2)
        ys = [x.new_empty(*x.shape[:-1], size) for size in sizes]
        for visit in Travel(weights, 0, sizes, axis, options).visits():
            for y, weight, rows in zip(ys, visit.weights, visit.spans, strict=True):
                torch.mm(tokens, weight.T, out=y.flatten(0, -2)[:, rows])
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        tokens, of_ys = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        travel = Travel(weights, 0, ctx.sizes, ctx.axis, ctx.options)

        def of_weights(spans: list[slice]) -> list[Tensor]:
            return [grad[:, rows].T @ tokens for grad, rows in zip(of_ys, spans, strict=True)]

        of_x = torch.zeros_like(tokens, dtype=wide(x.dtype))
        for visit in travel.visits():
            parts = [grad[:, rows] for grad, rows in zip(of_ys, visit.spans, strict=True)]
            of_visit = parts[0] @ visit.weights[0]  # of all matrices together: of_x is large, and is read and written
            for part, weight in zip(parts[1:], visit.weights[1:], strict=True):
                torch.addmm(of_visit, part, weight, out=of_visit)
            of_x.add_(of_visit)
            if visit.source != ctx.axis.rank:
                travel.give(visit, of_weights(visit.spans))
        own = of_weights(travel.spans(ctx.axis.rank))  # beside the last hop of their gradients
        return of_x.to(x.dtype).view_as(x), None, None, None, *travel.own_grads(own)


class Kept(Function):
    """The first half of a row linear: keeps x and this rank's columns of W, and knows both gradients.

    It is a node of its own because a checkpoint that runs again stops once everything is kept: here, before any hop.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, travel: "RowTravel") -> Tensor:
        ctx.travel = travel
        ctx.save_for_backward(x, weight)
        return x.new_empty(0)  # stands for both

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return *ctx.travel.backward(*ctx.saved_tensors), None


class Summed(Function):
    """The second half: y = x W^T, the sum of what each rank's columns add, in at least fp32."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, travel: "RowTravel", x: Tensor, weight: Tensor) -> Tensor:
        ctx.travel = travel
        return travel.forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.travel.grad = grad
        return grad.new_empty(0), None, None, None


@dataclass
class RowTravel:
    """What both halves share."""

    axis: Axis
    options: Options
    grad: Tensor | None = None  # of y

    def travel(self, x: Tensor, weight: Tensor) -> Travel:
        return Travel([weight], 1, [x.shape[-1]], self.axis, self.options)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        y = tokens.new_zeros(len(tokens), weight.shape[0], dtype=wide(x.dtype))
        for visit in self.travel(x, weight).visits():
            y.add_(tokens[:, visit.spans[0]] @ visit.weights[0].T)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def backward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        assert self.grad is not None
        tokens, of_y, self.grad = x.flatten(0, -2), self.grad.flatten(0, -2), None
        travel = self.travel(x, weight)
        of_x = torch.empty_like(tokens)
        for visit in travel.visits():
            (columns,) = visit.spans
            torch.mm(of_y, visit.weights[0], out=of_x[:, columns])
            if visit.source != self.axis.rank:
                travel.give(visit, [of_y.T @ tokens[:, columns]])
        own = of_y.T @ tokens[:, travel.spans(self.axis.rank)[0]]  # beside the last hop of its gradient
        return of_x.view_as(x), *travel.own_grads([own])


def column_linears(x: Tensor, linears: list[nn.Linear], axis: Axis, options: Options) -> tuple[Tensor, ...]:
    """x [B, S_ring, in] -> for each linear, of which each rank has rows, [B, S_ring, out]."""
    if axis.size == 1:
        return tuple(linear(x) for linear in linears)
    sizes = [linear.out_features for linear in linears]
    return ColumnLinears.apply(x, axis, options, sizes, *(linear.weight for linear in linears))


def row_linear(x: Tensor, linear: nn.Linear, axis: Axis, options: Options) -> Tensor:
    """x [B, S_ring, in] -> [B, S_ring, out], of a linear of which each rank has columns."""
    if axis.size == 1:
        return linear(x)
    travel = RowTravel(axis, options)
    return Summed.apply(Kept.apply(x, linear.weight, travel), travel, x.detach(), linear.weight.detach())
