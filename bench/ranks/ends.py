"""How a rank ended that could not say it, and where one is that does not end."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import psutil

from bench.ranks.task import Failure

HEAD = "Stack (most recent call first)"  # of every stack that faulthandler writes
ANSWER_S = 5.0  # for a stack, of a rank that is asked for it
SHORT_OF_MEMORY = ("bad_alloc", "can't allocate memory", "annot allocate memory", "not enough memory")


def stack_file(folder: str, rank: int) -> Path:
    """Where a rank writes its stack when it is asked."""
    return Path(folder, f"stack{rank}")


def words_file(folder: str, rank: int) -> Path:
    """Where a rank's stderr goes, and its stack when it dies of a signal that can be caught."""
    return Path(folder, f"words{rank}")


def read(file: Path) -> str:
    try:
        return file.read_text(errors="backslashreplace")
    except OSError:
        return ""


def last_words(exitcode: int | None, words: str, killed_for_memory: bool) -> Failure:
    """What is to be said of a rank that could not say it."""
    before, _, stack = words.partition("Fatal Python error")
    said = " ".join(before.split())[-300:]
    if exitcode == -signal.SIGKILL and killed_for_memory:
        return Failure("killed by the kernel, which was out of memory", oom=True)
    if exitcode is not None and exitcode < 0:
        message = f"the process was killed by {signal.Signals(-exitcode).name}"
    else:
        message = f"the process ended with exit code {exitcode} and no message"
    if where := place(of_who_died(stack)):
        message += f" in {where}"
    if said:
        message += f": {said}"
    return Failure(message, oom=any(short in said for short in SHORT_OF_MEMORY), traceback=words)


def of_who_died(stacks: str) -> str:
    """Of all threads' stacks the one of the thread that died; where that has none, of the first, which comes last."""
    threads = [each for each in stacks.split("\n\n") if "most recent call first" in each]
    return next((each for each in threads if "Current thread" in each), threads[-1] if threads else "")


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory: in this control group, or since it booted.

    Linux tells; elsewhere none are known of, and a rank that was killed is said to have been killed.
    """
    return counted(memory_events() or Path("/proc/vmstat"), "oom_kill")


@cache
def memory_events() -> Path | None:
    """Of the control group that this process is in; None where it is not told."""
    for line in read(Path("/proc/self/cgroup")).splitlines():
        number, _, path = line.partition("::")
        file = Path("/sys/fs/cgroup", path.lstrip("/"), "memory.events")
        if number == "0" and file.exists():
            return file
    return None


def counted(file: Path, name: str) -> int:
    lines = (line.split() for line in read(file).splitlines())
    return next((int(words[1]) for words in lines if words and words[0] == name), 0)


def where_ranks_are(pids: Mapping[int, int], starting: Iterable[int], folder: str) -> str:
    """Ask every rank that can answer for its stack, and say which strategy line and which collective each is in.

    A rank that was stopped is let go on first. It is asked until it answers: a thread that has no Python stack may be
    the one to hear it.
    """
    asked = {rank: pid for rank, pid in pids.items() if rank not in starting}
    stopped = {rank for rank, pid in asked.items() if state(pid) == psutil.STATUS_STOPPED}
    for rank in stopped:
        blow(asked[rank], signal.SIGCONT)
    until = time.monotonic() + ANSWER_S
    while waited_for := [pid for rank, pid in asked.items() if is_alive(pid) and not answer(rank, folder)]:
        if time.monotonic() > until:
            break
        for pid in waited_for:
            blow(pid, signal.SIGUSR1)
        time.sleep(0.1)
    places = []
    for rank, pid in pids.items():
        if rank in starting:
            places.append(f"rank {rank} is starting")
        elif where := place(answer(rank, folder)):
            places.append(f"rank {rank} {'was stopped' if rank in stopped else 'is'} in {where}")
        else:
            places.append(f"rank {rank} {'does not answer' if is_alive(pid) else 'has ended'}")
    return ", ".join(places)


def answer(rank: int, folder: str) -> str:
    """Its stack, as it wrote it first."""
    return read(stack_file(folder, rank)).removeprefix(HEAD).partition(HEAD)[0]


def blow(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def is_alive(pid: int) -> bool:
    return state(pid) not in ("", psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def state(pid: int) -> str:
    """What a process does, as psutil.STATUS_* call it; nothing where there is none."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return ""


def place(stack: str) -> str:
    """The innermost call into torch.distributed and the innermost line of a strategy, of a stack innermost first."""
    frames = re.findall(r'File "(.+?)", line (\d+) in (\S+)', stack)
    if not frames:
        return ""
    call = next((name for file, _, name in reversed(frames) if "distributed_c10d" in file), frames[0][2])
    line = next((f"{f[f.rindex('strategies/') :]}:{n}" for f, n, _ in frames if "/strategies/" in f), None)
    return f"{call} ({line})" if line else f"{call} ({os.path.basename(frames[0][0])}:{frames[0][1]})"
