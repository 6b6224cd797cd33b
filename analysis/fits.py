"""What fits into a cluster's GPU: of each strategy and number of ranks the longest sequence, on its best mesh."""

from dataclasses import dataclass

import pandas as pd

from analysis.reading import Sweep
from analysis.tasks import Task, alike
from conf.sizes import about, size


@dataclass(frozen=True)
class Longest:
    """A table of one task: strategy by ranks, the longest sequence that fits, and the mesh on which it does."""

    said: str
    capacity: float  # bytes
    ranks: list[int]
    lines: dict[str, list[tuple[str, str]]]  # strategy -> of each number of ranks the length and the mesh


def weighed(sweep: Sweep) -> pd.DataFrame:
    """The rows whose memory is known, and a GPU's beside it; `share`: how much of it they hold."""
    rows = sweep.steps[sweep.steps.capacity_bytes.notna() & sweep.steps.peak_bytes.notna()]
    return rows.assign(share=(rows.peak_bytes + rows.context_bytes.fillna(0)) / rows.capacity_bytes)


def best(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each strategy, number of ranks and length the row that holds least."""
    return rows.loc[rows.groupby(["strategy", "world_size", "seq_len"], sort=False).share.idxmin()]


def longest(sweep: Sweep) -> list[Longest]:
    """A table for each task of several rows."""
    return [table(task) for task in alike(weighed(sweep)) if len(task.rows) > 1]


def table(task: Task) -> Longest:
    ranks = sorted(task.rows.world_size.unique())
    lines = {
        name: [cell(rows[rows.world_size == number]) for number in ranks]
        for name, rows in task.rows.groupby("strategy", sort=False)
    }
    return Longest(task.said, task.rows.capacity_bytes.max(), [int(number) for number in ranks], lines)


def cell(rows: pd.DataFrame) -> tuple[str, str]:
    """The longest that fits; "at least" where nothing longer was asked; a dash where nothing fits."""
    if rows.empty:
        return "", "not asked, or not possible"
    fitting = rows[(rows.fits != "oom") & (rows.max_seq_len != 0)]
    if fitting.empty:
        return "-", f"not even {about(rows.seq_len.min())} tokens fit"
    row = fitting.loc[fitting.seq_len.idxmax()]
    open_end = pd.isna(row.max_seq_len) and row.seq_len == rows.seq_len.max()
    return f"{'≥ ' if open_end else ''}{about(row.seq_len)}", f"{row.label}: {row.share:.0%} of the memory"


def in_short(sweep: Sweep) -> str:
    """Of all that was asked at a given length, how much fits."""
    rows = weighed(sweep)
    if (searched := rows[rows.max_seq_len > 0]).size:
        row = searched.loc[searched.max_seq_len.idxmax()]
        return (
            f"The longest sequence that fits has {row.max_seq_len:,.0f} tokens: {row.label}, {row.world_size:g} ranks."
        )
    if rows.empty:
        return ""
    capacity = " to ".join(dict.fromkeys(size(n) for n in sorted(rows.capacity_bytes.unique())))
    return f"{how_many(rows, f'{capacity} of a GPU')}."


def how_many(rows: pd.DataFrame, room: str) -> str:
    """Of these rows fit into a room, and how many of them only just."""
    fit, tight = int((rows.fits != "oom").sum()), int((rows.fits == "tight").sum())
    said = f"Of {len(rows)} configuration{'s' if len(rows) > 1 else ''} {fit} fit{'s' if fit == 1 else ''} into {room}"
    return f"{said}, {tight} of them with less than a tenth to spare" if tight else said
