"""One process that stands for any rank of any number: its collectives return at once.

torch's fake process group is the ground: its ops go through the dispatcher like any other's, so every instrument sees
them. Some of its habits are mended here for real tensors: a gather repeats this rank's shard in one copy and not in one
per rank, and a receive gets what was sent last instead of memory as it was found, which may hold NaN; so does an
exchange in which more arrives than leaves. What arrives has the right size and sane values, but is not what others
would have sent. Strategies run on it unchanged.
"""

import warnings
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, library
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.instruments.ledger import work_of
from strategies.ops.hooks import hooks

in_flight: list[Tensor] = []  # sent and not yet received
mended: list[library.Library] = []
numbers = count(1)


def stand_for(rank: int, world_size: int, device: str) -> None:
    """Make this process rank `rank` of `world_size`, in place of init_process_group."""
    if not mended:
        mended.append(library.Library("c10d", "IMPL"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it replaces kernels is what it is for
            for key in ("CPU", "CUDA"):
                for op, function in MENDED.items():
                    mended[0].impl(op, function, key, allow_override=True)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    hooks.backend_of = lambda group: "nccl" if device == "cuda" else "gloo"


def done() -> torch.ScriptObject:
    """A work that is done, with a number of its own by which a waiting one can be told."""
    future: torch.futures.Future[int] = torch.futures.Future()
    future.set_result(next(numbers))
    return _create_work_from_future(future).boxed()


def number_of(work: Any) -> int | None:
    """Of a work as done() makes it, or of what a collective that is dispatched returns."""
    work = work_of(work)
    return work.get_future().value() if isinstance(work, dist.Work) else None


def gather(
    output: Tensor, shard: Tensor, group: Any, async_op: bool = True, timeout: int = -1
) -> tuple[Tensor, torch.ScriptObject]:
    ranks = output.numel() // shard.numel() if shard.numel() else 1
    output.view(ranks, *shard.shape).copy_(shard.expand(ranks, *shard.shape))
    return output, done()


def swap(
    output: Tensor,
    given: Tensor,
    group: Any,
    arrives: list[int],
    leaves: list[int],
    async_op: bool = True,
    timeout: int = -1,
) -> torch.ScriptObject:
    output, given = output.view(-1), given.view(-1)
    both = min(output.numel(), given.numel())
    output[:both].copy_(given[:both])
    output[both:].zero_()
    return done()


def send(tensors: list[Tensor], group: Any, destination: int, tag: int) -> torch.ScriptObject:
    in_flight.append(tensors[0])
    return done()


def receive(tensors: list[Tensor], group: Any, source: int, tag: int) -> torch.ScriptObject:
    tensors[0].copy_(in_flight.pop())
    return done()


MENDED = {"_allgather_base_": gather, "alltoall_base_": swap, "send": send, "recv_": receive}
