"""results.parquet beside results.csv, where pyarrow is installed: the same rows, typed, and with each step's numbers.

A column's unit and meaning are in its field's metadata. Objects (`machines`, `errors`) are in record.json alone.
"""

import importlib.util
import io
import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, get_args, get_origin

from conf.columns import Column, columns
from conf.keys import not_none

NAME = "results.parquet"
LARGEST = 2**63


@cache
def available() -> bool:
    return importlib.util.find_spec("pyarrow") is not None


def parquet(rows: Iterable[Mapping]) -> bytes:
    """Every row, the columns in the order of results.csv."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    wanted = [column for column in columns() if column.in_csv or of_each(column)]
    fields = [pa.field(c.name, typed(c.holds), metadata={"unit": c.unit, "meaning": c.says}) for c in wanted]
    values = [{c.name: cell(c, row.get(c.name)) for c in wanted} for row in rows]
    out = io.BytesIO()
    write_table(pa.Table.from_pylist(values, pa.schema(fields)), out)
    return out.getvalue()


def of_each(column: Column) -> bool:
    """Does it hold a number of each step, or round?"""
    return get_origin(column.holds) is list and not_none(get_args(column.holds)[0]) is float


def typed(hint: Any) -> Any:
    import pyarrow as pa

    hint = not_none(hint)
    if get_origin(hint) is list:
        return pa.list_(typed(get_args(hint)[0]))
    return {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(hint, pa.string())


def cell(column: Column, value: Any) -> Any:
    """As its type is; an object as JSON; of a row that was refused, nothing for a number that is none of 64 bits."""
    hint = not_none(column.holds)
    if hint is int and not -LARGEST <= (value or 0) < LARGEST:
        return None
    if value is None or isinstance(value, hint if isinstance(hint, type) and hint in (bool, int, str) else list):
        return value
    return float(value) if hint is float else json.dumps(value)
