"""Times: wall clock on CPU, CUDA events on GPU; of steps, also the CPU time that this rank spent."""

import time
from collections.abc import Callable, Iterator, Sequence
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
        self.marks[-1].append((name, mark(self.on_gpu)))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Of a lap, what is waited for copies to and from the host's memory."""
        begun = mark(self.on_gpu)
        yield
        self.asides[-1].append((begun, mark(self.on_gpu)))

    def steps(self) -> list[Step]:
        if self.on_gpu:
            torch.cuda.synchronize()
        return [self.summed(*each) for each in zip(self.marks, self.asides, self.cpu_ms, strict=True)]

    def summed(self, marks: list[tuple[str, Any]], asides: list[tuple[Any, Any]], cpu: float) -> Step:
        """Of the laps that have the same name."""
        laps = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        for (name, begun), (_, ended) in pairwise(marks):
            laps[name] += between(begun, ended)
        waited = sum(between(*aside) for aside in asides)
        return Step(**laps, step=between(marks[0][1], marks[-1][1]), cpu=cpu, offload=waited)


def mark(on_gpu: bool) -> Any:
    """Now, for who gets there: the host, or the GPU when it has done what it was given so far."""
    if not on_gpu:
        return 1000 * time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, second: Any) -> float:
    """Two marks, in milliseconds."""
    return second - first if isinstance(first, float) else first.elapsed_time(second)


def in_turn(runs: Sequence[Callable[[], object]], times: int, warmup: int, device: str) -> list[list[float]]:
    """Microseconds of each of these, every time: all of them once, then all again. On a GPU the host is ahead of it."""
    on_gpu = device == "cuda"
    for run in (run for _ in range(warmup) for run in runs):
        run()
    if on_gpu:
        torch.cuda.synchronize()
    marks = [mark(on_gpu)]
    for run in (run for _ in range(times) for run in runs):
        run()
        marks.append(mark(on_gpu))
    if on_gpu:
        torch.cuda.synchronize()
    us = [1000 * between(*pair) for pair in pairwise(marks)]
    return [us[n :: len(runs)] for n in range(len(runs))]


def repeated(run: Callable[[], object], times: int, warmup: int, device: str) -> list[float]:
    """Microseconds of each time, one right behind the other."""
    return in_turn([run], times, warmup, device)[0]
