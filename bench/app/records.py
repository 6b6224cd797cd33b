"""Records: every configuration ends as runs/<name>/<run_id>/record.json, and as a row of runs/<name>/results.csv."""

import csv
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from conf.columns import COMM_COLUMNS, csv_columns, described
from conf.keys import Config, run_id
from conf.measurement import Entry

ROOT = Path(__file__).parents[2]
RUNS = Path("runs")
Row = dict[str, Any]
saving = threading.Lock()  # simulated configurations run several at a time


def save(folder: Path, row: Row, comm: Iterable[Entry], instead_of: Iterable[str] = ()) -> None:
    """Write one configuration's record and its comm.csv, then the sweep's results.csv, without the rows it replaces."""
    target = folder / row["run_id"]
    lines = [{**asdict(entry), "sent_bytes": round(entry.sent_bytes)} for entry in comm]
    with saving:
        target.mkdir(parents=True, exist_ok=True)
        write_csv(target / "comm.csv", COMM_COLUMNS, lines)
        replace(target / "record.json", json.dumps(row, indent=2) + "\n")
        for run_id in {*instead_of} - {row["run_id"]}:
            shutil.rmtree(folder / run_id, ignore_errors=True)
        write_csv(folder / "results.csv", csv_columns(), load_all(folder))


def find(folder: Path, config: Config) -> Row | None:
    """The row of a resolved configuration, under today's run_id or that of an older version; None if there is none."""
    wanted = run_id(config)
    if (row := load(folder, wanted)) is not None:
        return row
    found = (read(file.resolve(), file.stat().st_mtime_ns) for file in folder.glob("*/record.json"))
    return next((record[0] for record in found if record and record[1] == wanted), None)


def load(folder: Path, run_id: str) -> Row | None:
    """A record that was written whole, or None. What it does not say of its configuration was as by default."""
    file = folder / run_id / "record.json"
    try:
        record = read(file.resolve(), file.stat().st_mtime_ns)
    except OSError:
        return None
    return record[0] if record else None


@cache
def read(file: Path, written_at: int) -> tuple[Row, str] | None:
    """A record and the run_id that its configuration has today; once, for a sweep asks again with every row."""
    try:
        row = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if "config" not in row:
        return row, row.get("run_id", "")
    config = Config.of(row["config"])
    return {**described(config), **row}, run_id(config)


def load_all(folder: Path) -> list[Row]:
    """Every record of a sweep, oldest first."""
    found = (load(folder, file.parent.name) for file in folder.glob("*/record.json"))
    return sorted((record for record in found if record), key=lambda record: (record["started_at"], record["run_id"]))


def write_csv(file: Path, columns: list[str], rows: Iterable[Mapping]) -> None:
    temporary = file.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as out:
        writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, file)


def replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


@cache
def provenance() -> Row:
    """The commit of this checkout, and whether it was changed since."""

    def git(*args: str) -> str:
        result = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        return {"git_sha": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except FileNotFoundError:  # no git on this machine
        return {"git_sha": "", "git_dirty": None}
