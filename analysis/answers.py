"""What a reader wants to know first: what fits, what is fastest, smallest, sends least, what choosing otherwise costs.

Only rows that were asked for the same are called anything beside each other (analysis/tasks.py).
"""

from dataclasses import dataclass

import pandas as pd

from analysis import fits
from analysis.plots import front_of
from analysis.reading import Sweep
from analysis.tasks import MOST, Task, at_longest, timed
from conf.sizes import size

NAMED = 3  # of several that are as good as each other
CLOSE = 0.05  # of a predicted time: the replay tells no closer


@dataclass(frozen=True)
class Answers:
    """Sentences under a heading; without one, of the whole sweep."""

    at: str
    sentences: list[str]


def answers(sweep: Sweep) -> list[Answers]:
    if sweep.ok.empty and sweep.series:
        return [
            Answers(
                "",
                [
                    "How fast this machine does what a step consists of: "
                    f"python -m analysis calibrate {sweep.folder} fits a cluster's clock to it."
                ],
            )
        ]
    if sweep.ok.empty:
        return [Answers("", ["Nothing was measured: no configuration ended well. The reasons are below."])]
    tasks = at_longest(sweep.steps[sweep.steps.max_seq_len.isna()])
    first = [sentence for sentence in (fits.in_short(sweep), lost(sweep)) if sentence]
    if len(tasks) > MOST:
        first.append(f"Of {len(tasks)} tasks that rows were given, those {MOST} of most rows:")
    found = [Answers("", first), *(Answers(task.said, of_task(task)) for task in tasks[:MOST])]
    return [each for each in found if each.sentences]


def of_task(task: Task) -> list[str]:
    return [*fitting(task.rows), *fastest(task.ok), *smallest(task.ok), *sending(task.ok), *front(task.ok)]


def fitting(rows: pd.DataFrame) -> list[str]:
    """How many of these do, and who does not."""
    rows = rows[rows.capacity_bytes.notna()]
    if rows.empty:
        return []
    said = fits.how_many(rows, size(rows.capacity_bytes.max()))
    out = rows[rows.fits == "oom"]
    if len(out):
        least = out.loc[out.peak_bytes.idxmin()]
        said += f"; what does not needs {size(least.peak_bytes)} ({least.label}) and more, and is not spoken of below"
    return [f"{said}."]


def fastest(rows: pd.DataFrame) -> list[str]:
    """And what cannot be told from it; what it sends; and one process beside it."""
    rows, column = timed(rows)
    if rows.empty:
        return []
    several, alone = rows[rows.strategy != "single"], rows[rows.strategy == "single"]
    several = several if len(several) else rows
    best = several.iloc[0]
    measured = column == "step_ms_median"
    ms, speed = best[column], best.tokens_per_s if measured else best.predicted_tokens_per_s
    equal = several[several[column] == ms]
    said = f"{'Fastest' if measured else 'Predicted fastest'} {being(equal)}: {time(ms)} a step, {speed:,.0f} tokens/s"
    close = several.step_ms_p10 <= best.step_ms_p90 if measured else several[column] <= ms * (1 + CLOSE)
    close = several[close & ~several.run_id.isin(equal.run_id)]
    if len(close):
        why = "whose p10 to p90 overlaps" if measured else f"within {CLOSE:.0%}, closer than the clock tells"
        said += f"; no clear winner over {listed(close)}, {why}"
    sentences = [f"{said}."]
    if len(alone) and len(several) and measured and alone[column].iloc[0] < ms:
        sentences.append(
            f"One process with all cores needs {time(alone[column].iloc[0])}: these ranks share one machine's cores, "
            "so their times say what the strategies cost each other, not what more machines bring."
        )
    if best.comm_bytes > 0 and pd.notna(best.comm_bytes_params):
        weights, grows = size(best.comm_bytes_params), "activations, which grow with the sequence"
        parts = f"{weights} of weights and their gradients, the same at every length, and {{}} of {grows}"
        parts = parts.format(size(best.comm_bytes_activations)) if best.comm_bytes_params else f"all of it {grows}"
        sentences.append(f"The fastest has to send {size(best.comm_bytes)}: {parts}.")
    return sentences


def smallest(rows: pd.DataFrame) -> list[str]:
    rows = rows[rows.peak_bytes.notna()]
    if rows.empty:
        return []
    small, large = extremes(rows, "peak_bytes")
    least, most = small.peak_bytes.iloc[0], large.peak_bytes.iloc[0]
    share = f", of which {small.activation_bytes.iloc[0] / least:.0%} are activations"
    said = f"Smallest {being(small)}: {size(least)} on its fullest rank{share}"
    return [f"{said}; largest {being(large)} with {size(most)}." if most > least else f"{said}."]


def sending(rows: pd.DataFrame) -> list[str]:
    rows = rows[rows.comm_bytes > 0]
    if rows.empty:
        return []
    few, many = extremes(rows, "comm_bytes")
    least, most = few.comm_bytes.iloc[0], many.comm_bytes.iloc[0]
    said = f"Least is sent by {listed(few)}{tie(few)}: {size(least)} a step from its busiest rank"
    if most == least:
        return [f"{said}."]
    return [f"{said}; most by {listed(many)}{tie(many)}: {size(most)}, {most / least:.1f} times as much."]


def front(rows: pd.DataFrame) -> list[str]:
    rows, column = timed(rows)
    if len(rows) < 2 or rows.peak_bytes.isna().any():
        return []
    best = front_of(rows, column)
    return [f"Worth choosing between, since nothing is both faster and smaller: {', '.join(best.label)}."]


def lost(sweep: Sweep) -> str:
    """How many configurations of which strategy are out of memory."""
    out = sweep.rows[sweep.rows.status == "oom"]
    if out.empty:
        return ""
    counts = ", ".join(f"{number} of {name}" for name, number in out.strategy.value_counts(sort=False).items())
    return f"Out of memory: {len(out)} configurations, {counts}."


def time(ms: float) -> str:
    return f"{ms:,.1f} ms" if ms < 10_000 else f"{ms / 1000:,.1f} s"


def extremes(rows: pd.DataFrame, column: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows that have the least, and those that have the most."""
    return rows[rows[column] == rows[column].min()], rows[rows[column] == rows[column].max()]


def listed(rows: pd.DataFrame) -> str:
    more = len(rows) - NAMED
    return ", ".join(rows.label.head(NAMED)) + (f" and {more} more" if more > 0 else "")


def tie(rows: pd.DataFrame) -> str:
    return " (an exact tie)" if len(rows) > 1 else ""


def being(rows: pd.DataFrame) -> str:
    return f"{'are' if len(rows) > 1 else 'is'} {listed(rows)}{tie(rows)}"
