"""python -m tests.faults.faulty ...: `python -m bench ...`, of which some ranks are faulty (inject.py)."""

import os
import subprocess
import sys

from bench.__main__ import main
from bench.ranks import launch
from tests.faults.inject import rank_main


def speak_through_another() -> None:
    """What is said is said by a process of its own, even if this one may write no file any more."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE).stdin as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (open as long as the process)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    launch.rank_main = rank_main
    speak_through_another()
    main()
