"""Where the files of a sweep contradict each other: record.json, the comm.csv beside it, and results.csv."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from analysis.accounts.comparison import PHASES
from analysis.reading import Sweep
from conf.clock import COLLECTIVES

MOST = 4  # columns that a sentence names


def mismatches(sweep: Sweep) -> Iterator[str]:
    """A sentence for each record that is not the sum of its comm.csv, and for each row that is not its record."""
    for run_id, lines in sweep.comm.items():
        record, sums = sweep.records[run_id], summed(lines)
        parts = {"comm_bytes_params", "comm_bytes_activations"} & record.keys()
        if parts and sum(record[part] for part in parts) != record["comm_bytes"]:
            yield f"{sweep.folder / run_id / 'record.json'}: {' and '.join(sorted(parts))} do not add up to comm_bytes"
        if wrong := differing(sums, record):
            file = sweep.folder / run_id / "comm.csv"
            yield f"{file}: its lines add up to {some(sums, wrong)}, and record.json has {some(record, wrong)}"
    if sweep.records:
        yield from of_table(sweep.folder / "results.csv", sweep.records)


def of_table(file: Path, records: Mapping[str, dict]) -> Iterator[str]:
    try:
        with open(file, newline="") as lines:
            rows = {row["run_id"]: row for row in csv.DictReader(lines)}
    except (OSError, ValueError, KeyError) as error:
        yield f"{file}: cannot be read ({type(error).__name__}: {error})"
        return
    for run_id, record in records.items():
        row, written = rows.get(run_id), {column: as_csv(value) for column, value in record.items()}
        if row is None:
            yield f"{file}: there is no row of {run_id}, of which there is a record"
        elif wrong := differing(row, written):
            yield f"{file}: the row of {run_id} has {some(row, wrong)}, and its record {some(written, wrong)}"


def summed(lines: list[dict]) -> dict[str, int]:
    """The columns of a record that follow from its comm.csv."""
    sent = {
        f"comm_bytes_{phase}": sum(line["sent_bytes"] for line in lines if line["phase"] in phases)
        for phase, phases in PHASES.items()
    }
    calls = {f"calls_{kind}": sum(line["calls"] for line in lines if line["kind"] == kind) for kind in COLLECTIVES}
    return {"comm_bytes": sum(line["sent_bytes"] for line in lines), **sent, **calls}


def as_csv(value: object) -> str:
    """What is no character is escaped there."""
    return "" if value is None else str(value).encode(errors="backslashreplace").decode()


def differing(these: Mapping, those: Mapping) -> list[str]:
    """The columns that both have, and not the same in them."""
    return [column for column in these if column in those and these[column] != those[column]]


def some(values: Mapping, columns: list[str]) -> str:
    more = f" and {len(columns) - MOST} more" if len(columns) > MOST else ""
    return ", ".join(f"{column}={values[column]}" for column in columns[:MOST]) + more
