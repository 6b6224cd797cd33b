"""One configuration after the other, and the table at the end."""

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from bench.app import logs, records
from bench.app.interrupts import leave
from bench.app.job import Job
from bench.app.launchers import Launch, launching
from bench.app.records import Row
from bench.app.row import Launcher, resolved_here, run
from bench.app.terminal import console, in_sight, in_silence, outcome_line, print_table, say
from bench.instruments.capacity import cores
from bench.ranks.launch import interrupted
from bench.ranks.task import HostLost, Outcome, Task
from conf.columns import described
from conf.keys import Key, beyond, keys, run_id
from conf.labels import swept_by, title
from conf.measurement import Round


def run_one(job: Job) -> Row:
    """A single run always measures. Raises Invalid, and leaves nothing, where it cannot begin."""
    with launching(job.config) as launch:
        resolved_here(job.config)
        with in_turn([job]):
            row = run(job, "all", watched(launch, "", []))
            log(row)
    if row["status"] == "ok":
        print_table([row], job.config.name)
    else:
        console.print(f"{title(row, [])} · {outcome_line(row)}", style="red")
    return row


def run_all(jobs: list[Job]) -> list[Row]:
    """Run a sweep's jobs, and print the table."""
    rows = run_part(jobs)
    print_table(rows, jobs[0].config.name)
    return rows


def run_part(jobs: list[Job]) -> list[Row]:
    """Run jobs one after the other. Ctrl-C leaves every finished row on disk."""
    done: dict[int, Row] = {}
    name = jobs[0].config.name
    try:
        with launching(jobs[0].config) as launch, in_turn(jobs):
            for i, row in (simulate_each if simulated(jobs) else run_each)(jobs, launch):
                done[i] = row
                log(row)
    except (KeyboardInterrupt, HostLost, records.Unwritable) as error:
        there = f"{len(done)} of {len(jobs)} rows are in {records.RUNS / name}"
        console.print(f"{str(error) or 'interrupted'}: {there}; the same command again goes on from there")
        if isinstance(error, KeyboardInterrupt):
            leave(error)
        sys.exit(1)
    return [done[i] for i in sorted(done)]


@contextmanager
def in_turn(jobs: Sequence[Job]) -> Iterator[None]:
    """As long as it is this command's turn to write these jobs' rows."""

    logs.check(job.config for job in jobs)
    with ExitStack() as folders:
        for name in sorted({job.config.name for job in jobs}):
            folders.enter_context(records.opened(records.RUNS / name, simulated(jobs), fault))
        yield


def log(row: Row) -> None:
    if (sentence := logs.logged(row, records.RUNS / row["name"])) is not None:
        fault(sentence)


def fault(sentence: str) -> None:
    console.print(sentence, style="red")


def simulated(jobs: Sequence[Job]) -> bool:
    """Do none of these jobs need a quiet machine?"""
    return all(job.config.mode == "simulate" for job in jobs)


def watched(launch: Launch, place: str, among: list[Key]) -> Launcher:
    """A launcher that says what it launches."""

    def launcher(task: Task, special: str) -> Outcome:
        what = title(described(task.config), among)
        return in_sight(launch, task, f"{place}{what}{f' · {special}' if special else ''}")

    return launcher


class Families:
    """Launches simulated configurations of which many differ in nothing but how long and how many sequences are.

    How a step grows with depth is the same for these: the third depth (bench/simulation/simulate.py) is run for the
    first alone.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.foretold: set[str] = set()

    def __call__(self, task: Task, special: str) -> Outcome:
        family = run_id(replace(task.config, seq_len=1, batch_size=1))
        outcome = in_silence(self.launch, replace(task, known=family in self.foretold))
        if outcome.status == "ok" and all(rank.foretold for rank in outcome.ranks):
            self.foretold.add(family)
        return outcome


def simulate_each(jobs: list[Job], launch: Launch) -> Iterator[tuple[int, Row]]:
    """Simulated ranks need no quiet machine: as many jobs at a time as there are cores."""
    started, launcher, launched = time.monotonic(), Families(launch), 0
    among = swept_by([job.config for job in jobs])
    with ThreadPoolExecutor(cores()) as pool:
        waiting = {pool.submit(run, job, job.config.rerun, launcher): i for i, job in enumerate(jobs)}
        try:
            for n, future in enumerate(as_completed(waiting), 1):
                row = future.result()
                launched += was_launched(row)
                each = (time.monotonic() - started) / launched if launched else 0
                say(place(n, len(jobs), each * (len(jobs) - n)), row, among)
                yield waiting[future], row
        except BaseException:
            interrupted.set()  # what runs is not waited for
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def run_each(jobs: list[Job], launch: Launch) -> Iterator[tuple[int, Row]]:
    """The number of a job and its row, as they are done; a line for each run: which, how many are left, how long.

    With rounds, every job runs once before any runs again, so that all meet the same good and bad moments.
    """
    among = swept_by([job.config for job in jobs])
    spent: list[float] = []
    measured: list[list[Round]] = [[] for _ in jobs]
    turns = turns_of(jobs)
    over: set[int] = set()
    for n, (turn, i) in enumerate(turns):
        if i in over:
            continue
        job = jobs[i]
        before = place(n + 1, len(turns), sum(spent) / len(spent) * (len(turns) - n) if spent else 0)
        started = time.monotonic()
        row = run(job, job.config.rerun, watched(launch, before, among), measured[i])
        launched = was_launched(row)
        if launched:
            spent.append(time.monotonic() - started)
        say(before, row, among, said=launched and not console.is_terminal)
        if turn + 1 == job.config.rounds or not launched or row["status"] != "ok":
            over.add(i)
            yield i, row


def was_launched(row: Row) -> bool:
    """Did it take time? What is refused or kept says nothing of how long the others will take."""
    return row["status"] != "invalid" and not row.get("kept")


def place(n: int, of: int, left_s: float) -> str:
    """Which of how many, and how long the rest will take where that is known."""
    left = f", about {left_s:.0f} s left" if left_s >= 1 else ""
    return f"[{n}/{of}{left}] "


def turns_of(jobs: list[Job]) -> list[tuple[int, int]]:
    """(round, job): all jobs of a round before the next; a job that cannot run has one, in which it says so."""
    bounds, asked = keys()["rounds"].declared.metadata, [job.config.rounds for job in jobs]
    rounds = [1 if beyond(bounds, each) else each for each in asked]
    return [(turn, i) for turn in range(max(rounds)) for i in range(len(jobs)) if turn < rounds[i]]
