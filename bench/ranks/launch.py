"""Start the ranks of one configuration, wait for them, and see that none is left behind.

Ranks are forked from a server that has torch and this project imported already, so a configuration starts in
milliseconds; they are fresh processes all the same, so nothing of one configuration reaches the next.
"""

import math
import multiprocessing as mp
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from bench.ranks.task import Failure, Task
from conf.keys import Config
from conf.measurement import Rank

GRACE_S = 1.0  # between the first sign of a failure and the verdict: time for the rank that began it to be heard


@dataclass
class Outcome:
    """How a configuration ended: status ok, oom, timeout or error; the measurements of every rank if ok."""

    status: str
    reason: str
    ranks: list[Rank]
    traceback: str = ""
    seconds: float | None = None


def rank_main(rank: int, task: Task, folder: str, pipe: Connection) -> None:
    """The process of one rank; torch is imported there, not here."""
    from bench.ranks import worker

    worker.serve(rank, task, folder, pipe)


def start_server() -> None:
    """Start the server that ranks are forked from, if it is not up; it imports torch while the parent goes on."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # not a pool of processes for every rank
    mp.set_forkserver_preload(["bench.ranks.worker"])
    forkserver.ensure_running()


def launch(task: Task, progress: Callable[[str], None]) -> Outcome:
    """Run a resolved configuration on its ranks. Always returns, with no process left behind."""
    start_server()
    started = time.monotonic()
    deadline = started + task.config.timeout_s
    measured: list[Rank] = []
    for ranks in turns(task.config):
        outcome = run_ranks(ranks, task, deadline, progress)
        if outcome.status != "ok":
            return outcome
        measured += outcome.ranks
    return Outcome("ok", "", measured, seconds=round(time.monotonic() - started, 3))


def turns(config: Config) -> list[list[int]]:
    """The ranks that run, those together that run at the same time.

    Real ones need each other. An emulated rank has the device to itself. Of emulated and simulated ranks, only those
    that may differ in what they do or hold run at all.
    """
    if config.mode == "real":
        return [list(range(config.world_size))]
    ranks = unlike_ranks(config)
    return [ranks] if config.mode == "simulate" else [[rank] for rank in ranks]


def unlike_ranks(config: Config) -> list[int]:
    """The ranks among which is the one that does most, the one that holds most, and the one that sends most.

    The last rank of a ring sees most of the visiting keys, and the last of an uneven division has the largest part
    (Axis.span); but where ZeRO's shards are uneven, it is the first that has it.
    """
    mesh, model = vars(config.mesh), config.model
    last = {
        "dp": config.batch_size > mesh["dp"] and config.batch_size % mesh["dp"] > 0,
        "ring": True,
        "ulysses": False,
        "tp": any(size % mesh["tp"] for size in (model.vocab_size, model.ffn_dim)),
    }
    inner = ["ring", "ulysses"] if config.placement == "ulysses_inner" else ["ulysses", "ring"]
    rank = 0
    for axis in ("dp", *inner, "tp"):  # slowest first, as in strategies/ops/mesh.py
        rank = rank * mesh[axis] + (mesh[axis] - 1 if last[axis] else 0)
    rows = {model.dim, model.vocab_size, model.ffn_dim}
    rows |= {n_heads * (model.head_dim or 1) for n_heads in (model.n_heads, model.n_kv_heads)}
    uneven_zero = any(size % math.prod(mesh.values()) for size in rows)
    return sorted({0, rank}) if uneven_zero else [rank]


def run_ranks(ranks: list[int], task: Task, deadline: float, progress: Callable[[str], None]) -> Outcome:
    """A process for each of the ranks, all at once."""
    context = mp.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        pipes, processes = {}, {}
        oom_kills = kernel_oom_kills()
        try:
            for rank in ranks:
                ours, theirs = context.Pipe()
                process = context.Process(target=rank_main, args=(rank, task, folder, theirs), daemon=True)
                process.start()
                theirs.close()
                pipes[rank] = ours
                processes[rank] = process
            return watch(pipes, processes, task.config.timeout_s, deadline, folder, oom_kills, progress)
        finally:
            for process in processes.values():
                process.kill()
            for process in processes.values():
                process.join()
            for pipe in pipes.values():
                pipe.close()


def watch(
    pipes: dict[int, Connection],
    processes: Mapping[int, BaseProcess],
    timeout_s: float,
    deadline: float,
    folder: str,
    oom_kills: int,
    progress: Callable[[str], None],
) -> Outcome:
    """Listen until every rank has measured, one has failed, or the time is up."""
    measured: dict[int, Rank] = {}
    failed: dict[int, Failure] = {}
    silent = dict(pipes)  # ranks that have not sent their last message
    verdict_at = None
    while silent:
        until = deadline if verdict_at is None else min(deadline, verdict_at)
        ready = wait(list(silent.values()), timeout=max(0, until - time.monotonic()))
        for rank, pipe in list(silent.items()):
            if pipe not in ready:
                continue
            try:
                content = pipe.recv()
            except (EOFError, OSError):  # it died without a word
                processes[rank].join(1)
                failed[rank] = last_words(processes[rank].exitcode, oom_kills)
                del silent[rank]
                continue
            if isinstance(content, str):
                if rank == min(pipes):
                    progress(content)
                continue
            if isinstance(content, Failure):
                failed[rank] = content
            else:
                measured[rank] = content
            del silent[rank]
        if failed and verdict_at is None:
            verdict_at = time.monotonic() + GRACE_S
        if verdict_at is not None and (time.monotonic() >= verdict_at or began(failed) is not None):
            return verdict(failed)
        if time.monotonic() >= deadline:
            return Outcome("timeout", f"timeout_s={timeout_s:g} is over; {where_ranks_are(processes, folder)}", [])
    return verdict(failed) if failed else Outcome("ok", "", [measured[rank] for rank in sorted(measured)])


def began(failed: dict[int, Failure]) -> int | None:
    """The rank whose failure is not the echo of another's."""
    return next((rank for rank, failure in failed.items() if not failure.echo), None)


def verdict(failed: dict[int, Failure]) -> Outcome:
    rank = began(failed)
    if rank is None:
        rank = next(iter(failed))
    failure = failed[rank]
    return Outcome("oom" if failure.oom else "error", f"rank {rank}: {failure.message}", [], failure.traceback)


def last_words(exitcode: int | None, oom_kills: int) -> Failure:
    """What is to be said of a rank that could not say it."""
    if exitcode == -signal.SIGKILL and kernel_oom_kills() > oom_kills:
        return Failure("killed by the kernel, which was out of memory", oom=True)
    if exitcode is not None and exitcode < 0:
        return Failure(f"the process was killed by {signal.Signals(-exitcode).name}")
    return Failure(f"the process ended with exit code {exitcode} and no message")


def kernel_oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it booted."""
    try:
        with open("/proc/vmstat") as counters:
            return next(int(line.split()[1]) for line in counters if line.startswith("oom_kill "))
    except (OSError, StopIteration):
        return 0


def where_ranks_are(processes: Mapping[int, BaseProcess], folder: str) -> str:
    """Ask every rank for its stack, and say which strategy line and which collective each is in."""
    for process in processes.values():
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.3)
    places = []
    for rank, process in processes.items():
        if not process.is_alive():
            places.append(f"rank {rank} has ended")
            continue
        stack = Path(folder, f"stack{rank}")
        frames = stack.read_text() if stack.exists() else ""
        places.append(f"rank {rank} is in {place(frames)}" if frames else f"rank {rank} is starting")
    return ", ".join(places)


def place(stack: str) -> str:
    """The innermost call into torch.distributed and the innermost line of a strategy, of a stack innermost first."""
    frames = re.findall(r'File "(.+?)", line (\d+) in (\S+)', stack)
    call = next((name for file, _, name in reversed(frames) if "distributed_c10d" in file), frames[0][2])
    line = next((f"{f[f.rindex('strategies/') :]}:{n}" for f, n, _ in frames if "/strategies/" in f), None)
    return f"{call} ({line})" if line else f"{call} ({os.path.basename(frames[0][0])}:{frames[0][1]})"
