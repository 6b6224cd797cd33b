"""Step times: wall clock on CPU, CUDA events on GPU, and the CPU time that this rank spent."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from conf.measurement import Step


class Stopwatch:
    """Times steps in laps. On CUDA nothing waits for the device until steps() is called, but before each step."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.marks: list[list] = []
        self.cpu_ms: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step; its last lap ends with it."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.marks.append([])
        started = time.process_time()
        self.lap()
        yield
        self.lap()
        self.cpu_ms.append(1000 * (time.process_time() - started))

    def lap(self) -> None:
        if self.on_gpu:
            self.marks[-1].append(torch.cuda.Event(enable_timing=True))
            self.marks[-1][-1].record()
        else:
            self.marks[-1].append(1000 * time.perf_counter())

    def steps(self) -> list[Step]:
        if self.on_gpu:
            torch.cuda.synchronize()
        return [
            Step(
                forward=self.between(marks[0], marks[1]),
                backward=self.between(marks[1], marks[2]),
                optimizer=self.between(marks[2], marks[3]),
                step=self.between(marks[0], marks[3]),
                cpu=cpu,
            )
            for marks, cpu in zip(self.marks, self.cpu_ms, strict=True)
        ]

    def between(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) if self.on_gpu else second - first
