"""Which rows may be compared: those that were asked for the same, on as many ranks of the same machine.

How it was done, strategy, mesh and whatever they were told, is what is compared. `single` has one rank whatever the
others have, and stands beside them all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.reading import Sweep
from conf.keys import Key, keys
from conf.labels import differing, labels, text, variant
from conf.words import WRONG

SECTIONS = (
    *("workload", "direction", "mode", "device", "cluster", "model", "data", "documents", "precision", "batch_size"),
    "search",
)
ASKED = [key for key in keys().values() if key.path.split(".")[0] in SECTIONS or key.path == "attention.window"]
MACHINE = "device_name"
OF_A_TASK = [*(key.column for key in ASKED), MACHINE]
MOST = 6  # that a page tells of


@dataclass(frozen=True)
class Task:
    """What was asked for, in the words in which it differs from others of its sweep; and the rows that did it.

    label: of these rows, what they differ in among themselves.
    """

    said: str
    rows: pd.DataFrame

    @property
    def ok(self) -> pd.DataFrame:
        return self.rows[self.rows.status == "ok"]


def grouped(rows: pd.DataFrame, columns: Iterable[str]) -> list[pd.DataFrame]:
    """The rows that have the same in all of these columns together."""
    values = [tuple(map(text, row)) for row in rows[list(columns)].astype(object).to_numpy()]
    return [part for _, part in rows.groupby(pd.Series(values, rows.index), sort=False)]


def alike(rows: pd.DataFrame) -> list[Task]:
    """Tasks at any length and on any number of ranks, those of most rows first."""
    among = [key for key in differing(rows.to_dict("records")) if key in ASKED]
    machines = rows[MACHINE].nunique() > 1
    parts = grouped(rows, OF_A_TASK)
    return [Task(words(part.iloc[0], among, machines), part) for part in sorted(parts, key=len, reverse=True)]


def words(row: pd.Series, among: Sequence[Key], machines: bool) -> str:
    return ", ".join(
        part for part in (variant(row.to_dict(), among).replace(" ", ", "), machines * row[MACHINE]) if part
    )


def at_longest(rows: pd.DataFrame) -> list[Task]:
    """Tasks, each at the longest sequence that most strategies were given and some could do. rows: ok, and oom."""
    found = []
    for task in alike(rows):
        several, one = task.rows[task.rows.strategy != "single"], task.rows[task.rows.strategy == "single"]
        ranks = several.world_size.unique() if len(several) else one.world_size.unique()
        for world_size in sorted(ranks):
            here = longest(pd.concat([several[several.world_size == world_size], one]).sort_index())
            if len(here):
                on = f"on {int(world_size):,} ranks" if world_size > 1 else ""
                at = f"seq_len={int(here.seq_len.iloc[0]):,}"
                said = " ".join(part for part in (at, on) if part)
                found.append(Task(", ".join(part for part in (said, task.said) if part), named(here)))
    return sorted(found, key=lambda task: len(task.rows), reverse=True)


def longest(rows: pd.DataFrame) -> pd.DataFrame:
    """Those at the longest sequence that most strategies were given, of the lengths that any could do."""
    given = rows.groupby("seq_len").strategy.nunique()
    given = given[given.index.isin(rows.seq_len[rows.status == "ok"])]
    return rows[rows.seq_len == max(given[given == given.max()].index, default=None)]


def having(sweep: Sweep, column: str) -> list[Task]:
    """Rows that have a value there; not those of search=max_seq_len, each of which is at a length of its own."""
    rows = sweep.steps[sweep.steps.max_seq_len.isna() & (sweep.steps[column].notna() | (sweep.steps.status == "oom"))]
    return [Task(task.said, task.ok) for task in at_longest(rows)]


def timed(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Those that have a time, measured or else predicted, the fastest first; and its column. A wrong result is none."""
    column = "step_ms_median" if rows.step_ms_median.notna().any() else "predicted_step_ms"
    right = rows[rows[column].notna() & ~rows.reason.map(is_wrong).astype(bool)]
    return right.sort_values(column, kind="stable"), column


def is_wrong(reason: str) -> bool:
    """Did the row with this reason compute something else than one process does?"""
    return reason.startswith(WRONG)


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """With labels that say what these rows differ in among themselves, and no more."""
    return rows.assign(label=labels(rows.to_dict("records")))
