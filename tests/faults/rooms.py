"""A control group with little memory, inside this process' own, where the kernel and our rights allow one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.inject import LITTLE

MOUNTED = Path("/sys/fs/cgroup")


def own() -> tuple[Path, str]:
    """This process' group, and the file of a group inside that limits its memory: of version 1 or of version 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return MOUNTED / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    return MOUNTED / path.lstrip("/"), "memory.max"


@contextmanager
def little_memory() -> Iterator[Path | None]:
    """None where it cannot be made."""
    try:
        parent, limit = own()
        room = parent / f"faults-{os.getpid()}"
        room.mkdir()
    except OSError:
        yield None
        return
    try:
        yield room if limited(room / limit) else None
    finally:
        room.rmdir()


def limited(file: Path) -> bool:
    """Can it be limited? The controller may be there for other groups alone."""
    try:
        file.write_text(str(LITTLE))
    except OSError:
        return False
    return True
