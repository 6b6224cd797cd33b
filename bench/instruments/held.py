"""Bytes by step, as the device has them: of steps that are timed, so nothing but their ends is looked at."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


class Held:
    """by_step: of each, what CUDA's allocator had given out at most; on a CPU, what this process has resident after it.

    allocated, reserved: at most, in all steps and between them, by CUDA's allocator.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.by_step: list[int] = []
        self.allocated = self.reserved = 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def step(self) -> Iterator[None]:
        self.look()
        yield
        self.by_step.append(self.look())

    def look(self) -> int:
        """At most since it was looked at last."""
        if not self.on_gpu:
            return psutil.Process().memory_info().rss
        most = torch.cuda.max_memory_allocated()
        self.allocated = max(self.allocated, most)
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        return most
