"""A sweep for people who go on with it in pandas: every column with its type, its unit and its meaning."""

import warnings
from pathlib import Path

import pandas as pd

from analysis import reading
from conf.columns import columns
from conf.keys import not_none

LARGEST = 2**63  # what was refused may be more
DTYPES = {bool: "boolean", int: "Int64", float: "float64"}


def load(folder: Path) -> pd.DataFrame:
    """What analysis.load says."""
    sweep = reading.load(folder)
    for problem in sweep.problems:
        warnings.warn(problem, stacklevel=3)
    known = columns()
    rows = sweep.rows[["label", *(column.name for column in known)]].copy()
    for column in known:
        holds = not_none(column.holds)
        values = rows[column.name]
        if holds in (int, float):
            numbers = pd.to_numeric(values)
            rows[column.name] = numbers.where(numbers.abs() < LARGEST).astype(DTYPES[holds])
        elif holds is bool:
            rows[column.name] = values.astype("boolean")
        else:
            rows[column.name] = values.astype(object).where(values.notna(), None)
    rows.attrs = {
        "units": {column.name: column.unit for column in known},
        "meanings": {column.name: column.says for column in known},
    }
    return rows
