"""Start the ranks of one configuration on this machine, wait for them, and see that none is left behind.

Ranks are forked from a server that has torch and this project imported already, so a configuration starts in
milliseconds; they are fresh processes all the same, so nothing of one configuration reaches the next.
"""

import multiprocessing as mp
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType

from bench.ranks import ends
from bench.ranks.scratch import scratch
from bench.ranks.task import Failure, Meeting, Outcome, Ready, Task
from bench.ranks.unlike import turns
from conf.measurement import Rank

GRACE_S = 1.0  # between the first sign of a failure and the verdict: time for the rank that began it to be heard
START_S = 300.0  # for a process to run at all, on the busiest of machines
KINETO = "USDT:"  # how a line of the profiler begins that tells nothing but its state
LISTEN_S = 0.2  # between two looks at what is not a rank of ours

Progress = Callable[[str], None]
interrupted = threading.Event()  # the sweep is to end: no rank is waited for any more


class Interrupted(KeyboardInterrupt):
    """The process was asked to end, by a signal."""


def start_server() -> None:
    """Start the server that ranks are forked from, if it is not up; it imports torch while the parent goes on."""
    scratch()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # not a pool of processes for every rank
    mp.set_forkserver_preload(["bench.ranks.worker"])
    forkserver.ensure_running()


def loopback() -> str:
    """The network interface that only this machine reaches."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


@dataclass
class Clock:
    """Counts the time in which ranks run, not that in which they start."""

    limit_s: float
    spent_s: float = 0.0
    since: float | None = None

    def start(self) -> None:
        self.since = self.since or time.monotonic()

    def stop(self) -> None:
        self.spent_s, self.since = self.so_far, None

    @property
    def so_far(self) -> float:
        return self.spent_s + (time.monotonic() - self.since if self.since else 0)

    @property
    def left_s(self) -> float:
        return self.limit_s - self.so_far


def launch(task: Task, progress: Progress) -> Outcome:
    """Run a resolved configuration on its ranks, all on this machine. Always returns, with no process left behind."""
    start_server()
    clock = Clock(task.config.timeout_s)
    measured: list[Rank] = []
    for ranks in turns(task.config):
        with tempfile.TemporaryDirectory(dir=scratch()) as folder:
            meeting = Meeting(loopback(), file=os.path.join(folder, "rendezvous"))
            outcome = run_ranks(ranks, task, meeting, folder, clock, progress)
        if outcome.status != "ok":
            return outcome
        measured += outcome.ranks
    return Outcome("ok", "", measured, seconds=round(clock.so_far, 3))


def run_ranks(
    ranks: Sequence[int],
    task: Task,
    meeting: Meeting,
    folder: str,
    clock: Clock,
    progress: Progress,
    elsewhere: Callable[["Ranks"], Outcome | None] = lambda ranks: None,
) -> Outcome:
    """A process for each of the ranks, all at once. elsewhere: is it over, for a reason that is not theirs?"""
    with Ranks(ranks, task, meeting, folder, progress) as started:
        begun = time.monotonic()
        try:
            while (outcome := started.outcome()) is None and (outcome := elsewhere(started)) is None:
                if interrupted.is_set():
                    raise Interrupted
                if not started.starting:
                    clock.start()
                if clock.left_s <= 0:
                    outcome = Outcome("timeout", f"timeout_s={clock.limit_s:g} is over; {started.where()}", [])
                    break
                if started.starting and time.monotonic() - begun > START_S:
                    outcome = Outcome("timeout", f"after {START_S:g} s {started.where()}", [])
                    break
                started.listen(min(LISTEN_S, clock.left_s))
        finally:
            clock.stop()
        return outcome


class Ranks:
    """The processes of some ranks of a configuration, from their start to their end."""

    def __init__(self, ranks: Sequence[int], task: Task, meeting: Meeting, folder: str, progress: Progress) -> None:
        self.ranks, self.task, self.meeting, self.folder, self.progress = ranks, task, meeting, folder, progress
        self.processes: dict[int, BaseProcess] = {}
        self.pipes: dict[int, Connection] = {}
        self.silent: dict[int, Connection] = {}  # of ranks that have not sent their last message
        self.starting = set(ranks)
        self.measured: dict[int, Rank] = {}
        self.failed: dict[int, Failure] = {}
        self.failed_at = 0.0
        self.oom_kills = ends.oom_kills()

    def __enter__(self) -> "Ranks":
        context = mp.get_context("forkserver")
        try:
            for rank in self.ranks:
                ours, theirs = context.Pipe()
                self.pipes[rank] = self.silent[rank] = ours
                arguments = (rank, self.task, self.meeting, self.folder, theirs)
                process = context.Process(target=rank_main, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.processes[rank] = process
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join()
        for pipe in self.pipes.values():
            pipe.close()

    def listen(self, seconds: float) -> None:
        """Take what ranks say within so many seconds."""
        ready = wait(list(self.silent.values()), timeout=max(0, seconds))
        for rank, pipe in list(self.silent.items()):
            if pipe in ready:
                self.take(rank, pipe)

    def take(self, rank: int, pipe: Connection) -> None:
        try:
            said = pipe.recv()
        except (EOFError, OSError):  # it died without a word
            said = self.died(rank)
        if isinstance(said, Ready):
            self.starting.discard(rank)
        elif isinstance(said, str):
            if rank == min(self.ranks):
                self.progress(said)
        else:
            del self.silent[rank]
            self.starting.discard(rank)
            if isinstance(said, Failure):
                self.failed[rank] = said
                self.failed_at = self.failed_at or time.monotonic()
            else:
                self.measured[rank] = said

    def died(self, rank: int) -> Failure:
        process = self.processes[rank]
        process.join(5)
        words = ends.read(ends.words_file(self.folder, rank))
        return ends.last_words(process.exitcode, words, ends.oom_kills() > self.oom_kills)

    def outcome(self) -> Outcome | None:
        """How it ended; None as long as it has not, or the rank that began a failure may still be heard."""
        if self.failed:
            return self.verdict() if self.is_certain() else None
        if self.silent:
            return None
        self.pass_on()
        return Outcome("ok", "", [self.measured[rank] for rank in sorted(self.measured)])

    def is_certain(self) -> bool:
        begun_by_one = any(not failure.echo for failure in self.failed.values())
        return begun_by_one or not self.silent or time.monotonic() - self.failed_at > GRACE_S

    def verdict(self) -> Outcome:
        """What the rank says whose failure is not the echo of another's."""
        first = next((rank for rank, failure in self.failed.items() if not failure.echo), next(iter(self.failed)))
        failure = self.failed[first]
        status = "oom" if failure.oom else "error"
        return Outcome(status, f"rank {first}: {failure.message}", [], failure.traceback, echo=failure.echo)

    def where(self) -> str:
        """Which line of a strategy, and which collective, each rank is in."""
        pids = {rank: process.pid for rank, process in self.processes.items() if process.pid is not None}
        return ends.where_ranks_are(pids, self.starting, self.folder)

    def pass_on(self) -> None:
        """What the ranks have written to stderr, but that a profile began and ended."""
        for rank in self.ranks:
            lines = ends.read(ends.words_file(self.folder, rank)).splitlines()
            if words := "\n".join(line for line in lines if not line.startswith(KINETO)).strip():
                print(f"rank {rank}: {words}", file=sys.stderr)


def rank_main(rank: int, task: Task, meeting: Meeting, folder: str, pipe: Connection) -> None:
    """The process of one rank; torch is imported there, not here."""
    if not os.path.isdir(folder):  # the parent was asked to end while this process was on its way
        return
    from bench.ranks import worker

    worker.serve(rank, task, meeting, folder, pipe)
