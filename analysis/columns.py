"""Every column of a row, with its unit and its meaning.

python -m analysis columns [--format text|markdown|latex|csv]
"""

import pandas as pd

from analysis.table import laid_out
from conf.columns import columns


def printed(format: str) -> str:
    table = pd.DataFrame([{"column": c.name, "unit": c.unit, "meaning": c.says} for c in columns()])
    return laid_out(table, format, in_text=aligned)


def aligned(table: pd.DataFrame) -> str:
    names, units = (table[column].str.len().max() for column in ("column", "unit"))
    return "\n".join(f"{name:{names}}  {unit:{units}}  {says}".rstrip() for name, unit, says in table.to_numpy())
