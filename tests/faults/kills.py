"""The process that writes rows is killed at random moments, and the same command goes on, by itself under torchrun."""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from conf.meshes import STRATEGIES
from tests.faults import left
from tests.faults.inject import Plan
from tests.faults.plan import PATIENT_S, Sweep
from tests.faults.sweeps import LAUNCHERS, Command, Torchrun

A_SWEEP = 4  # kills of one sweep
SOON_S = 3.0  # the longest that a kill waits for when its row is there
STARTING = 0.25  # of the kills hit a command that may not have started yet


@dataclass
class Killed:
    """What became of a sweep whose writer was killed."""

    launcher: str
    kills: int = 0
    looks: int = 0  # at results.csv, whole each time
    seconds: list[float] = field(default_factory=list)  # from the kill to the next rank
    wrong: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)


def run(launcher: str, kills: int, folder: Path, dice: random.Random) -> Killed:
    """A sweep, killed so many times, that ends whole."""
    sweep = Sweep(launcher, dice.sample(list(STRATEGIES)[1:], 2), 2, range(kills + 1), [PATIENT_S])
    report = Killed(launcher)
    plan, command = Plan(folder), LAUNCHERS[launcher](folder, sweep.words)
    plan.write(sweep)
    finished: dict[Path, bytes] = {}
    try:
        command.start()
        for _ in range(kills):
            if (writer := kill(command, report, finished, dice)) is None:
                break
            struck = time.time()
            check_after(command, report, finished)
            command.until(lambda before=writer: goes_on(command, plan, before) or command.is_over())
            if (began := goes_on(command, plan, writer)) is not None:
                report.seconds.append(began - struck)
        command.until(lambda: looked_at(command, report, finished) and command.is_over())
        report.left = left.left(folder, command.shared_memory)
        judge(report, sweep, command, finished)
    except (OSError, ValueError) as error:
        report.wrong.append(f"{type(error).__name__}: {error}")
    finally:
        command.end()
    return report


def kill(command: Command, report: Killed, finished: dict[Path, bytes], dice: random.Random) -> psutil.Process | None:
    """Kill the writer at a random moment, looking at its table meanwhile -> it; None if all was over."""
    rows = 0 if dice.random() < STARTING else len(command.rows()) + 1
    wait_s = dice.uniform(0, SOON_S)
    command.until(lambda: (looked_at(command, report, finished) and len(finished) >= rows) or command.is_over())
    until = time.monotonic() + wait_s
    command.until(lambda: looked_at(command, report, finished) and time.monotonic() > until)
    command.until(lambda: command.leader() or command.is_over())
    writer = command.leader()
    if writer is not None:
        looked_at(command, report, finished)
        writer.kill()
        report.kills += 1
    return writer


def looked_at(command: Command, report: Killed, finished: dict[Path, bytes]) -> bool:
    """Is the table whole, with every row that was there before? Remembers what is finished."""
    rows = {row["run_id"] for row in command.rows()}
    if lost := {file.parent.name for file in finished} - rows:
        report.wrong.append(f"rows that were there are not: {', '.join(sorted(lost))}")
    report.looks += 1
    for run_id in rows:
        file = command.runs / run_id / "record.json"
        finished.setdefault(file, file.read_bytes())
    return True


def check_after(command: Command, report: Killed, finished: dict[Path, bytes]) -> None:
    """Its table is whole and nothing of it runs any more; give the command again where nobody else does."""
    looked_at(command, report, finished)
    if isinstance(command, Torchrun):
        return
    counts = left.left(command.folder, command.shared_memory)
    counts.pop("temporary files")  # the next start removes these
    report.wrong += [f"{count} {what} left after a kill" for what, count in counts.items() if count]
    command.start()


def goes_on(command: Command, plan: Plan, before: psutil.Process) -> float | None:
    """When the first rank of the next writer began, as soon as there is one."""
    writer = command.leader()
    return plan.next_after(writer.create_time()) if writer not in (None, before) else None


def judge(report: Killed, sweep: Sweep, command: Command, finished: dict[Path, bytes]) -> None:
    """It has ended well and whole, and what was finished before a kill was not run again."""
    rows = command.rows()
    if any(command.codes()):
        report.wrong.append(f"it has ended with {command.codes()}: {command.said()[-3000:]}")
    report.wrong += [f"{row['strategy']}: {row['reason']}" for row in rows if row["status"] != "ok"]
    if len(rows) != len(sweep.configurations) or {row["run_id"] for row in rows} != command.records():
        report.wrong.append(f"{len(rows)} rows of {len(sweep.configurations)}, {len(command.records())} records")
    report.wrong += [f"{file.parent.name} was run again" for file in finished if file.read_bytes() != finished[file]]
    report.wrong += [f"{count} {what} left" for what, count in report.left.items() if count]
