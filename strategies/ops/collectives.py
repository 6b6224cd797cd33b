"""The verbs. Each sends what its name says along one axis of the mesh, and its backward sends the opposite.

    verb             forward                                       backward
    copy             the same tensor on every rank (sends nothing) all_reduce
    all_reduce       sum over ranks                                copy
    all_gather       shard along `dim` -> whole                    reduce_scatter
    reduce_scatter   partial sums -> shard of the sum along `dim`  all_gather
    start_all_to_all whole along `split`, shard along `concat`,    start_all_to_all, the other way
                     -> shard along `split`, whole along `concat`
    shift            to the next rank of the ring (no autograd: ring attention writes its own backward)

Along an axis of size 1 nothing is sent. Verbs that can overlap with computation return a Pending.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from strategies.ops.hooks import hooks, meaning
from strategies.ops.mesh import Axis

# torch 2.13 has new names for these two, and 2.11 only the old ones.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective in flight. wait() returns its result and lets go of its buffers."""

    def __init__(self, works: list[dist.Work], buffers: tuple[Tensor, ...], finish: Callable[..., Tensor]) -> None:
        self.works, self.buffers, self.finish = works, buffers, finish

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        result = self.finish(*self.buffers)
        self.works, self.buffers = [], ()
        return result


def here(x: Tensor) -> Pending:
    """Of what is sent along an axis of size 1: it is there."""
    return Pending([], (x,), lambda x: x)


# The plain collectives, without autograd. Along dim 0 chunks are adjacent in memory, so other dims are moved there.


def start_all_gather(x: Tensor, dim: int, axis: Axis) -> Pending:
    """Shard [.., s, ..] -> Pending of the whole [.., size * s, ..] along `dim`."""
    x = x.contiguous()
    chunks = x.new_empty(axis.size, *x.shape)
    work = all_gather_single(chunks.flatten(0, 1), x, axis.group, async_op=True)
    return Pending([work], (chunks, x), lambda chunks, _: chunks.movedim(0, dim).flatten(dim, dim + 1))


def start_reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Pending:
    """Partial sums [.., S, ..] -> Pending of this rank's shard [.., S / size, ..] of the sum along `dim`."""
    chunks = x.unflatten(dim, (axis.size, -1)).movedim(dim, 0).contiguous()
    out = chunks.new_empty(chunks.shape[1:])
    return reduce_scatter_chunks(out, chunks, axis.group)


def reduce_scatter_chunks(out: Tensor, chunks: Tensor, group: dist.ProcessGroup) -> Pending:
    """Sum chunks [size, ...] over the ranks; chunk i of the sum goes to rank i, into `out`.

    On gloo it is an all-to-all and a local sum: its own reduce_scatter is an all-reduce and a slice, which puts
    twice the bytes on the wire and rounds after every addition.
    """
    if hooks.backend_of(group) != "gloo":
        work = reduce_scatter_single(out, chunks.flatten(0, 1), group=group, async_op=True)
        return Pending([work], (out, chunks), lambda out, _: out)
    parts = torch.empty_like(chunks)
    with meaning(kind="reduce_scatter"):
        work = dist.all_to_all_single(parts, chunks, group=group, async_op=True)
    return Pending([work], (out, chunks, parts), lambda out, _, parts: torch.sum(parts, dim=0, out=out))


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """A new tensor: the sum of every rank's x."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.group)
    return total


def shift(x: Tensor, axis: Axis, into: Tensor | None = None) -> Pending:
    """Send x to the next rank along the axis and receive the previous one's: one hop of the ring."""
    arrived = torch.empty_like(x) if into is None else into
    hop = [
        dist.P2POp(dist.isend, x, axis.peer(+1), axis.group),
        dist.P2POp(dist.irecv, arrived, axis.peer(-1), axis.group),
    ]
    return Pending(dist.batch_isend_irecv(hop), (arrived, x), lambda arrived, _: arrived)


def exchange(x: Tensor, leaves: list[int], arrives: list[int], axis: Axis) -> Pending:
    """x [sum(leaves), ..], so many of it to each rank along the axis -> Pending of [sum(arrives), ..]."""
    x = x.contiguous()
    arrived = x.new_empty(sum(arrives), *x.shape[1:])
    work = dist.all_to_all_single(arrived, x, arrives, leaves, axis.group, async_op=True)
    return Pending([work], (arrived, x), lambda arrived, _: arrived)


# The verbs, with autograd.


class Copy(Function):
    """Megatron's f (Shoeybi et al. 2019, figure 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return sum_over(grad, ctx.axis), None


class AllReduce(Function):
    """Megatron's g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return sum_over(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None


class AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return start_all_gather(x, dim, axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return start_reduce_scatter(grad, ctx.dim, ctx.axis).wait(), None, None


class ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return start_reduce_scatter(x, dim, axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return start_all_gather(grad, ctx.dim, ctx.axis).wait(), None, None


class Flight:
    """What both ends of an all-to-all share: the exchange that is in flight between them, in forward or in backward."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def leave(self, x: Tensor, dim: int) -> Tensor:
        """Send one part of x, cut along `dim`, to each rank -> what arrives, [size, ..], not before land()."""
        self.parts = x.unflatten(dim, (self.axis.size, -1)).movedim(dim, 0).contiguous()
        arriving = torch.empty_like(self.parts)
        self.work = dist.all_to_all_single(arriving, self.parts, group=self.axis.group, async_op=True)
        return arriving

    def land(self, arrived: Tensor, dim: int) -> Tensor:
        """Join what has arrived along `dim`."""
        self.work.wait()
        self.parts = self.work = None
        return arrived.movedim(0, dim).flatten(dim, dim + 1)


class Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, flight: Flight) -> Tensor:
        ctx.dim, ctx.flight = dim, flight
        return flight.leave(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.flight.land(grad, ctx.dim), None, None


class Land(Function):
    @staticmethod
    def forward(ctx: Any, arrived: Tensor, dim: int, flight: Flight) -> Tensor:
        ctx.dim, ctx.flight = dim, flight
        return flight.land(arrived, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.flight.leave(grad, ctx.dim), None, None


def copy(x: Tensor, axis: Axis) -> Tensor:
    """x, which every rank has; backward sums the ranks' gradients of it."""
    return x if axis.size == 1 else Copy.apply(x, axis)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """{x} unreduced -> x on every rank."""
    return x if axis.size == 1 else AllReduce.apply(x, axis)


def all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Shard along `dim` -> whole on every rank."""
    return x if axis.size == 1 else AllGather.apply(x, dim, axis)


def reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """{x} unreduced -> this rank's shard along `dim`."""
    return x if axis.size == 1 else ReduceScatter.apply(x, dim, axis)


def start_all_to_all(x: Tensor, split: int, concat: int, axis: Axis) -> Pending:
    """Shard along `concat` and whole along `split` -> Pending of whole along `concat` and shard along `split`.

    Its backward is in flight as long as autograd has other things to do meanwhile.
    """
    if axis.size == 1:
        return here(x)
    flight = Flight(axis)
    arriving = Leave.apply(x, split, flight)
    return Pending([], (arriving,), lambda arrived: Land.apply(arrived, concat, flight))
