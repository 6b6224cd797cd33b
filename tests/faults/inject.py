"""What is wrong with a rank, in its own process: around the worker, of which nothing is changed.

The folder that $FAULTS names holds the plan, and what ranks leave there for the campaign to see.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_AS, setrlimit
from typing import Any

import psutil

from bench.ranks.task import Meeting, Task
from tests.faults.plan import Fault, Sweep, named

FOLDER = "FAULTS"  # the variable of the environment by which a sweep's processes are known, too
ROOM = "FAULTS_ROOM"  # a control group with little memory, where there is one
ENDLESS = 10**6
LITTLE = 256 * 2**20


class Plan:
    """The faults of a sweep on disk, and beside them which configurations began, and which faults struck."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, sweep: Sweep) -> None:
        faults = {configuration: asdict(fault) for configuration, fault in sweep.faults.items()}
        (self.folder / "plan.json").write_text(json.dumps(faults))

    def read(self) -> dict[str, Fault]:
        found = json.loads((self.folder / "plan.json").read_text())
        return {configuration: Fault(**fault) for configuration, fault in found.items()}

    def begin(self, configuration: str) -> None:
        """A rank does."""
        with open(self.folder / "began", "a") as began:
            began.write(f"{time.time()} {configuration}\n")

    def next_after(self, moment: float) -> float | None:
        """When the first rank after that moment began."""
        lines = (self.folder / "began").read_text().splitlines() if (self.folder / "began").exists() else []
        return min((when for line in lines if (when := float(line.split()[0])) > moment), default=None)

    def mark(self, word: str, configuration: str) -> None:
        """It is reached, or struck: when, and in which process; whole as soon as it is there."""
        file = self.folder / f"{word}.{configuration}"
        before = file.with_name(f".{file.name}.{os.getpid()}")
        before.write_text(f"{time.time()} {os.getpid()}")
        before.rename(file)

    def marked(self, word: str, configuration: str) -> tuple[float, int] | None:
        try:
            when, pid = (self.folder / f"{word}.{configuration}").read_text().split()
        except FileNotFoundError:
            return None
        return float(when), int(pid)


def rank_main(rank: int, task: Task, meeting: Meeting, folder: str, pipe: Connection) -> None:
    """The process of one rank, in the place of bench.ranks.launch.rank_main."""
    from bench.ranks import worker

    plan, config = Plan(Path(os.environ[FOLDER])), task.config
    configuration = named(config.strategy.name, config.seed, config.timeout_s)
    plan.begin(configuration)
    fault = plan.read().get(configuration)
    if fault is not None and plan.marked("struck", configuration) is None:
        if fault.outside:
            task = replace(task, config=replace(config, steps=ENDLESS))
        if fault.rank == rank:
            Faulty(fault, plan, configuration, pipe).arm(worker)
    worker.serve(rank, task, meeting, folder, pipe)


class Faulty:
    """This rank is struck by a fault when its moment comes, or says that it has come, for who strikes from outside."""

    def __init__(self, fault: Fault, plan: Plan, configuration: str, pipe: Connection) -> None:
        self.fault, self.plan, self.configuration, self.pipe = fault, plan, configuration, pipe
        self.step = -1

    def arm(self, worker: Any) -> None:
        join, build = worker.join, worker.build

        def joining(*arguments: Any) -> None:
            self.at("join")
            join(*arguments)

        def building(*arguments: Any) -> Any:
            self.at("build")
            workload, batch_of = build(*arguments)
            for phase in ("forward", "backward", "update"):
                setattr(workload, phase, self.phase(phase, getattr(workload, phase)))

            def batch_of_step(step: int) -> Any:
                self.step = step
                if self.is_now("barrier"):
                    self.skip(worker.dist)
                return batch_of(step)

            return workload, batch_of_step

        worker.join, worker.build = joining, building

    def phase(self, phase: str, inner: Callable) -> Callable:
        def outer(*arguments: Any, **named: Any) -> Any:
            if self.fault.kind == "wrong shape" and self.is_now(phase):
                self.plan.mark("struck", self.configuration)
                with halved():
                    return inner(*arguments, **named)
            self.at(phase)
            return inner(*arguments, **named)

        return outer

    def is_now(self, phase: str) -> bool:
        return phase == self.fault.phase and self.step in (-1, self.fault.step)

    def at(self, phase: str) -> None:
        if self.is_now(phase):
            self.plan.mark("reached" if self.fault.outside else "struck", self.configuration)
            if not self.fault.outside:
                self.strike(self.fault.kind)

    def skip(self, dist: Any) -> None:
        """The barrier before this step."""
        barrier = dist.barrier

        def skipped() -> None:
            dist.barrier = barrier

        self.plan.mark("struck", self.configuration)
        dist.barrier = skipped

    def strike(self, kind: str) -> None:
        if kind in signal.Signals.__members__:
            os.kill(os.getpid(), signal.Signals[kind])
        elif kind == "raise":
            raise RuntimeError("this rank is faulty")
        elif kind == "sys.exit(3)":
            sys.exit(3)
        elif kind.startswith("os._exit"):
            os._exit(int(kind[-2]))
        elif kind == "closed pipe":
            self.pipe.close()
        elif kind == "memory, RLIMIT_AS":
            setrlimit(RLIMIT_AS, (psutil.Process().memory_info().vms + LITTLE, RLIM_INFINITY))
            eat()
        elif kind == "memory, cgroup":
            Path(os.environ[ROOM], "cgroup.procs").write_text(str(os.getpid()))
            eat()


def eat() -> None:
    """Eight times what is left."""
    import torch

    blocks = []
    for _ in range(64):
        blocks.append(torch.ones(LITTLE // 32))


def halved() -> Any:
    """All that is sent inside is half of what it should be."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class Halved(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            if function.namespace == "c10d":
                arguments = tree_map_only(Tensor, lambda t: t.flatten()[: t.numel() // 2], arguments)
            return function(*arguments, **(named or {}))

    return Halved()
