"""What the terminal shows: a line for each row as it is done, and a table of them at the end."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.app import records
from bench.app.launchers import Launch
from bench.app.records import Row
from bench.ranks.task import Outcome, Task
from conf.columns import MEASURED, Column
from conf.groups import written
from conf.keys import OF_A_MACHINE, Key
from conf.labels import swept, text, title, where
from conf.measurement import NOISY
from conf.series import read, summary
from conf.sizes import size

console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, highlight=False, markup=False)


def in_silence(launch: Launch, task: Task) -> Outcome:
    return launch(task, lambda text: None)


def in_sight(launch: Launch, task: Task, what: str) -> Outcome:
    """Say meanwhile what runs; on a terminal in a line that also says how far it is, and goes."""
    if not console.is_terminal:
        console.print(what)
        return in_silence(launch, task)
    with console.status(what) as status:
        return launch(task, lambda text: status.update(f"{what} · {text}"))


def say(place: str, row: Row, among: Sequence[Key], said: bool = False) -> None:
    """A row that is done; said: what it ran stands in the line above."""
    before = "    → " if said else f"{place}{title(row, among)} · "
    console.print(f"{before}{outcome_line(row)}", style=None if row["status"] == "ok" else "red")


def outcome_line(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    kept = " (kept from an earlier run)" if row.get("kept") else ""
    if row["workload"] in OF_A_MACHINE:
        return f"timed, in {row['mode_seconds']:.0f} s{kept}"
    if row.get("step_ms_median") is None:
        return f"{size(row['peak_bytes'])} at most on a rank, {size(row['comm_bytes'])} sent{kept}"
    return f"{row['step_ms_median']:.1f} ms a step{kept}"


def cells(row: Row, among: Sequence[Key], shown: Sequence[Column]) -> dict[str, str]:
    """What the table says of a row, by heading."""
    found = {"strategy": row["strategy"], "mesh": where(row), "seq_len": text(row["seq_len"])}
    found |= {written(key.path): text(row.get(key.column)) for key in among}
    found[""] = row["status"] if row["status"] != "ok" else ""
    for column in shown:
        found[column.head] = column.text(row)
        if column.name == "peak_bytes" and row.get("peak_bytes") and row.get("capacity_bytes"):
            found["of memory"] = f"{(row['peak_bytes'] + row['context_bytes']) / row['capacity_bytes']:.0%}"
    if row.get("losses"):
        ends = (row["losses"][0], row["losses"][-1])
        found["loss"] = " → ".join("not finite" if loss is None else f"{loss:.4f}" for loss in ends)
    return found


def print_series(row: Row, file: Path, among: Sequence[Key]) -> None:
    """What was measured of the machine, in short."""
    lines = summary(row["workload"], read(file))
    table = Table(title=title(row, among), title_justify="left", caption=f"{file} has it all", caption_justify="left")
    for head in lines[0]:
        table.add_column(head, justify="right" if row["workload"] == "collectives" else "left")
    for line in lines:
        table.add_row(*line.values())
    console.print(table)


def print_notes(rows: list[Row], among: Sequence[Key]) -> None:
    """What a reader of rows that ended well should know, once. Why others did not was said when they ended."""
    noted: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] == "ok" and row["reason"]:
            noted.setdefault(row["reason"], []).append(row)
    for reason, of in noted.items():
        others = f" and {len(of) - 1} more" if len(of) > 1 else ""
        console.print(f"{title(of[0], among)}{others}: {reason}")


def print_table(rows: list[Row], name: str) -> None:
    """One line a row: its strategy, mesh and length, what was swept, and the columns that some row has a value for."""
    among = swept(rows)
    table = Table(title=f"sweep {name}" if len(rows) > 1 else None, title_justify="left")
    shown = [column.over(rows) for column in MEASURED if column.head and column.in_terminal]
    lines = [cells(row, among, shown) for row in rows]
    heads = [head for head in dict.fromkeys(head for line in lines for head in line) if any(x.get(head) for x in lines)]
    for head in heads:
        table.add_column(head, justify="left" if head in ("strategy", "mesh") else "right")
    for line in lines:
        table.add_row(*(line.get(head, "") for head in heads))
    console.print(table)
    if any(row.get("noisy") for row in rows):
        console.print(f"~ times are noisy: steps, or rounds, spread (p10 to p90) over {NOISY:.0%} of their median")
    if all(row["mode"] == "simulate" and row.get("predicted_step_ms") is None for row in rows):
        console.print("mode=simulate measures no time; the clock of a cluster, as cluster=h100 has one, predicts it")
    for row in rows:
        if row["workload"] in OF_A_MACHINE and row["status"] == "ok":
            print_series(row, records.RUNS / name / row["run_id"] / f"{row['workload']}.csv", among)
    print_notes(rows, among)
    if traced := [records.RUNS / name / row["run_id"] for row in rows if row["profile"] and row["status"] == "ok"]:
        folder = traced[0] if len(traced) == 1 else records.RUNS / name / "*"
        console.print(f"{folder}/trace_rank*.json: a step of each rank, for ui.perfetto.dev")
    results = os.path.join(records.RUNS, name, "results.csv")
    console.print(f"{results}: one row each, with memory, bytes by phase and command")
