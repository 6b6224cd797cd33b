"""The row that shows most of a strategy, where one stands for all."""

import pandas as pd

from analysis import symbols
from analysis.accounts.letters import OF_AXES


def purest(strategy: str, rows: pd.DataFrame) -> pd.Series:
    """Of a strategy's rows the longest; of these one on all of the strategy's axes and no other, as far as there is."""
    own = [axis for axis, ranks in of_axes(strategy).items() if ranks != 1]
    other = [axis for axis in OF_AXES if axis not in own]
    wide = rows[[*OF_AXES]] > 1
    alone = wide[own].sum(axis=1) - wide[other].sum(axis=1)
    return rows.assign(alone=alone).sort_values(["seq_len", "alone"], ascending=False, kind="stable").iloc[0]


def of_axes(strategy: str) -> dict[str, object]:
    """axis -> its letter in the strategy's first line of the cost table, or 1; none without an account."""
    found = symbols.rows_of(strategy)
    return {axis: getattr(found[0].letters, letter) for axis, letter in OF_AXES.items()} if found else {}
