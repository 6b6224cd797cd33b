"""Reading a sweep's folder: record.json and comm.csv of every configuration, or results.csv where only that is there.

Whatever cannot be read becomes a sentence in `problems`; the rest is read all the same. Keys that did not exist when a
record was written are as by default.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from analysis import UserError
from conf import recorded, series
from conf.columns import COMM_COLUMNS, MEASURED, WHERE_FROM, WHO, columns
from conf.files import FileFault
from conf.keys import MISSING, OF_A_MACHINE, Config, keys
from conf.labels import labels
from conf.meshes import AXES

NEEDED = ("run_id", "status", "strategy", "seq_len", "world_size", "comm_bytes", "analytic_comm_bytes")
TEXT = ("strategy", *(c.name for c in (*WHO, *MEASURED, *WHERE_FROM) if c.holds is str))
NUMBERS = (*AXES, "world_size", "seq_len", *(c.name for c in MEASURED if c.holds is float))


@dataclass
class Sweep:
    """Everything that was recorded under one name."""

    folder: Path
    rows: pd.DataFrame  # a row per configuration: every column of conf/columns.py, and `label`
    records: dict[str, dict] = field(default_factory=dict)  # run_id -> record.json
    configs: dict[str, Config] = field(default_factory=dict)  # run_id -> what was resolved, where it was
    comm: dict[str, list[dict]] = field(default_factory=dict)  # run_id -> the lines of comm.csv, where it can be read
    series: dict[str, list[dict]] = field(default_factory=dict)  # run_id -> lines of collectives.csv or kernels.csv
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def ok(self) -> pd.DataFrame:
        """The rows of steps that ended well."""
        return self.rows[(self.rows.status == "ok") & ~self.rows.workload.isin(OF_A_MACHINE)]

    @property
    def steps(self) -> pd.DataFrame:
        """Beside these the rows that were out of memory."""
        return self.rows[self.rows.status.isin(["ok", "oom"]) & ~self.rows.workload.isin(OF_A_MACHINE)]

    def measured(self, workload: str) -> dict[str, list[dict]]:
        """run_id -> what was measured of a machine, by this workload."""
        return {run_id: lines for run_id, lines in self.series.items() if self.configs[run_id].workload == workload}


def at_its_answer(record: Mapping, config: Config | None) -> Config | None:
    """The configuration whose bytes a row has: of search=max_seq_len, with the sequence that was found."""
    return config and replace(config, seq_len=record["seq_len"])


def load(folder: Path) -> Sweep:
    """A sweep. Raises UserError if nothing at all can be read."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    problems: list[str] = []
    read = read_records(folder, problems)
    records = {record["run_id"]: record for record, _ in read}
    configs = whole(folder, {record["run_id"]: at_its_answer(record, config) for record, config in read}, problems)
    found = [*records.values()] or read_csv(folder, problems)
    if not found:
        said = f"; {problems[0]}" if problems else ""
        raise UserError(f"{folder}: there is no readable record.json and no row in results.csv{said}")
    steps = [row for row in found if row.get("workload") not in OF_A_MACHINE]
    missing = [column for column in NEEDED if steps and not any(column in row for row in steps)]
    statuses = pd.Series([row.get("status", "") for row in found])
    if missing and ("ok" in set(statuses) or "status" in missing):
        where = folder / ("*/record.json" if records else "results.csv")
        problems.append(f"{where}: no column {', '.join(missing)}, it was written by an older version")
    if "ok" not in set(statuses):
        counts = ", ".join(f"{n} {status}" for status, n in statuses.value_counts().items())
        problems.append(f"{folder}: no configuration ended well ({counts})")
    counted = [run_id for run_id, record in records.items() if record.get("comm_bytes") is not None]
    lines = {run_id: read_comm(folder / run_id / "comm.csv", problems) for run_id in counted}
    comm = {run_id: entries for run_id, entries in lines.items() if entries is not None}
    with pd.option_context("mode.string_storage", "python"):  # Arrow's hold no halves of characters, which a path may
        rows = table_of(found)
    return Sweep(folder, rows, records, configs, comm, read_series(folder, records, configs, problems), problems)


def table_of(found: list[dict]) -> pd.DataFrame:
    """Rows with every column, whatever of them was there, and a label for each."""
    rows = pd.DataFrame(found).assign(label=labels([{"strategy": "", **row} for row in found]))
    absent = [column.name for column in columns() if column.name not in rows]
    rows = rows.reindex(columns=[*rows.columns, *absent])
    for column in TEXT:
        rows[column] = rows[column].astype(object).fillna("").astype(str)
    for column in NUMBERS:
        rows[column] = pd.to_numeric(rows[column], errors="coerce")
    return rows.copy()  # in one piece: pandas warns of a table made column by column


def read_records(folder: Path, problems: list[str]) -> list[tuple[dict, Config | None]]:
    """The oldest first, each with its configuration."""
    found = []
    for file in sorted(folder.glob("*/record.json")):
        try:
            found.append(recorded.read(file))
        except FileFault as fault:
            problems.append(str(fault))
    return sorted(found, key=lambda each: (each[0]["started_at"], each[0]["run_id"]))


def whole(folder: Path, configs: dict[str, Config | None], problems: list[str]) -> dict[str, Config]:
    """Those that say all that a configuration is: what was refused before it was resolved does not."""
    found = {}
    for run_id, config in configs.items():
        missing = [path for path, key in keys().items() if config and key.of(config) == MISSING]
        if missing:
            problems.append(f"{folder / run_id / 'record.json'}: its configuration has no {', '.join(missing)}")
        elif config:
            found[run_id] = config
    return found


def read_csv(folder: Path, problems: list[str]) -> list[dict]:
    file = folder / "results.csv"
    if not file.exists():
        return []
    try:
        rows = pd.read_csv(file).astype(object)
    except (OSError, ValueError) as error:
        problems.append(f"{file}: not a table ({str(error).splitlines()[0]})")
        return []
    rows = rows.join(as_commanded(rows))
    sizes = [key.column for key in keys().values() if key.path.startswith("model.") and key.default == MISSING]
    said = list(rows.columns.intersection(sizes))
    if said and "model" in rows:  # older rows do not say them
        rows[said] = rows[said].fillna(rows.groupby("model")[said].transform("first"))
    return rows.where(rows.notna(), None).to_dict("records")


def as_commanded(rows: pd.DataFrame) -> pd.DataFrame:
    """Of keys that had no column yet when the rows were written, what their commands say."""
    if "command" not in rows:
        return pd.DataFrame(index=rows.index)
    said = [dict(word.split("=", 1) for word in str(line).split() if "=" in word) for line in rows.command]
    found = pd.DataFrame(said, rows.index, dtype=object)
    absent = {key.path: key.column for key in keys().values() if key.column not in rows and key.path in found}
    return found[list(absent)].map(lambda word: int(word) if str(word).isdecimal() else word).rename(columns=absent)


def read_comm(file: Path, problems: list[str]) -> list[dict] | None:
    try:
        with open(file, newline="") as lines:
            rows = list(csv.DictReader(lines))
        if rows and (absent := set(COMM_COLUMNS) - rows[0].keys()):
            raise ValueError(f"no column {', '.join(sorted(absent))}")
        return [
            {**row, **{key: int(row[key]) for key in ("group_size", "calls", "payload_bytes", "sent_bytes")}}
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{file}: cannot be read ({type(error).__name__}: {error})")
        return None


def read_series(
    folder: Path, records: Mapping[str, dict], configs: Mapping[str, Config], problems: list[str]
) -> dict[str, list[dict]]:
    """Of the rows that measured a machine, what they did."""
    found = {}
    for run_id, config in configs.items():
        if config.workload in OF_A_MACHINE and records[run_id]["status"] == "ok":
            try:
                found[run_id] = series.read(folder / run_id / f"{config.workload}.csv")
            except FileFault as fault:
                problems.append(str(fault))
    return found
