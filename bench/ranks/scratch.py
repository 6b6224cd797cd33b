"""The folder for what lives as long as this process: rendezvous files, stacks, last words, the ranks' server's socket.

It is locked while its process lives. What was killed before it could clean up is cleaned up by the next that starts.
"""

import fcntl
import os
import shutil
import tempfile
import time
from functools import cache
from multiprocessing import current_process, util
from pathlib import Path

PREFIX = "bench-"
LONGEST = 70  # characters of a folder for it: the path of a socket in it has room for a hundred


@cache
def scratch() -> Path:
    """This process' folder, made when it is first asked for and removed when the process ends."""
    remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place()))
    hold = lock(folder)
    # After multiprocessing has removed its own (at priority -100), which lies inside from now on.
    util.Finalize(None, remove, (folder, hold), exitpriority=-101)
    current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]
    return folder


def place() -> str:
    """Where temporary files go, unless that is too long for the path of a socket."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= LONGEST else "/tmp"


def remove(folder: Path, hold: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if hold is not None:
        os.close(hold)


def lock(folder: Path) -> int | None:
    """Take the folder for this process, as long as it lives: an open file, or None if another lives in it."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held


def remove_abandoned() -> None:
    """Folders of this user in which no process lives. A folder that was made this moment may not be locked yet."""
    for folder in Path(place()).glob(f"{PREFIX}*"):
        try:
            known = folder.lstat()
            if not folder.is_dir() or folder.is_symlink() or known.st_uid != os.getuid() or young(known.st_mtime):
                continue
            hold = lock(folder)
        except OSError:
            continue
        if hold is not None:
            remove(folder, hold)


def young(changed_at: float) -> bool:
    return time.time() - changed_at < 1
