"""Faults into sweeps over all strategies and both launchers, and kills of the process that writes their rows.

What is not as it must be is said at once, and in the end the exit status is 1.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults import kills, rooms, strikes
from tests.faults.inject import ROOM
from tests.faults.left import NOTHING
from tests.faults.plan import KINDS, plan

console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run.sh test faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="how many strike ranks, hosts and disks")
    parser.add_argument("--kills", type=int, default=50, help="how often the process that writes rows is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the dice: which faults, where and when")
    asked = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, rooms.little_memory() as room:
        kinds = [kind for kind in KINDS if room or kind != "memory, cgroup"]
        if not room:
            console.print("memory, cgroup: skipped, for no control group can be made here; root on Linux can")
        os.environ[ROOM] = str(room)
        struck: list[strikes.Report] = []
        killed: list[kills.Killed] = []
        try:
            campaign(asked.faults, kinds, asked.kills, asked.seed, Path(folder), struck, killed)
        except KeyboardInterrupt:
            console.print("interrupted; until then:")
    print_faults(struck)
    print_kills(killed)
    wrong = [sentence for report in (*struck, *killed) for sentence in report.wrong]
    console.print(f"{len(wrong)} things are not as they must be" if wrong else "all is as it must be")
    sys.exit(1 if wrong else 0)


def campaign(
    faults: int,
    kinds: Sequence[str],
    n_kills: int,
    seed: int,
    folder: Path,
    struck: list[strikes.Report],
    killed: list[kills.Killed],
) -> None:
    """Every sweep of the plan, and then the kills, one after the other; what became of each, as it is done."""
    sweeps, dealt = plan(faults, kinds, seed), dealt_kills(n_kills)
    began = time.monotonic()
    done = 0

    def one(what: str, run: Callable) -> strikes.Report | kills.Killed:
        nonlocal done
        spent = time.monotonic() - began
        total = len(sweeps) + len(dealt)
        left = f", about {spent / done * (total - done):.0f} s left" if done else ""
        console.print(f"[{done + 1}/{total}{left}] {what}")
        done += 1
        report = run(folder / str(done))
        for sentence in report.wrong:
            console.print(f"    {sentence}", style="red")
        return report

    for sweep in sweeps:
        struck.append(one(str(sweep), lambda place, sweep=sweep: strikes.run(sweep, place)))
    for i, (launcher, n) in enumerate(dealt):
        dice = random.Random(f"{seed} {i}")
        what = f"{launcher} · {n} kills"
        killed.append(one(what, lambda place, each=(launcher, n), dice=dice: kills.run(*each, place, dice)))


def dealt_kills(n: int) -> list[tuple[str, int]]:
    """Sweeps and how often each is killed: half of the kills under torchrun."""
    dealt = []
    for launcher, share in (("local", n - n // 2), ("torchrun", n // 2)):
        dealt += [(launcher, min(kills.A_SWEEP, share - at)) for at in range(0, share, kills.A_SWEEP)]
    return dealt


def print_faults(reports: Sequence[strikes.Report]) -> None:
    table = Table(title="faults", title_justify="left")
    for head in ("fault", "local", "torchrun", "named in the row", "s to the next, median", "worst"):
        table.add_column(head, justify="left" if head == "fault" else "right")
    each = [(report, *item) for report in reports for item in report.sweep.faults.items()]
    for kind in dict.fromkeys(fault.kind for *_, fault in each):
        of_kind = [(report, configuration) for report, configuration, fault in each if fault.kind == kind]
        launchers = Counter(report.sweep.launcher for report, _ in of_kind)
        named = sum(report.named.count(kind) for report in reports)
        seconds = [report.seconds[name] for report, name in of_kind if name in report.seconds]
        table.add_row(kind, str(launchers["local"]), str(launchers["torchrun"]), str(named), *middle_and_worst(seconds))
    console.print(table)
    expected = sum(len(report.sweep.configurations) for report in reports)
    there = sum(len(report.there) for report in reports)
    console.print(f"{len(reports)} sweeps: {expected} rows expected, {there} rows there, {len(each)} of them struck")
    console.print(said_left(reports))


def print_kills(reports: Sequence[kills.Killed]) -> None:
    for launcher in dict.fromkeys(report.launcher for report in reports):
        of_it = [report for report in reports if report.launcher == launcher]
        median, worst = middle_and_worst([s for report in of_it for s in report.seconds])
        console.print(
            f"{launcher}: {sum(report.kills for report in of_it)} kills of the process that writes; results.csv was "
            f"whole {sum(report.looks for report in of_it)} times; the next rank after {median} s, at worst {worst} s"
        )
    if reports:
        console.print(said_left(reports))


def said_left(reports: Sequence[strikes.Report | kills.Killed]) -> str:
    return "left: " + ", ".join(f"{sum(r.left.get(what, 0) for r in reports)} {what}" for what in NOTHING)


def middle_and_worst(seconds: Sequence[float]) -> tuple[str, str]:
    if not seconds:
        return "", ""
    return f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"


if __name__ == "__main__":
    main()
