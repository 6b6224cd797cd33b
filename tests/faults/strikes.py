"""One sweep of the plan from its start to its end: its faults strike, and what became of each is found out."""

import re
import resource
import signal
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults import left
from tests.faults.inject import FOLDER, Plan
from tests.faults.plan import KINDS, PATIENT_S, Fault, Sweep, named
from tests.faults.sweeps import LAUNCHERS, Command, Torchrun

FULL = 3000  # bytes of the largest file for which there is room on a full disk: less than a record
AGAIN = 5  # times at most that a command is given: it goes on where a full disk stopped it


@dataclass
class Report:
    """What became of a sweep."""

    sweep: Sweep
    there: set[str] = field(default_factory=set)  # configurations that have a row
    wrong: list[str] = field(default_factory=list)  # what is not as it must be, in sentences
    named: list[str] = field(default_factory=list)  # kinds of the faults whose rows name the cause
    seconds: dict[str, float] = field(default_factory=dict)  # from the fault to the next configuration's first rank
    left: dict[str, int] = field(default_factory=dict)


def run(sweep: Sweep, folder: Path) -> Report:
    """Run a sweep whole."""
    command = LAUNCHERS[sweep.launcher](folder, sweep.words)
    plan = Plan(folder)
    plan.write(sweep)
    report = Report(sweep)
    try:
        for _ in range(AGAIN):
            command.start()
            command.until(lambda: strike_what_is_reached(sweep, plan, command) or command.is_over())
            if not any(command.codes()):
                break
            command.end()
        report.left = left.left(folder, command.shared_memory)
        judge(report, plan, command)
    except (OSError, ValueError, psutil.Error) as error:
        report.wrong.append(f"{type(error).__name__}: {error}")
    finally:
        command.end()
    return report


def strike_what_is_reached(sweep: Sweep, plan: Plan, command: Command) -> None:
    """Where a rank has said that its moment has come."""
    for configuration, fault in sweep.faults.items():
        reached = plan.marked("reached", configuration)
        if reached and not plan.marked("struck", configuration):
            rank = psutil.Process(reached[1])
            assert rank.environ()[FOLDER] == str(command.folder)
            plan.mark("struck", configuration)
            strike(fault.kind, rank, command)


def strike(kind: str, rank: psutil.Process, command: Command) -> None:
    if kind == "full disk":
        rank.parent().parent().rlimit(resource.RLIMIT_FSIZE, (FULL, FULL))
        rank.kill()
    elif kind == "host lost":
        assert isinstance(command, Torchrun)
        command.lose_a_host()
    else:
        rank.send_signal(signal.Signals[kind])


def judge(report: Report, plan: Plan, command: Command) -> None:
    """Is every row there, and does it say what happened?"""
    sweep, wrong = report.sweep, report.wrong
    rows = {named(row["strategy"], int(row["seed"]), float(row["timeout_s"])): row for row in command.rows()}
    report.there = set(rows)
    if {row["run_id"] for row in rows.values()} != command.records():
        wrong.append("results.csv and the records differ")
    for configuration in sweep.configurations:
        row, fault = rows.get(configuration), sweep.faults.get(configuration)
        if row is None:
            wrong.append(f"{configuration}: there is no row")
        elif fault is None:
            if row["status"] != "ok":
                wrong.append(f"{configuration}: {row['status']}: {row['reason']}")
        elif plan.marked("struck", configuration) is None:
            if row["status"] == "timeout" and sweep.timeouts[0] < PATIENT_S:
                continue  # this machine was too slow even for a fault
            wrong.append(f"{configuration}: {fault.kind} has not struck; {row['status']}: {row['reason']}")
        elif not says(row, fault, command):
            wrong.append(f"{configuration}: {fault.kind} ({fault}): {row['status']}: {row['reason']}")
        else:
            report.named.append(fault.kind)
            struck, _ = plan.marked("struck", configuration)
            report.seconds[configuration] = (plan.next_after(struck) or float("nan")) - struck
    wrong += [f"{count} {what} left" for what, count in report.left.items() if count]
    if sweep.launcher == "local" and re.search("^Traceback", command.said(), re.MULTILINE):  # torchrun has its own
        wrong.append(f"a traceback: {command.said()[-3000:]}")


def says(row: dict[str, str], fault: Fault, command: Command) -> bool:
    """Does the row, or of a disk that is full the command, name the cause?"""
    kind = KINDS[fault.kind]
    reason = kind.reason.format(rank=fault.rank)
    if fault.kind == "full disk":
        return row["status"] == "ok" and "File too large, and the row of" in command.said()
    return re.fullmatch(kind.status, row["status"]) is not None and re.search(reason, row["reason"]) is not None
