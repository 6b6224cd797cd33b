"""workload=collectives: every kind of collective along every axis of the strategy's mesh, by size, as nccl-tests does.

Sizes are nccl-tests': what an all_gather gives, what a reduce_scatter takes, the buffer otherwise. Runs follow each
other without a barrier, for a collective waits for its slowest rank by itself. On a CPU each comes behind an MLP's
products, as in a step: its threads must first be let run where there was computing, and that can take ten times as long
as the collective. What is computed is not in its time.

What is timed is what is dispatched: on gloo, whose reduce_scatter is an exchange and a sum
(strategies/ops/collectives.py), the exchange, for the sum is an operation of its own.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F

from bench.instruments.timing import in_turn
from conf import tiers
from conf.clock import COLLECTIVES
from conf.keys import Config
from conf.measurement import Timed, Work
from conf.meshes import Line
from strategies.base import Strategy
from strategies.ops.collectives import all_gather_single, reduce_scatter_single, shift
from strategies.ops.hooks import hooks
from strategies.ops.mesh import Axis

SIZES = [2**n for n in range(10, 27)]  # 1 KiB to 64 MiB
OFTEN = 2**20  # bytes up to which each is timed as often as was asked; what is larger, on a CPU, less often
LEAST = 3  # times


def measured(config: Config, strategy: Strategy) -> Iterator[Timed]:
    """A collective after the other; all ranks go through the same, their axes in the same order."""
    dtype = strategy.options.compute_dtype
    before = [mlp(config, dtype)] if config.device == "cpu" else []
    for axis in axes(strategy):
        for kind in COLLECTIVES:
            for size in sizes(axis, dtype):
                run = of_kind(kind, size, axis, dtype, strategy.mesh.device)
                *_, us = in_turn([*before, run], times(config, size), config.warmup, config.device)
                name = str(dtype).removeprefix("torch.")
                yield Timed(Work(kind, name, size, axis=axis.name, ranks=axis.size, hosts=hosts(config, axis)), us)


def mlp(config: Config, dtype: torch.dtype) -> Callable[[], object]:
    """The products of a block's MLP on seq_len tokens: what is computed between two collectives."""
    dim, ffn_dim = config.model.dim, config.model.ffn_dim
    x, up, down = (torch.randn(shape, dtype=dtype) for shape in ((config.seq_len, dim), (ffn_dim, dim), (dim, ffn_dim)))
    return lambda: F.linear(F.linear(x, up) * F.linear(x, up), down)


def axes(strategy: Strategy) -> list[Axis]:
    """Along which there is somebody to talk to; `zero` only where its groups are no other axis'."""
    mesh = strategy.mesh
    found = {(axis.size, axis.stride): axis for axis in (mesh.zero, mesh.dp, mesh.ring, mesh.ulysses, mesh.tp)}
    return [axis for axis in found.values() if axis.size > 1]


def sizes(axis: Axis, dtype: torch.dtype) -> list[int]:
    """Those of which every rank can have an equal part."""
    whole = axis.size * dtype.itemsize
    return list(dict.fromkeys(-(-size // whole) * whole for size in SIZES))


def times(config: Config, size: int) -> int:
    return config.steps if config.device == "cuda" else min(config.steps, max(LEAST, config.steps * OFTEN // size))


def hosts(config: Config, axis: Axis) -> int:
    """Among how many hosts the ranks of a group are."""
    each = tiers.ranks_per_host(config)
    return len({rank // each for rank in Line(axis.size, axis.stride).through(dist.get_rank())})


def of_kind(kind: str, size: int, axis: Axis, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """From launch to wait, as the strategies' verbs use them."""
    group = axis.group
    whole = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
    other, part = torch.empty_like(whole), torch.zeros(len(whole) // axis.size, dtype=dtype, device=device)
    if kind == "p2p":
        return lambda: shift(whole, axis).wait()

    def start() -> dist.Work:
        if kind == "all_gather":
            return all_gather_single(whole, part, group, async_op=True)
        if kind == "all_reduce":
            return dist.all_reduce(whole, group=group, async_op=True)
        if kind == "reduce_scatter" and hooks.backend_of(group) != "gloo":
            return reduce_scatter_single(part, whole, group=group, async_op=True)
        return dist.all_to_all_single(other, whole, group=group, async_op=True)

    return lambda: start().wait()
