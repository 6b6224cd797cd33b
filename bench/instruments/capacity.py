"""How many cores and how much memory there are, on whatever system this is: Linux, or a laptop's macOS."""

import os

import psutil


def cores() -> int:
    """Those that this process may use; where the system does not tell (macOS), all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Of the machine, whoever has it."""
    return psutil.virtual_memory().total
