"""The results as a reader sees them: which columns, in which units, in which words. One list for the page's table and
for what a picture says of a mark."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.looks import colour
from analysis.tasks import is_wrong
from conf import meshes
from conf.columns import Column, columns
from conf.labels import swept, variant, where


@dataclass(frozen=True)
class Shown:
    """A column of the page's table: the column of results.csv by which it sorts, its heading, and its cells' text."""

    column: str
    head: str
    says: str
    text: Callable[[Mapping], str]


def spread(row: Mapping) -> str:
    return f"{row['step_ms_p10']:,.1f} to {row['step_ms_p90']:,.1f}"


OWN: dict[str, tuple[str, Callable[[Mapping], str]]] = {  # columns that a page alone shows, or shows in its own way
    "seq_len": ("seq_len", lambda row: f"{row['seq_len']:,.0f}"),
    "step_ms_p10": ("p10 to p90", spread),
    "max_seq_len": ("longest", lambda row: f"{row['max_seq_len']:,.0f}"),
    "loss_last": ("loss", lambda row: f"{row['loss_last']:.4f}"),
}
FORMULA = "analytic_comm_bytes"


def formula(column: Column) -> Callable[[Mapping], str]:
    return lambda row: "=" if row["comm_bytes"] == row[FORMULA] else column.text(row)


def shown(rows: Sequence[Mapping]) -> list[Shown]:
    """The columns that have a heading, and a value in some row."""
    found = []
    for column in (column.over(rows) for column in columns() if column.head or column.name in (*OWN, FORMULA)):
        head, text = OWN.get(column.name, (column.head, column.text))
        if column.name == FORMULA:
            head, text = "formula", formula(column)
        if any(has(row, column.name) for row in rows):
            found.append(Shown(column.name, head, column.says, text))
    return found


def has(row: Mapping, name: str) -> bool:
    value = row.get(name)
    return value is not None and value == value and value != ""


@dataclass(frozen=True)
class Line:
    """A row of the table: who it is, in words by which one filters, and the row of results.csv."""

    row: dict[str, Any]
    mesh: str
    keys: str  # in which it differs from others, beside its strategy and mesh
    status: str  # ok, oom or wrong
    colour: str
    peer: bool


def lines(rows: pd.DataFrame) -> list[Line]:
    table = rows.to_dict("records")
    among = swept(table)
    return [
        Line(
            row,
            where(row),
            variant(row, among),
            "wrong" if is_wrong(row["reason"]) else row["status"],
            colour(row["strategy"]),
            row["strategy"] in meshes.PEERS,
        )
        for row in table
    ]


def told(row: Mapping, first: str = "") -> str:
    """Of a mark in a picture: which configuration it is and, below, what it shows and every number of the table."""
    name = row["label"] if where(row) in row["label"] else f"{row['label']} {where(row)}"
    numbers = [f"{each.head} {each.text(row)}" for each in shown([row]) if each.column != FORMULA]
    return "\n".join([name, *([first] if first else []), *numbers])


def each_told(rows: pd.DataFrame) -> list[str]:
    return [told(row) for row in rows.to_dict("records")]


def parts_told(rows: pd.DataFrame, part: str, sizes: Iterable[float], of: str) -> list[str]:
    """The same of the parts of bars. of: their unit."""
    said = [f"{part}: {value:,.1f} {of}" if value >= 1000 else f"{part}: {value:.4g} {of}" for value in sizes]
    return [told(row, first) for row, first in zip(rows.to_dict("records"), said, strict=True)]
