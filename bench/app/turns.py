"""Whose turn it is: one command measures in a sweep's folder at a time, and one at a time writes there.

Locks are the kernel's, on files in the folder: they go with the process that holds them, however it ends, and no rank
inherits them. A file system that has none is trusted to have one user.
"""

import fcntl
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conf.files import FileFault
from conf.words import in_a_line


@contextmanager
def turn(folder: Path, shared: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until it is this command's turn, and say for whom; others may share it that need no quiet machine either."""
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with opened(folder / ".turn.lock") as lock:
        if not taken(lock, how | fcntl.LOCK_NB):
            holder = os.fsdecode(os.pread(lock, 2000, 0)) or "another command"
            say(in_a_line(f"{folder}: it is the turn of {holder}; this command waits, and then takes what is left"))
            taken(lock, how)
        sign(lock, f"process {os.getpid()} ({shlex.join(['python', '-m', 'bench', *sys.argv[1:]])})")
        try:
            yield
        finally:
            sign(lock, "")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold a folder's files for the moment in which they are replaced."""
    with opened(folder / ".save.lock") as lock:
        taken(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def opened(file: Path) -> Iterator[int]:
    """A file to lock; Python's are closed in whatever is executed. It stays: who waits for it has it open."""
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise FileFault(f"{file}: {error.strerror}") from None
    try:
        yield lock
    finally:
        os.close(lock)


def taken(lock: int, how: int) -> bool:
    """Is it this process' now? Without LOCK_NB it is, sooner or later."""
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def sign(lock: int, holder: str) -> None:
    """Leave a name, for those who wait."""
    with suppress(OSError):  # the disk is full: the lock is held all the same
        os.ftruncate(lock, 0)
        os.pwrite(lock, os.fsencode(holder), 0)
