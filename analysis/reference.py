"""docs/keys.md and docs/columns.md, from where keys and columns are declared: python -m analysis reference"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_origin

import pandas as pd

from analysis.columns import table_of
from analysis.table import as_pipes
from analysis.templates import TEMPLATES
from conf.columns import columns
from conf.groups import CHOSEN, OPEN, options, written
from conf.keys import MISSING, Key, keys, not_none, optional
from conf.labels import text
from conf.series import SERIES

KINDS: dict[Any, str] = {bool: "true or false", int: "whole number", float: "number", str: "text", list: "list"}
LEAST = {"least": "at least", "above": "more than"}


def write(folder: Path) -> str:
    """The pages that were written, a line each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages().items():
        (folder / name).write_text(page)
    return "\n".join(str(folder / name) for name in pages())


def pages() -> dict[str, str]:
    """File -> what stands in it."""
    said: dict[str, dict[str, str]] = {"keys.md": keys_by_part(), "columns.md": columns_by_file()}
    return {name: TEMPLATES.get_template(name).render(tables) for name, tables in said.items()}


def keys_by_part() -> dict[str, str]:
    means = {written(path): key.says for path, key in keys().items()} | {"sweep": "many configurations, in turn"}
    groups = (*CHOSEN, *OPEN)
    of_cluster = {path: key for path, key in keys().items() if path.startswith("cluster.")}
    others = {path: key for path, key in keys().items() if path not in {*CHOSEN.values(), *of_cluster}}
    rows = {
        "groups": [{"group": f"`{g}`", "may be": listed(options(g)), "meaning": means[g]} for g in groups],
        "keys": [row_of(key) for key in others.values()],
        "cluster": [row_of(key) for key in of_cluster.values()],
    }
    return {part: as_pipes(pd.DataFrame(of_part)) for part, of_part in rows.items()}


def row_of(key: Key) -> dict[str, str]:
    default = "the preset's" if key.default == MISSING else f"`{text(key.default) or 'null'}`"
    return {"key": f"`{key.path}`", "default": default, "may be": values_of(key), "meaning": key.says}


def values_of(key: Key) -> str:
    """What a key may be, in words."""
    if key.choices:
        return listed(key.choices)
    kind, rules = not_none(key.hint), key.declared.metadata
    least = [f"{words} {rules[bound]}" for bound, words in LEAST.items() if rules[bound] is not None]
    null = ["or null"] if optional(key.hint) else []
    return ", ".join([KINDS.get(get_origin(kind) or kind, "keys of its own"), *least, *null])


def listed(choices: Iterable) -> str:
    return ", ".join(f"`{choice}`" for choice in choices)


def columns_by_file() -> dict[str, str]:
    found = list(columns())
    named = {"results": [c for c in found if c.in_csv], "record": [c for c in found if not c.in_csv], **SERIES}
    return {name: as_pipes(table_of([(f"`{c.name}`", c) for c in of_file])) for name, of_file in named.items()}
