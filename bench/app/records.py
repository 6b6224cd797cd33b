"""Records: every configuration ends as runs/<name>/<run_id>/record.json, and as a row of runs/<name>/results.csv.

Files are replaced, never edited: whoever reads one sees it whole.
"""

import csv
import io
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

from bench.app import parquet, turns
from conf import recorded
from conf.columns import COMM_COLUMNS, csv_columns
from conf.files import FileFault, check_writable, status
from conf.keys import Config, run_id
from conf.labels import title
from conf.measurement import Entry
from conf.series import SERIES

ROOT = Path(__file__).parents[2]
RUNS = Path("runs")
Row = dict[str, Any]
STRAYS = ("results*.tmp", "*/record*.tmp", "*/comm*.tmp", *(f"*/{workload}*.tmp" for workload in SERIES))
saving = threading.Lock()  # simulated configurations run several at a time


class Unwritable(FileFault):
    """A row that is not on disk, and why."""


@contextmanager
def opened(folder: Path, shared: bool, say: Callable[[str], None]) -> Iterator[None]:
    """A sweep's folder, as long as it is this command's turn to write there. Raises FileFault where nobody could.

    What a run that was killed has left is removed, what is damaged is set aside, and say is told of it.
    """
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with turns.turn(folder, shared, say):
        with writing(folder, "results.csv"):
            for stray in (file for pattern in STRAYS for file in folder.glob(pattern)):
                stray.unlink()
            for file in sorted(folder.glob("*/record.json")):
                if (fault := damage(file)) is not None:
                    say(f"{fault}; it is now {set_aside(file)}, and its configuration runs again")
            if rows := load_all(folder):
                replace(tables(folder, rows))
        yield


def save(
    folder: Path, row: Row, comm: Iterable[Entry], instead_of: Iterable[str] = (), series: Sequence[Mapping] = ()
) -> None:
    """Write one configuration's record and its comm.csv, and the sweep's results.csv without the rows it replaces.

    series: of what measures a machine, the lines of the csv that is there instead of comm.csv. Raises Unwritable, and
    all files are as they were.
    """
    target = folder / row["run_id"]
    lines = [{**asdict(entry), "sent_bytes": round(entry.sent_bytes)} for entry in comm]
    beside = {"comm.csv": table(COMM_COLUMNS, lines)}
    if series:
        beside = {f"{row['workload']}.csv": table([column.name for column in SERIES[row["workload"]]], series)}
    text = json.dumps(finite(row), indent=2)
    gone = {*instead_of, row["run_id"]}
    with writing(folder, f"the row of {title(row, [])}"):
        rows = [json.loads(text), *(other for other in load_all(folder) if other["run_id"] not in gone)]
        target.mkdir(parents=True, exist_ok=True)
        replace(
            {
                **{target / name: text for name, text in beside.items()},
                target / "record.json": text + "\n",
                **tables(folder, by_age(rows)),
            }
        )
        for each in gone - {row["run_id"]}:
            shutil.rmtree(folder / each, ignore_errors=True)


def tables(folder: Path, rows: list[Row]) -> dict[Path, str | bytes]:
    """A sweep's rows in one, as CSV and, where that can be written, as Parquet."""
    as_csv: dict[Path, str | bytes] = {folder / "results.csv": table(csv_columns(), rows)}
    if not parquet.available():
        return as_csv
    cells = [{name: printable(value) for name, value in row.items()} for row in rows]
    return as_csv | {folder / parquet.NAME: parquet.parquet(cells)}


@contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """One thread of one process at a time. A disk that is full, or has gone, is an Unwritable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with saving, turns.writing(folder):
            yield
    except OSError as error:
        raise Unwritable(f"{error.filename or folder}: {error.strerror}, and {what} is not written") from None


def find(folder: Path, config: Config) -> Row | None:
    """The row of a resolved configuration, under today's run_id or that of an older version; None if there is none."""
    wanted = run_id(config)
    files = chain([folder / wanted / "record.json"], folder.glob("*/record.json"))
    return next((row for row, today in stored(files) if today == wanted), None)


def load_all(folder: Path) -> list[Row]:
    """Every record of a sweep, oldest first."""
    return by_age([row for row, _ in stored(folder.glob("*/record.json"))])


def by_age(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["started_at"], row["run_id"]))


def stored(files: Iterable[Path]) -> Iterator[tuple[Row, str]]:
    """Those of these records that can be read, each with the run_id that its configuration has today."""
    for file in files:
        with suppress(FileFault):
            yield read(file)


def damage(file: Path) -> FileFault | None:
    try:
        read(file)
    except FileFault as fault:
        return fault
    return None


def read(file: Path) -> tuple[Row, str]:
    """Once, for a sweep asks again with every row. Raises FileFault."""
    there = status(file)
    return read_once(file, (there.st_dev, there.st_ino, there.st_mtime_ns))


@cache
def read_once(file: Path, version: tuple[int, ...]) -> tuple[Row, str]:
    row, config = recorded.read(file)
    return row, run_id(config) if config else row["run_id"]


def set_aside(file: Path) -> str:
    """Give a damaged record a name that is free -> that name."""
    names = (f"{file.name}.damaged{n}" for n in ("", *(f".{n}" for n in range(1, 10**6))))
    free = next(file.with_name(name) for name in names if not os.path.lexists(file.with_name(name)))
    file.rename(free)
    return free.name


def finite(value: Any) -> Any:
    """What JSON can say: it has no word for a number that is not finite."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def table(columns: Sequence[str], rows: Iterable[Mapping]) -> str:
    """CSV, a line for each row: whatever a text holds, spreadsheets and pandas can read it."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: printable(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def printable(value: Any) -> Any:
    """Newlines, NULs and halves of characters as escapes."""
    if not isinstance(value, str) or value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def replace(texts: Mapping[Path, str | bytes]) -> None:
    """Write all of these files, or if there is no room for one of them none."""
    temporary = {file: file.with_suffix(f"{file.suffix}.tmp") for file in texts}
    try:
        for file, text in texts.items():
            with open(temporary[file], "wb") as out:
                out.write(text if isinstance(text, bytes) else text.encode())
                out.flush()
                os.fsync(out.fileno())  # a quota, or a server's disk, may be found full only now
        for file in texts:
            os.replace(temporary[file], file)
    finally:
        for left in temporary.values():
            with suppress(OSError):
                left.unlink()


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
