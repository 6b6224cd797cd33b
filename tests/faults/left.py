"""What the processes of one folder have left on this machine: nothing, if all is well.

A process is one of them if its environment says so: that holds for whatever they start, and whoever its parent is now.
"""

import os
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from tests.faults.inject import FOLDER

SHARED_MEMORY = Path("/dev/shm")
GOING_S = 30  # for processes that are ending to be gone, on the busiest of machines
NOTHING = dict.fromkeys(("processes", "ports", "shared memory", "temporary files"), 0)


def processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(FOLDER) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ports_of(processes: list[psutil.Process]) -> int:
    """On how many ports they can be reached."""
    count = 0
    for process in processes:
        with suppress(psutil.Error):
            count += sum(c.status == psutil.CONN_LISTEN for c in process.net_connections(kind="inet"))
    return count


def shared_memory() -> set[Path]:
    """Of the whole machine: a file does not say whose it is, so beside other tests none is looked at."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ and SHARED_MEMORY.is_dir()
    return set(SHARED_MEMORY.iterdir()) if alone else set()


def in_use(file: Path) -> bool:
    """Has any process on this machine it open, or in its memory?"""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(file) in (process / "maps").read_text():
                return True
            if any(opened.readlink() == file for opened in (process / "fd").iterdir()):
                return True
    return False


def temporary(folder: Path) -> list[Path]:
    """What is there, but torch's cache of compiled kernels, which is for the next process, and torchrun's own logs."""
    torchs = ("torchinductor_", "torchelastic_")
    return [path for path in (folder / "tmp").iterdir() if not path.name.startswith(torchs)]


def left(folder: Path, before: set[Path]) -> dict[str, int]:
    """How many of each there are; before: the shared memory of others, who may come and go."""
    deadline = time.monotonic() + GOING_S
    while time.monotonic() < deadline and (there := processes_of(folder)):
        time.sleep(0.1)
    abandoned = [file for file in shared_memory() - before if file.exists() and not in_use(file)]
    counts = Counter(NOTHING)
    counts["processes"], counts["ports"] = len(there), ports_of(there)
    counts["shared memory"] = sum(file.exists() for file in abandoned)
    counts["temporary files"] = len(temporary(folder))
    return dict(counts)
