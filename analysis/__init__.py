"""The analytic cost table, and reading, comparing and drawing what was recorded. Needs no torch.

`analysis.load("runs/NAME")` is a sweep as a pandas DataFrame.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame


class UserError(Exception):
    """What a user should change, in one sentence."""


def load(folder: str | Path) -> "DataFrame":
    """A sweep, runs/NAME, as a DataFrame: a row per configuration, the oldest first, whatever its status.

    Its columns are `label`, a short name that tells the sweep's rows apart (the same for those that differ in their
    length alone), and those of `python -m analysis columns`; `.attrs["units"]` and `.attrs["meanings"]` have their unit
    and their meaning by name: times in ms, sizes in B. What is measured is float64, keys are Int64, float64 or boolean;
    what a row does not have is NaN or NA, and None of text. `losses`, `steps_ms` (without warm-up), `steps_bytes` and
    `round_ms` hold a list each, `errors` and `predicted_parts` a dict, `machines` a list of dicts: from record.json,
    and None where results.csv alone is left.

    Raises UserError where nothing can be read, and warns of what cannot.
    """
    from analysis import frame

    return frame.load(Path(folder))
