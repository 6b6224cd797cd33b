"""Two sweeps of the same configurations: what got faster, slower or bigger, beyond their spreads.

python -m analysis compare runs/A runs/B
"""

from pathlib import Path

import pandas as pd

from analysis import UserError
from analysis.reading import Sweep, load
from conf.keys import keys
from conf.labels import text

MAY_DIFFER = ("steps", "warmup", "timeout_s")  # how long it was measured, not what
SIZES = {"peak_bytes": "memory", "comm_bytes": "bytes sent"}


def compared(a: Sweep, b: Sweep) -> pd.DataFrame:
    """One row per configuration that ended well in both, ratios B / A, and a verdict."""
    both = matched(a.ok, b.ok)
    if both.empty:
        raise UserError(f"{a.folder} and {b.folder} have no configuration in common that ended well in both")
    table = []
    for _, row in both.iterrows():
        cells = {"configuration": row.label_a, "seq_len": int(row.seq_len_a)}
        verdicts = []
        if pd.notna(row.step_ms_median_a) and pd.notna(row.step_ms_median_b):
            for side in "ab":
                spread = f"{row[f'step_ms_p10_{side}']:.1f} to {row[f'step_ms_p90_{side}']:.1f}"
                cells[f"step ms {side.upper()}"] = f"{row[f'step_ms_median_{side}']:.1f} ({spread})"
            cells["time B/A"] = f"{row.step_ms_median_b / row.step_ms_median_a:.2f}"
            if row.step_ms_p10_b > row.step_ms_p90_a:
                verdicts.append("slower")
            elif row.step_ms_p90_b < row.step_ms_p10_a:
                verdicts.append("faster")
        for column, name in SIZES.items():
            before, after = row[f"{column}_a"], row[f"{column}_b"]
            if pd.notna(before) and pd.notna(after):
                cells[f"{name} B/A"] = f"{after / before:.3f}" if before else "-"
                if after != before:
                    verdicts.append(f"{'more' if after > before else 'less'} {name}")
        cells["verdict"] = ", ".join(verdicts) or "the same within the spread"
        table.append(cells)
    return pd.DataFrame(table).fillna("")


def matched(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Rows of the same configuration: the same run_id, or, between versions of the tool, the same in every key."""
    by_id = a.merge(b, on="run_id", suffixes=("_a", "_b"))
    if not by_id.empty:
        return by_id
    asked = [key for key in keys().values() if key.declared.metadata["identity"] and key.path not in MAY_DIFFER]
    columns = [key.column for key in asked if a[key.column].notna().any() and b[key.column].notna().any()]
    a, b = (rows.assign(key=[tuple(map(text, row)) for row in rows[columns].to_numpy(object)]) for rows in (a, b))
    return a.merge(b, on="key", suffixes=("_a", "_b"))


def printed(first: Path, second: Path) -> tuple[str, list[str]]:
    """The table with what is in one sweep only, and the problems of reading."""
    a, b = load(first), load(second)
    table = compared(a, b)
    notes = [f"A is {first}, B is {second}; a verdict on time needs p10 to p90 of the two not to overlap"]
    for here, there in ((a, b), (b, a)):
        alone = len(here.ok) - len(table)
        if alone > 0:
            notes.append(
                f"{alone} of {len(here.ok)} configurations of {here.folder} did not end well in {there.folder}"
            )
    return table.to_string(index=False) + "\n\n" + "\n".join(notes), a.problems + b.problems
