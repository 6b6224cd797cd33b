"""How a row is called: its strategy, its mesh, and every key in which it differs from another row of its sweep.

Nobody lists these keys: they are found by comparing the rows. A title says all of them, a label those that are not as
by default. Rows are mappings from the columns of results.csv.
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from conf.columns import described
from conf.groups import written
from conf.keys import Config, Key, keys
from conf.meshes import AXES, PEERS, STRATEGIES, Footing, footing_of

Row = Mapping[str, Any]
SAID_ANYHOW = ("strategy.name", "world_size", "seq_len", *(f"mesh.{axis}" for axis in AXES))
# What is undecided in a configuration that was refused before; as are keys that its version did not know.
FILLED = ("attention.kernel", "model.head_dim", "launch.ranks_per_host", "grad_dtype")


def mesh(row: Row) -> str:
    """The degrees that are more than 1; of a configuration that was refused, all that were given; of a grid a row."""
    least = 1 if row.get("status") == "invalid" else 2
    degrees = [f"{axis}={int(row[axis])}" for axis in AXES if number(row.get(axis)) >= least]
    rows = footing(row).grid and number(row.get("ring")) > 1 and number(row.get("ring_inner"))
    return " ".join([*degrees, *([f"ring.inner={int(rows)}"] if rows else [])])


def footing(row: Row) -> Footing:
    """Where its strategy stands; of one that this version does not know nothing is said."""
    known = row["strategy"] in STRATEGIES or row["strategy"] in PEERS
    return footing_of(row["strategy"]) if known else Footing()


def follows(key: Key, row: Row) -> bool:
    """Is there nothing to say of it: has the strategy one value of it, or does the mesh say it?"""
    return key.path in footing(row).fixed or (key.path == "ring.inner" and footing(row).grid)


def where(row: Row) -> str:
    """The mesh, and around a ring its layout; and how many ranks there are, where the mesh does not say it."""
    layout = row["ring_layout"] if number(row.get("ring")) > 1 and row.get("ring_layout") else ""
    world_size = int(number(row.get("world_size")))
    ranks = prod(int(number(row.get(axis)) or 1) for axis in AXES)
    said = "" if ranks == world_size and world_size > 1 else f"world_size={world_size}"
    return " ".join(part for part in (mesh(row), layout, said) if part)


def number(value: Any) -> float:
    """A column's number; 0 where there is none."""
    return value if isinstance(value, (int, float)) and value == value else 0


def text(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return value if isinstance(value, str) else json.dumps(value)


def differing(rows: Sequence[Row]) -> list[Key]:
    """The keys in which two of the rows differ, but those that follow from another: a preset's sizes from its name."""
    return [
        key
        for key in keys().values()
        if key.declared.metadata["identity"] and any(len(values) > 1 for values in alternatives(rows, key).values())
    ]


def alternatives(rows: Sequence[Row], key: Key) -> dict[str, set[str]]:
    """The values of a key; if its section is a preset, of each preset apart."""
    preset = keys().get(f"{key.path.rpartition('.')[0]}.name", key)
    resolved = any(row.get("status") != "invalid" for row in rows)
    found: dict[str, set[str]] = {}
    for row in rows:
        value = text(row.get(key.column))
        undecided = key.column not in row or (key.path in FILLED and value in ("", "auto"))
        if not follows(key, row) and not (resolved and row.get("status") == "invalid" and undecided):
            found.setdefault("" if preset is key else text(row.get(preset.column)), set()).add(value)
    return found


def swept(rows: Sequence[Row]) -> list[Key]:
    """Those that a title does not say anyhow."""
    return [key for key in differing(rows) if key.path not in SAID_ANYHOW]


def swept_by(configs: Sequence[Config]) -> list[Key]:
    """The same of configurations that have not run yet."""
    return swept([described(config) for config in configs])


def variant(row: Row, among: Sequence[Key]) -> str:
    """What is special about a row, as it would be written on the command line."""
    said = [
        f"{written(key.path)}={text(row.get(key.column)) or 'null'}"
        for key in among
        if not follows(key, row) and not (key.path == "ring.layout" and number(row.get("ring")) > 1)  # with the mesh
    ]
    return " ".join(said)


def title(row: Row, among: Sequence[Key]) -> str:
    """What a row ran: its strategy, mesh and length, and what is special about it."""
    return " · ".join(
        part for part in (row["strategy"], where(row), f"seq_len={row['seq_len']}", variant(row, among)) if part
    )


def labels(rows: Sequence[Row]) -> list[str]:
    """A short name of each row, the same for rows that differ in their length alone: without what is as by default."""
    among = swept(rows)
    layouts = any(key.path == "ring.layout" for key in among)
    places: dict[str, set[str]] = {}
    for row in rows:
        places.setdefault(row["strategy"], set()).add(where(row))
    names = []
    for row in rows:
        several = len(places[row["strategy"]]) > 1 or " " in mesh(row) or layouts
        special = [key for key in among if text(row.get(key.column)) != text(key.default)]
        names.append(
            " ".join(part for part in (row["strategy"], where(row) if several else "", variant(row, special)) if part)
        )
    return names
