"""Step times: wall clock on CPU, CUDA events on GPU, and the CPU time that this rank spent."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from conf.measurement import Step


class Stopwatch:
    """Times steps in named laps. On CUDA nothing but a step's start waits for the device before steps() does."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.marks: list[list[tuple[str, Any]]] = []
        self.asides: list[list[tuple[Any, Any]]] = []
        self.cpu_ms: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, which ends its last lap."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.marks.append([])
        self.asides.append([])
        started = time.process_time()
        yield
        self.lap("")
        self.cpu_ms.append(1000 * (time.process_time() - started))

    def lap(self, name: str) -> None:
        """One begins."""
        self.marks[-1].append((name, self.mark()))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Of a lap, what is waited for copies to and from the host's memory."""
        begun = self.mark()
        yield
        self.asides[-1].append((begun, self.mark()))

    def mark(self) -> Any:
        """Now: of what the device computes, or of the clock."""
        if not self.on_gpu:
            return 1000 * time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def steps(self) -> list[Step]:
        if self.on_gpu:
            torch.cuda.synchronize()
        return [self.summed(*each) for each in zip(self.marks, self.asides, self.cpu_ms, strict=True)]

    def summed(self, marks: list[tuple[str, Any]], asides: list[tuple[Any, Any]], cpu: float) -> Step:
        """Of the laps that have the same name."""
        laps = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        for (name, begun), (_, ended) in pairwise(marks):
            laps[name] += self.between(begun, ended)
        waited = sum(self.between(*aside) for aside in asides)
        return Step(**laps, step=self.between(marks[0][1], marks[-1][1]), cpu=cpu, offload=waited)

    def between(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) if self.on_gpu else second - first
