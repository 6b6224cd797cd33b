"""Every column of a row, with its unit and its meaning; then those of collectives.csv and kernels.csv.

python -m analysis columns [--format text|markdown|latex|csv]
"""

from collections.abc import Iterable

import pandas as pd

from analysis.table import laid_out
from conf.columns import Column, columns
from conf.series import SERIES


def printed(format: str) -> str:
    named = [(c.name, c) for c in columns()]
    named += [(f"{workload}.{c.name}", c) for workload, of_lines in SERIES.items() for c in of_lines]
    return laid_out(table_of(named), format, in_text=aligned)


def table_of(named: Iterable[tuple[str, Column]]) -> pd.DataFrame:
    return pd.DataFrame([{"column": name, "unit": c.unit, "meaning": c.says} for name, c in named])


def aligned(table: pd.DataFrame) -> str:
    names, units = (table[column].str.len().max() for column in ("column", "unit"))
    return "\n".join(f"{name:{names}}  {unit:{units}}  {says}".rstrip() for name, unit, says in table.to_numpy())
