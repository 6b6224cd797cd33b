"""Reading a sweep's folder: record.json and comm.csv of every configuration, or results.csv where only that is there.

Whatever cannot be read becomes a sentence in `problems`; the rest is read all the same.
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from analysis import UserError

TEXT = ("run_id", "status", "reason", "mode", "strategy", "model", "command", "started_at", "ring_layout", "placement")
NEEDED = (
    "run_id",
    "status",
    "strategy",
    "seq_len",
    "world_size",
    "comm_bytes",
    "analytic_comm_bytes",
)
MEASURED = (
    "step_ms_median",  # mode=simulate has none
    *("step_ms_p10", "step_ms_p90", "tokens_per_s", "peak_bytes", "activation_bytes", "param_bytes", "grad_bytes"),
    *("optimizer_bytes", "other_bytes", "comm_bytes_params", "comm_bytes_activations", "loss_last"),
)
AXES = ("dp", "tp", "ulysses", "ring")
VARIANTS = {  # column -> what it is where nothing is said of it
    "ring_layout": None,
    "zero_stage": 3,
    "recompute": "none",
    "precision": "fp32",
    "ulysses_packed": False,
    "ulysses_chunks": 1,
    "ring_kv": "rotate",
    "placement": "ulysses_inner",
    "compile": False,
    "mlp_chunks": 1,
    "loss_chunks": 1,
    "model": None,
    "n_kv_heads": None,
    "batch_size": None,
    "mode": None,
    "workload": None,
    "direction": None,
}


@dataclass
class Sweep:
    """Everything that was recorded under one name."""

    folder: Path
    rows: pd.DataFrame  # the columns of results.csv, a row per configuration, and `label`
    records: dict[str, dict] = field(default_factory=dict)  # run_id -> record.json
    comm: dict[str, list[dict]] = field(default_factory=dict)  # run_id -> the lines of comm.csv
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def ok(self) -> pd.DataFrame:
        return self.rows[self.rows.status == "ok"]


def load(folder: Path) -> Sweep:
    """A sweep. Raises UserError if nothing at all can be read."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    problems: list[str] = []
    records = read_records(folder, problems)
    rows = pd.DataFrame(list(records.values())) if records else read_csv(folder, problems)
    if rows.empty:
        said = f"; {problems[0]}" if problems else ""
        raise UserError(f"{folder}: there is no readable record.json and no row in results.csv{said}")
    missing = [column for column in NEEDED if column not in rows]
    if missing and (rows.status == "ok").any() if "status" in rows else missing:
        where = folder / ("*/record.json" if records else "results.csv")
        problems.append(f"{where}: no column {', '.join(missing)}, it was written by an older version")
    for column in (*NEEDED, *MEASURED, *TEXT, *AXES, *VARIANTS):
        if column not in rows:
            rows[column] = None
    if "ok" not in set(rows.status):
        counts = ", ".join(f"{n} {status}" for status, n in rows.status.value_counts().items())
        problems.append(f"{folder}: no configuration ended well ({counts})")
    for column in rows.columns.intersection([*AXES, "world_size", "seq_len"]).union(measures(rows)):
        rows[column] = pd.to_numeric(rows[column], errors="coerce")
    rows["label"] = labels(rows)
    comm = (
        {run_id: read_comm(folder / run_id / "comm.csv", problems) for run_id in rows[rows.status == "ok"].run_id}
        if records
        else {}
    )
    return Sweep(folder, rows, records, comm, problems)


def measures(rows: pd.DataFrame) -> list[str]:
    """The columns that hold a measured number, by how they are named."""
    marks = ("_bytes", "bytes_", "_ms", "ms_", "_per_", "calls_", "loss_", "share_of_")
    return [column for column in rows if any(mark in column for mark in marks) and column != "round_ms"]


def read_records(folder: Path, problems: list[str]) -> dict[str, dict]:
    found = []
    for file in sorted(folder.glob("*/record.json")):
        try:
            record = json.loads(file.read_text())
            found.append((record.get("started_at", ""), record["run_id"], record))
        except (OSError, ValueError) as error:
            problems.append(f"{file}: not a whole record ({str(error).splitlines()[0]})")
        except (KeyError, AttributeError):
            problems.append(f"{file}: not a record, it has no run_id")
    return {run_id: record for _, run_id, record in sorted(found, key=lambda item: item[:2])}


def read_csv(folder: Path, problems: list[str]) -> pd.DataFrame:
    file = folder / "results.csv"
    if not file.exists():
        return pd.DataFrame()
    try:
        rows = pd.read_csv(file)
    except (OSError, ValueError) as error:
        problems.append(f"{file}: not a table ({str(error).splitlines()[0]})")
        return pd.DataFrame()
    for column in TEXT:
        if column in rows:
            rows[column] = rows[column].fillna("").astype(str)
    return rows


def read_comm(file: Path, problems: list[str]) -> list[dict]:
    try:
        with open(file, newline="") as lines:
            rows = list(csv.DictReader(lines))
        return [
            {**row, **{key: int(row[key]) for key in ("group_size", "calls", "payload_bytes", "sent_bytes")}}
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{file}: cannot be read ({type(error).__name__}: {error})")
        return []


def mesh(row) -> str:
    """The degrees that are more than 1."""
    degrees = {axis: int(row[axis]) for axis in AXES if pd.notna(row[axis]) and row[axis] > 1}
    return " ".join(f"{axis}={degree}" for axis, degree in degrees.items())


def labels(rows: pd.DataFrame) -> list[str]:
    """A short name of each row: strategy, mesh where it has several, and the variants that differ in the sweep."""
    meshes = [mesh(row) for _, row in rows.iterrows()]
    several = {
        strategy
        for strategy in set(rows.strategy)
        if len({m for m, s in zip(meshes, rows.strategy, strict=True) if s == strategy}) > 1
    }
    differ = [column for column in VARIANTS if rows[column].nunique() > 1]  # older rows may not say
    names = []
    for (_, row), where in zip(rows.iterrows(), meshes, strict=True):
        parts = [row.strategy, where if row.strategy in several or " " in where else ""]
        for column in differ:
            if column == "ring_layout" and not (pd.notna(row.ring) and row.ring > 1):
                continue
            if pd.notna(row[column]) and row[column] != VARIANTS[column] and row[column] != "":
                parts.append(variant(column, row[column]))
        names.append(" ".join(part for part in parts if part))
    return names


def variant(column: str, value) -> str:
    if value is True or value == "True":
        return column.replace("ulysses_", "")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str) else f"{column}={value}"
