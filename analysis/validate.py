"""Predicted times judged by measured ones: python -m analysis validate [published] [runs/mesh2 ...] [--out PAGE.md]

Constants are carried over from where they were published or calibrated. Beside that, one scalar is fitted to the `fit`
rows of each source, a framework on a GPU: by how much all of its times differ. Two baselines say what is easily had:
one constant FLOP rate, and always the widest Ulysses.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import plots, predict
from analysis.measured import PUBLISHED, Pair, figures, measured_here, priced, published
from analysis.templates import TEMPLATES
from conf.clock import LAUNCH_BOUND
from conf.resolve import resolve

NEAR = 0.05  # of the best: as good as it
WITHIN = 0.10
ENOUGH = 2048  # tokens a GPU, of which goals are told

Predictor = Callable[[Pair], float]  # a pair -> ms
PREDICTORS: dict[str, Predictor] = {
    "replay": lambda pair: pair.replayed,
    "closed form": lambda pair: getattr(predict.of_config(resolve(pair.config).config), pair.metric),
}


def errors(pairs: Sequence[Pair], guess: Predictor) -> np.ndarray:
    """Predicted over measured, less 1."""
    return np.array([guess(pair) / pair.ms - 1 for pair in pairs])


def told(errors: np.ndarray, head: str = "") -> dict[str, str]:
    far = np.abs(errors)
    return {
        f"{head}median": f"{np.median(far):.1%}",
        f"{head}worst": f"{far.max():.1%}",
        f"{head}within 10 %": f"{np.mean(far <= WITHIN):.0%}",
    }


def scalar(pairs: Sequence[Pair], guess: Predictor) -> dict[str, float]:
    """Source -> what its fit rows took over what was predicted, in the median; of sources that have some."""
    fit = sorted((pair for pair in pairs if pair.use == "fit"), key=lambda pair: pair.source)
    return {
        source: float(np.median([pair.ms / guess(pair) for pair in found]))
        for source, found in groupby(fit, lambda pair: pair.source)
    }


def with_scalar(found: Sequence[Pair], pairs: Sequence[Pair], guess: Predictor) -> np.ndarray:
    """Errors with the scalar of each source; of those found whose source has fit rows among all pairs."""
    by_source = scalar(pairs, guess)
    return errors(
        [pair for pair in found if pair.source in by_source], lambda pair: guess(pair) * by_source[pair.source]
    )


def flops(pair: Pair) -> float:
    """A time, if FLOPs were all that takes any: at one rate, which the source's scalar tells."""
    return float(pair.row["flops_per_rank"])


# Tables.


def by_source(pairs: Sequence[Pair], guess: Predictor) -> pd.DataFrame:
    """A line for each source and use, and one for all NVLink clusters."""
    return pd.DataFrame(
        {"source": source, "rows are": use, **line(found, pairs, guess)}
        for (source, use), found in [*parts(pairs), *summaries(pairs)]
    ).fillna("")


def parts(pairs: Sequence[Pair]) -> list[tuple[tuple[str, str], list[Pair]]]:
    def part(pair: Pair) -> tuple[str, str]:
        return pair.source, pair.use

    return [(key, list(found)) for key, found in groupby(sorted(pairs, key=part), part)]


def summaries(pairs: Sequence[Pair]) -> list[tuple[tuple[str, str], list[Pair]]]:
    """Of all NVLink clusters, the rows with tokens enough."""
    found = [pair for pair in pairs if "NVLink" in str(pair.row["cluster_intra_kind"]) and pair.tokens >= ENOUGH]
    uses = [(use, [pair for pair in found if pair.use == use]) for use in ("fit", "held out")]
    return [((f"all on NVLink, {ENOUGH // 1024}K tokens a GPU and more", use), rows) for use, rows in uses if rows]


def line(found: Sequence[Pair], pairs: Sequence[Pair], guess: Predictor) -> dict[str, Any]:
    """With constants as they are, with the scalars of fit rows, and with one FLOP rate of theirs, of whole steps."""
    cells: dict[str, Any] = {"rows": len(found), **told(errors(found, guess))}
    if (fitted := with_scalar(found, pairs, guess)).size:
        cells |= told(fitted, "one scalar: ")
    if (at_one_rate := with_scalar(steps(found), steps(pairs), flops)).size:
        cells["one FLOP rate: median"] = told(at_one_rate)["median"]
    return cells


def steps(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair.metric == "step"]


def by_group(pairs: Sequence[Pair], guess: Predictor) -> pd.DataFrame:
    """A line for each group that was measured under the same conditions: how well it is ranked, and its best found."""
    lines = []
    for (group, use), found in groups(pairs):
        ms = np.array([pair.ms for pair in found])
        cells: dict[str, Any] = {"group": group, "rows are": use, "rows": len(found)}
        for head, price in {"": guess, "one FLOP rate: ": flops}.items():
            values = np.array([price(pair) for pair in found])
            cells |= {f"{head}tau": tau(values, ms), f"{head}best": picked(values, ms)}
        wide = np.array([-float(pair.row["ulysses"]) for pair in found])
        lines.append(cells | ({"widest Ulysses: best": picked(wide, ms)} if np.ptp(wide) else {}))
    return pd.DataFrame(lines)


def groups(pairs: Sequence[Pair]) -> list[tuple[tuple[str, str], list[Pair]]]:
    def group(pair: Pair) -> tuple[str, str]:
        return pair.group, pair.use

    ranked = sorted((pair for pair in pairs if pair.group), key=group)
    return [(key, found) for key, rows in groupby(ranked, group) if len(found := list(rows)) > 1]


def tau(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Kendall's: of all pairs, the share in the same order less the share in the other. A tie in one is neither."""
    first, second = np.triu_indices(len(measured), 1)
    same = np.sign(predicted[first] - predicted[second]) * np.sign(measured[first] - measured[second])
    return float(same.mean())


def picked(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Is what is predicted to be best as good as the best? Where several are, the share of them."""
    best = predicted <= predicted.min() + 1e-9 * abs(predicted.min())
    return float(np.mean(measured[best] <= (1 + NEAR) * measured.min()))


# What is said.


def printed(sources: Sequence[str], calibration: Path, out: Path | None) -> str:
    """What the command prints; with out, it is a page, and its picture beside it."""
    pairs = [
        pair
        for source in sources
        for pair in (published() if source == PUBLISHED else measured_here(Path(source), calibration))
    ]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(pairs, out.stem))
        plots.save(plots.parity(points(pairs)), out.parent, out.stem)
    parts = [part for head, table in tables(pairs).items() for part in (head, table.to_string(index=False))]
    return "\n\n".join([*parts, *notes(pairs)])


def tables(pairs: Sequence[Pair]) -> dict[str, pd.DataFrame]:
    """What each predictor is worth: heads, and what stands below them."""
    found = {}
    for name, guess in PREDICTORS.items():
        found[f"Errors of the {name}"] = by_source(pairs, guess)
        if not (ranked := by_group(pairs, guess)).empty:
            found[f"Ranks of the {name}"] = ranked.map(shown)
            found[f"Best found by the {name}, as good as the best measured within {NEAR:.0%}"] = tally(ranked)
    return found


def shown(cell: object) -> object:
    """A share; nothing, where there is none."""
    return cell if not isinstance(cell, float) else "" if np.isnan(cell) else f"{cell:.2f}"


def tally(ranked: pd.DataFrame) -> pd.DataFrame:
    """In how many groups the best was found, by whom."""
    lines = []
    for head in ("", "one FLOP rate: ", "widest Ulysses: "):
        best = ranked.get(f"{head}best", pd.Series(dtype=float)).dropna()
        taus = ranked.get(f"{head}tau", pd.Series(dtype=float))
        lines.append(
            {
                "by": head.removesuffix(": ") or "predicted",
                "groups": len(best),
                "found": f"{best.sum():.1f}",
                "share": f"{best.mean():.0%}" if len(best) else "",
                "tau, median": f"{taus.median():.2f}" if len(taus) else "",
            }
        )
    return pd.DataFrame(lines)


def notes(pairs: Sequence[Pair]) -> list[str]:
    """What must be known of these figures."""
    found = []
    for (source, _), rows in parts(pairs):
        if spreads := [pair.spread for pair in rows if pair.spread is not None]:
            spread, error = np.median(spreads), np.median(np.abs(errors(rows, PREDICTORS["replay"])))
            found.append(
                f"{source}: its rows' steps spread (p10 to p90) over {spread:.1%} of their median, "
                f"{'more' if spread > error else 'less'} than the error."
            )
    if few := sum(pair.tokens < LAUNCH_BOUND for pair in pairs):
        found.append(
            f"{few} rows have less than {LAUNCH_BOUND // 1024}K tokens a GPU: their steps may wait for launches and "
            "start-ups, which are the least known figures of a clock."
        )
    gpus = Counter(pair.source for pair in figures() if not priced(pair))
    if any(pair.spread is None for pair in pairs):
        found += [f"Not priced, as no clock of it is known: {source}, {n} rows." for source, n in gpus.items()]
    return found


def points(pairs: Sequence[Pair]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of a parity picture: source and use -> measured ms, and predicted ones."""
    return {f"{source} ({use})": coordinates(found) for (source, use), found in parts(pairs)}


def coordinates(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Measured ms, and what the replay says."""
    return np.array([pair.ms for pair in pairs]), np.array([pair.replayed for pair in pairs])


def page(pairs: Sequence[Pair], name: str) -> str:
    rows = pd.DataFrame(
        {
            "source": pair.source,
            "rows are": pair.use,
            "of a": pair.metric,
            "measured ms": f"{pair.ms:,.4g}",
            "predicted ms": f"{pair.replayed:,.4g}",
            "error": f"{pair.replayed / pair.ms - 1:+.1%}",
            "simulated by": f"`{' '.join(pair.words)}`",
        }
        for pair in pairs
    )
    return TEMPLATES.get_template("validation.md").render(
        tables={head: table.to_markdown(index=False) for head, table in tables(pairs).items()},
        notes=notes(pairs),
        rows=rows.to_markdown(index=False),
        name=name,
        commands=list(dict.fromkeys(pair.source for pair in pairs)),
    )
