"""Run by torchrun, two ranks on each of two hosts: bytes on the cable beside those that are said to leave a host."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from bench.instruments.step import run_step
from conf.keys import Config, LaunchConfig
from conf.measurement import Entry, Peak, Rank
from conf.meshes import Line
from conf.tiers import to_other_hosts
from strategies.ops import collectives
from strategies.ops.mesh import Axis, axis_of
from tests import instruments
from tests.cases import Case, config_of
from tests.hosts import counters

CASES = [
    Case("usp", ulysses=2, ring=2),
    Case("usp", ulysses=2, ring=2, placement="ring_inner"),
    Case("tp_sp", dp=2, tp=2),
    Case("tp_sp", dp=2, tp=2, placement="tp_outer"),
    Case("tp", dp=2, tp=2, placement="tp_outer"),
]
SIZES = {"dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 512, "vocab_size": 256}
BATCH, SEQ_LEN = 2, 512
RANKS, TIMES = 4, 3


def config(case: Case) -> Config:
    return replace(config_of(case, SIZES, BATCH, SEQ_LEN), launch=LaunchConfig(ranks_per_host=2))


def sent_by_host() -> int:
    return int(counters(Path("/proc/net/dev").read_text())[8])


def on_cable(work: Callable[[], object]) -> float:
    """Bytes that leave this host each time that all ranks do this."""
    dist.barrier()
    before = sent_by_host()
    dist.barrier()
    for _ in range(TIMES):
        work()
    dist.barrier()
    after = sent_by_host()
    dist.barrier()
    return (after - before) / TIMES


def compared(what: str, chosen: Config, comm: list[Entry], work: Callable[[], object]) -> dict:
    """Of each host, what is said to leave it and what does."""
    rank = Rank(comm, 0, Peak(), 0, None, "gloo", "", dist.get_rank())
    found: list = [None] * RANKS
    dist.all_gather_object(found, (to_other_hosts(chosen, rank), on_cable(work)))
    said, counted = zip(*found, strict=True)
    return {"what": what, "said": [sum(said[:2]), sum(said[2:])], "counted": counted[::2]}


def of_a_step(case: Case) -> dict:
    training, batches = instruments.train(case, SIZES, BATCH, SEQ_LEN)
    comm = instruments.observed(training, batches).comm

    def step() -> None:
        run_step(training, batches)

    return compared(str(case), config(case), comm, step)


def of_each_kind(axis: Axis) -> list[dict]:
    """Of a collective of all ranks, whose larger side is `size` bytes."""
    size, part = 4 << 20, torch.zeros(1 << 18)
    whole = part.repeat(RANKS)
    once = size * (RANKS - 1) / RANKS
    kinds: dict[str, tuple[float, Callable[[], object]]] = {
        "all_gather": (once, lambda: collectives.start_all_gather(part, 0, axis).wait()),
        "reduce_scatter": (once, lambda: collectives.start_reduce_scatter(whole, 0, axis).wait()),
        "all_reduce": (2 * once, lambda: collectives.sum_over(whole, axis)),
        "all_to_all": (once, lambda: collectives.start_all_to_all(whole.view(RANKS, 1, -1), 0, 1, axis).wait()),
        "p2p": (size, lambda: collectives.shift(whole, axis).wait()),
    }
    return [
        compared(kind, config(CASES[0]), [Entry("", kind, "world", RANKS, "", "", False, 1, size, sent)], work)
        for kind, (sent, work) in kinds.items()
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    lines = [*of_each_kind(axis_of("cpu", "world", Line(RANKS, 1))), *map(of_a_step, CASES)]
    if dist.get_rank() == 0:
        print(json.dumps(lines))
    dist.destroy_process_group()
