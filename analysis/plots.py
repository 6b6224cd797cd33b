"""The pictures of a report. Each function draws one from a sweep, or raises Unavailable and says why not.

Every axis has a unit, every strategy its colour and marker (analysis/looks.py), and a title says what to look for.
Marks that are configurations are told which: a page shows it where one points (analysis/interactive.py).
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, PercentFormatter

from analysis import fits, machine
from analysis.curves import Fit, Points
from analysis.interactive import marked
from analysis.looks import colour, marker
from analysis.reading import Sweep
from analysis.results import each_told, parts_told, told
from analysis.tasks import MACHINE, OF_A_TASK, Task, alike, at_longest, grouped, having, named, timed
from conf.keys import keys
from conf.labels import where
from conf.meshes import AXES, names
from conf.sizes import about, size, tokens, unit

BLUE, SKY, ORANGE, GREEN, ROSE, GREY = "#0072b2", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#bbbbbb"
KINDS = {"all_gather": BLUE, "reduce_scatter": SKY, "all_reduce": ORANGE, "all_to_all": GREEN, "p2p": ROSE}
# Of a predicted step what is computed, in greys; what is sent keeps its colours.
WORK = {
    "products": "#404040",
    "attention": "#787878",
    "kernels": "#b4b4b4",
    "optimizer": "#dadada",
    "launches": "#f0e0c0",
}
PARTS = {"params": BLUE, "grads": SKY, "optimizer": GREEN, "activation": ORANGE, "other": GREY}  # of memory
# Sections and keys on which losses depend: rows that have them in common train the same.
LEARNT = ("model", "data", "optim", "seq_len", "batch_size", "precision", "seed", "steps", "warmup")
plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e5e5e5",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "svg.hashsalt": "playground",  # the same picture is the same file
    }
)
SEEN = 0.002  # of a bar: what is less is not seen
MOST_BARS = 24  # a picture with more is not read
MOST_PANELS = 4  # tasks beside each other
SAME = 0.01  # bars of one length
BEYOND = 1.5  # of a GPU's memory, where bars are cut off
OF_A_GRID = ["strategy", "world_size", "seq_len", "tp"]


class Unavailable(Exception):
    """Why the sweep's data does not allow a picture, in one sentence."""


def style(label: str, strategy: str, lines: dict[str, int]) -> dict:
    """Colour and marker of the strategy; a strategy's further variants are dashed."""
    lines[strategy] = lines.get(strategy, -1) + 1
    dashes = ["-", "--", ":", "-."][lines[strategy] % 4]
    return {"color": colour(strategy), "marker": marker(strategy), "linestyle": dashes, "label": label, "markersize": 5}


def loss_curves(sweep: Sweep) -> Figure:
    """All losses over each other: they must coincide. Below, how far each is from the first."""
    trained = sweep.ok[sweep.ok.losses.map(lambda losses: isinstance(losses, list) and len(losses) > 0).astype(bool)]
    if trained.empty:
        raise Unavailable("Loss curves: no record holds the losses of its steps.")
    columns = [key.column for key in keys().values() if key.path.partition(".")[0] in LEARNT]
    alike = max(grouped(trained, columns), key=lambda rows: (rows.label.nunique(), rows.seq_len.iloc[0]))
    rows = [row for _, row in alike.iterrows()]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.5, 5), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    reference = np.array(rows[0].losses)
    steps = np.arange(1, len(reference) + 1)
    worst = 0.0
    lines: dict[str, int] = {}
    for n, row in enumerate(rows):
        losses = np.array(row.losses)
        far = np.abs(losses - reference) / np.abs(reference)
        worst = max(worst, far.max())
        how = style(row.label, row.strategy, lines)
        if len(rows) > MOST_BARS:
            how["label"] = None
        (line,) = top.plot(steps, losses, **how, linewidth=max(0.8, 5 - 4 * n / len(rows)), alpha=0.7)
        (below,) = bottom.plot(steps, np.maximum(far, 1e-9), **{**how, "label": None}, linewidth=1)
        marked(line, [f"{row.label}\nstep {n}: loss {loss:.6f}" for n, loss in enumerate(losses, 1)], row.label)
        marked(below, [f"{row.label}\nstep {n}: {off:.1e} off" for n, off in enumerate(far, 1)], row.label)
    top.set_ylabel("loss (nats a token)")
    several = f", {len(rows)} configurations" if len(rows) > MOST_BARS else ""
    at = f"seq_len={int(rows[0].seq_len)}{several}"
    top.set_title(f"One model, one loss at {at}: the largest distance is {worst:.1e}", loc="left")
    if len(rows) <= MOST_BARS:
        top.legend(ncols=2, fontsize=7)
    bottom.set_yscale("log")
    bottom.set_ylabel(f"distance from\n{rows[0].label}")
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    return figure


def group_but(rows: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    """Rows of configurations that differ in `column` alone, each under a label, sorted by it."""
    fixed = [key.column for key in keys().values() if key.declared.metadata["identity"] and key.column != column]
    return [(part.label.iloc[0], part.sort_values(column)) for part in grouped(rows, fixed)]


def time_and_throughput(sweep: Sweep) -> Figure:
    """Step time and tokens/s against the sequence length; where a line ends for want of memory, a cross."""
    rows = sweep.steps[sweep.steps.step_ms_median.notna() | (sweep.steps.status == "oom")]
    found = few([task for task in alike(rows) if task.ok.seq_len.nunique() > 1])
    if not found:
        raise Unavailable("Time against sequence length: the sweep has timed rows at fewer than two lengths.")
    figure, panels = plt.subplots(
        len(found), 2, figsize=(10, 0.6 + 3.4 * len(found)), layout="constrained", squeeze=False
    )
    for axes, task in zip(panels, found, strict=True):
        lines: dict[str, int] = {}
        named_rows = named(task.rows)
        timed, out = (named_rows[named_rows.status == status] for status in ("ok", "oom"))
        for label, part in group_but(timed, "seq_len"):
            how = style(label, part.strategy.iloc[0], lines)
            spread = [part.step_ms_median - part.step_ms_p10, part.step_ms_p90 - part.step_ms_median]
            times = axes[0].errorbar(part.seq_len, part.step_ms_median, yerr=spread, capsize=2, linewidth=1.2, **how)
            (rates,) = axes[1].plot(part.seq_len, part.tokens_per_s, linewidth=1.2, **how)
            for artist in (times, rates):
                marked(artist, each_told(part), label)
            lost = out[(out.label == label) & (out.seq_len > part.seq_len.max())]
            if not lost.empty:
                axes[0].annotate(
                    "out of memory", (part.seq_len.iloc[-1], part.step_ms_median.iloc[-1]), fontsize=7, color="#b00000"
                )
        for ax, what in zip(axes, ("step time (ms), median, p10 to p90", "tokens/s over all ranks"), strict=True):
            ax.set_xscale("log", base=2)
            ax.set_xticks(sorted(timed.seq_len.unique()))
            ax.xaxis.set_major_formatter(FuncFormatter(tokens))
            ax.minorticks_off()
            ax.set_xlabel("sequence length (tokens)")
            ax.set_ylabel(what)
            ax.set_ylim(bottom=0)
        axes[0].set_title(task.said or "Step time: lower is better", loc="left")
        axes[1].set_title("Throughput: higher is better", loc="left")
        axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def few(tasks: list[Task]) -> list[Task]:
    """As many as a picture has panels for; the last one says that there are more."""
    if len(tasks) <= MOST_PANELS:
        return tasks
    last = tasks[MOST_PANELS - 1]
    said = f"{last.said} (and {len(tasks) - MOST_PANELS} more, not drawn)"
    return [*tasks[: MOST_PANELS - 1], Task(said, last.rows)]


def bars(tasks: list[Task], value: str) -> list[Task]:
    """Rows for a bar each: all, or per strategy those with the least and the most, what is the same as one."""
    found = []
    for task in few(tasks):
        rows, said = task.rows, task.said
        if len(rows) > MOST_BARS:
            ordered = rows.sort_values(value).groupby("strategy", sort=False)
            ends = pd.concat([ordered.head(1), ordered.tail(1)]).index
            said += f"\n(of {len(rows)} configurations, each strategy's least and most;\nwhat is the same, once)"
            rows = once(rows[rows.index.isin(ends)], value)
        found.append(Task(said, rows))
    return found


def once(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """One row for all that differ in the strategy alone, and too little in the value to be seen: its label says so."""
    mesh = [row.label.removeprefix(row.strategy).strip() or where(row) for _, row in rows.iterrows()]
    labels: dict[int, str] = {}
    for at, part in rows.groupby(pd.Series(mesh, rows.index), sort=False):
        part = part.sort_values(value, kind="stable")
        for _, same in part.groupby((part[value].pct_change() > SAME).cumsum()):
            who = ", ".join(same.strategy) if len(same) <= 3 else f"{len(same)} strategies"
            labels[min(same.index)] = f"{who}: {at}" if len(same) > 1 else same.label.iloc[0]
    return rows.loc[sorted(labels)].assign(label=[labels[index] for index in sorted(labels)])


Parts = Mapping[str, tuple[np.ndarray, str]]  # of a bar: a name -> a size for each row, and its colour


def stacked(
    tasks: list[Task], title: str, of: str, parts_of: Callable[[pd.DataFrame], Parts]
) -> tuple[Figure, list[Axes]]:
    """A panel for each task; in it a bar for each row, made of parts, in units `of`."""
    lengths = [len(task.rows) for task in tasks]
    figure, panels = plt.subplots(
        len(tasks),
        1,
        figsize=(8.5, 0.9 + sum(0.3 * length + 0.45 for length in lengths)),
        height_ratios=[length + 0.6 for length in lengths],
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    axes, known = list(panels[:, 0]), set()
    for ax, task in zip(axes, tasks, strict=True):
        left = np.zeros(len(task.rows))
        for name, (sizes, shade) in parts_of(task.rows).items():
            if sizes.any():
                some = ax.barh(task.rows.label, sizes, left=left, color=shade, label=None if name in known else name)
                marked(some, parts_told(task.rows, name, sizes, of))
                known.add(name)
            left += sizes
        ax.invert_yaxis()
        ax.grid(False, axis="y")
        ax.set_title(task.said if len(tasks) > 1 else f"{title}, at {task.said}", loc="left")
    if len(tasks) > 1:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure, axes


def legend_below(figure: Figure) -> None:
    """As many lines as it takes, outside the axes, where the layout makes room for it."""
    figure.legend(ncols=5, fontsize=7, loc="outside lower center")


def memory_parts(sweep: Sweep) -> Figure:
    """The peak as a stack of its parts; bars that reach far beyond a GPU's memory are cut off there."""
    rows = sweep.steps[sweep.steps.peak_bytes.notna() & sweep.steps.max_seq_len.isna()]
    if rows.empty:
        raise Unavailable("Memory: no row has a peak at a length that was asked.")
    tasks = bars(at_longest(rows), "peak_bytes")
    room = (rows.capacity_bytes - rows.context_bytes.fillna(0)).max()
    peaks = pd.concat([task.rows.peak_bytes for task in tasks])
    end = min(peaks.max(), BEYOND * room) if room == room else peaks.max()
    of, name = unit(end)
    figure, axes = stacked(
        tasks,
        "What fills the memory",
        name,
        lambda rows: {
            part: (rows[f"{part.removesuffix('s')}_bytes"].to_numpy(dtype=float) / of, shade)
            for part, shade in PARTS.items()
        },
    )
    for n, (ax, task) in enumerate(zip(axes, tasks, strict=True)):
        if room == room:
            label = f"capacity less context, {size(room)}" if n == 0 else None
            ax.axvline(room / of, color="#b00000", linestyle="--", label=label)
            ax.set_xlim(0, 1.04 * end / of)
        for y, peak in enumerate(task.rows.peak_bytes):
            if peak > end:
                ax.text(end / of, y, f"{size(peak)} \u2192", ha="right", va="center", fontsize=8)
    axes[-1].set_xlabel(f"peak memory of the fullest rank ({name})")
    legend_below(figure)
    return figure


def bytes_sent(sweep: Sweep) -> Figure:
    """What was counted, stacked by collective, and over it the formula's total as a mark."""
    tasks = bars(sending(sweep, "comm_bytes"), "comm_bytes")
    if not tasks:
        raise Unavailable("Bytes sent: no row sent anything.")
    if not sweep.comm:
        raise Unavailable("Bytes sent by collective: the folder has no comm.csv beside its records.")
    of, name = unit(max(task.rows.comm_bytes.max() for task in tasks))
    figure, axes = stacked(
        tasks,
        "Counted bytes end where the formula says",
        name,
        lambda rows: {
            kind: (np.array([sent_by(sweep, run_id, kind) for run_id in rows.run_id]) / of, shade)
            for kind, shade in KINDS.items()
        },
    )
    for n, (ax, task) in enumerate(zip(axes, tasks, strict=True)):
        analytic = task.rows[task.rows.analytic_comm_bytes.notna()]
        x, y = analytic.analytic_comm_bytes.astype(float) / of, analytic.label
        points = ax.scatter(x, y, marker="|", s=160, color="#000000", label="analytic" if n == 0 else None, zorder=3)
        marked(points, parts_told(analytic, "by formula", x, name))
    axes[-1].set_xlabel(f"sent by the busiest rank in a step ({name})")
    legend_below(figure)
    return figure


def bytes_by_tier(sweep: Sweep) -> Figure:
    """What stays on a host and what leaves it; placements of one mesh beside each other."""
    tasks = bars(sending(sweep, "comm_bytes_inter"), "comm_bytes_inter")
    if not tasks:
        raise Unavailable("Bytes by link tier: no row has ranks on several hosts.")
    tasks = [
        Task(
            task.said,
            task.rows.sort_values(["strategy", *AXES, "comm_bytes", "placement"], key=in_order, kind="stable"),
        )
        for task in tasks
    ]
    of, name = unit(max(task.rows.comm_bytes.max() for task in tasks))
    tiers = {"across hosts": ("comm_bytes_inter", ORANGE), "inside a host": ("comm_bytes_intra", SKY)}
    figure, axes = stacked(
        tasks,
        "What leaves a host",
        name,
        lambda rows: {tier: (rows[column].to_numpy(float) / of, shade) for tier, (column, shade) in tiers.items()},
    )
    axes[-1].set_xlabel(f"sent by a rank in a step ({name})")
    legend_below(figure)
    return figure


def sending(sweep: Sweep, column: str) -> list[Task]:
    """Tasks in which somebody sends, and who does."""
    tasks = (Task(task.said, task.rows[task.rows[column] > 0]) for task in having(sweep, column))
    return [task for task in tasks if len(task.rows)]


def in_order(column: pd.Series) -> pd.Series:
    """Strategies as they are read."""
    return column.map(names().index) if column.name == "strategy" else column


def sent_by(sweep: Sweep, run_id: str, kind: str) -> int:
    return sum(line["sent_bytes"] for line in sweep.comm.get(run_id, []) if line["kind"] == kind)


def ulysses_by_ring(sweep: Sweep) -> Figure:
    """Step time of every ulysses x ring over that of the best; what cannot stand is grey, and a letter says why."""
    rows = sweep.rows[sweep.rows.ulysses.notna() & sweep.rows.ring.notna()]
    found = [
        part
        for part in grouped(rows[(rows.status == "ok") & rows.step_ms_median.notna()], [*OF_A_GRID, *OF_A_TASK])
        if part.strategy.iloc[0] in ("usp", "tp_usp") and not part.duplicated(["ulysses", "ring"]).all()
    ]
    timed = max(found, key=lambda part: len(part.drop_duplicates(["ulysses", "ring"])), default=rows[:0])
    if len(timed.drop_duplicates(["ulysses", "ring"])) < 3:
        raise Unavailable("Ulysses x ring: the sweep has fewer than three meshes of usp.")
    best = timed.loc[timed.step_ms_median.idxmin()]
    refused = rows[rows.status == "invalid"].fillna({"tp": best.tp})
    refused = refused[(refused[OF_A_GRID] == best[OF_A_GRID]).all(axis=1)]
    grid = pd.concat([timed, refused])
    widths, rings = sorted(grid.ulysses.astype(int).unique()), sorted(grid.ring.astype(int).unique())
    figure, ax = plt.subplots(figsize=(3.4 + 0.95 * len(rings), 2 + 0.7 * len(widths)), layout="constrained")
    cells = timed.pivot_table(index="ulysses", columns="ring", values="step_ms_median", aggfunc="min")
    cells = cells.reindex(index=widths, columns=rings).to_numpy() / best.step_ms_median
    most = max(1.01, np.nanmax(cells))
    image = ax.imshow(cells, cmap="viridis_r", vmin=1, vmax=most)
    letters: dict[str, str] = {}
    for y, x in np.ndindex(cells.shape):
        if np.isnan(cells[y, x]):
            here = refused[(refused.ulysses == widths[y]) & (refused.ring == rings[x])]
            why = here.reason.iloc[0].partition("; ")[0] if len(here) else "was not run"
            said, ink = letters.setdefault(why, "abcdefghijklmnopqrstuvwxyz"[len(letters) % 26]), "#555555"
            ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#e8e8e8"))
        else:
            said, ink = f"{cells[y, x]:.2f}", "white" if cells[y, x] > (1 + most) / 2 else "black"
            here = timed[(timed.ulysses == widths[y]) & (timed.ring == rings[x])]
            why = told(here.loc[here.step_ms_median.idxmin()])
        marked(ax.text(x, y, said, ha="center", va="center", color=ink), [why])
    ax.set_xticks(range(len(rings)), rings)
    ax.set_yticks(range(len(widths)), widths)
    ax.set_xlabel("mesh.ring (ranks)")
    ax.set_ylabel("mesh.ulysses (ranks)")
    ax.grid(False)
    figure.colorbar(image, label="step time over the best", shrink=0.8)
    ax.set_title(
        f"{best.strategy} on {best.world_size:g} ranks: 1.00 is {best.step_ms_median:,.1f} ms a step,\n"
        f"of ulysses={best.ulysses:g} ring={best.ring:g}, the fastest of these meshes",
        loc="left",
    )
    if letters:
        said = "\n".join(
            textwrap.fill(f"{letter}  {why}", 76, subsequent_indent="    ") for why, letter in letters.items()
        )
        figure.supxlabel(said, x=0.02, ha="left", fontsize=7)
    return figure


def hatched(x: int, y: int, ink: str = "#dddddd") -> plt.Rectangle:
    """A cell of a grid that holds nothing."""
    return plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", edgecolor=ink, linewidth=0)


def scaling(sweep: Sweep, weak: bool) -> Figure:
    """Tokens/s against ranks: at one length (strong), or at one length a rank (weak)."""
    timed = sweep.ok[sweep.ok.step_ms_median.notna() & (sweep.ok.strategy != "single")]
    kind = "Weak" if weak else "Strong"
    task = max(alike(timed), key=lambda task: task.rows.world_size.nunique(), default=Task("", timed))
    timed = task.rows.copy()
    if timed.world_size.nunique() < 2:
        raise Unavailable(f"{kind} scaling: the sweep has timed rows on fewer than two numbers of ranks.")
    timed["per_rank"] = timed.seq_len // timed.world_size
    fixed = "per_rank" if weak else "seq_len"
    counts = timed.groupby(fixed).world_size.nunique()
    if counts.max() < 2:
        raise Unavailable(
            f"{kind} scaling: no {'length a rank' if weak else 'length'} was run on two numbers of ranks."
        )
    chosen = max(counts[counts == counts.max()].index)
    timed = timed[timed[fixed] == chosen]
    figure, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
    lines: dict[str, int] = {}
    for strategy, part in timed.groupby("strategy", sort=False):
        best = part.sort_values("tokens_per_s").groupby("world_size").tail(1).sort_values("world_size")
        (line,) = ax.plot(best.world_size, best.tokens_per_s, linewidth=1.2, **style(strategy, strategy, lines))
        marked(line, each_told(best), strategy)
    ax.set_xticks(sorted(timed.world_size.unique()))
    ax.set_xlabel("ranks")
    ax.set_ylabel("tokens/s over all ranks")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=7)
    what = f"{chosen:,} tokens a rank" if weak else f"seq_len={chosen:,}"
    what += f", {task.said}" if task.said else ""
    ax.set_title(f"{kind} scaling at {what}: each strategy's best mesh", loc="left")
    return figure


def what_fits(sweep: Sweep) -> Figure:
    """Length by ranks, a panel for each strategy: the share of a GPU's memory that its best mesh holds."""
    rows = fits.weighed(sweep)
    rows = rows[rows.max_seq_len.isna()]
    if len(rows) < 2:
        raise Unavailable("What fits: fewer than two rows know a GPU's capacity.")
    task = alike(rows)[0]
    best = fits.best(task.rows)
    ranks, lengths = (sorted(best[column].astype(int).unique()) for column in ("world_size", "seq_len"))
    strategies = list(dict.fromkeys(best.strategy))
    across = min(4, len(strategies))
    down = -(-len(strategies) // across)
    size_of = (1.2 + across * (0.5 + 0.56 * len(ranks)), 0.9 + down * (0.6 + 0.34 * len(lengths)))
    figure, axes = plt.subplots(
        down, across, figsize=size_of, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(strategies) :]:
        ax.set_visible(False)
    for ax, strategy in zip(axes.flat, strategies, strict=False):
        part = best[best.strategy == strategy]
        shares = part.pivot(index="seq_len", columns="world_size", values="share").reindex(index=lengths, columns=ranks)
        shares = shares.to_numpy()
        image = ax.imshow(
            np.where(shares > 1, np.nan, shares), cmap="YlGnBu", vmin=0, vmax=1, origin="lower", aspect="auto"
        )
        for y, x in np.ndindex(shares.shape):
            if np.isnan(shares[y, x]):
                ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#eeeeee"))
                continue
            here = part[(part.seq_len == lengths[y]) & (part.world_size == ranks[x])].iloc[0]
            holds = [told(here, f"{here.share:.1%} of the memory")]
            if shares[y, x] > 1:
                marked(ax.add_patch(hatched(x, y, "#c06060")), holds)
            else:
                longest = y == max(np.flatnonzero(shares[:, x] <= 1))
                said = f"{tokens(lengths[y])}" if longest else f"{shares[y, x]:.0%}"
                how = {"fontweight": "bold", "fontsize": 9} if longest else {"fontsize": 7}
                ink = "white" if shares[y, x] > 0.6 else "black"
                marked(ax.text(x, y, said, ha="center", va="center", color=ink, **how), holds)
        ax.set_xticks(range(len(ranks)), [f"{n:,}" for n in ranks])
        ax.set_yticks(range(len(lengths)), [tokens(n) for n in lengths])
        ax.set_title(strategy, loc="left", color=colour(strategy), fontweight="bold")
        ax.grid(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, label=f"share of {size(task.rows.capacity_bytes.max())}")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    figure.supxlabel("ranks", fontsize=9)
    figure.supylabel("sequence length (tokens)", fontsize=9)
    said = f", {task.said}" if task.said else ""
    on = task.rows[MACHINE].iloc[0]
    figure.suptitle(
        f"What fits into the {size(task.rows.capacity_bytes.max())} of {on}{said}: in bold the longest that does",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def longest_that_fits(sweep: Sweep) -> Figure:
    """Of search=max_seq_len: strategy and ranks by what is kept for backward, a panel for each GPU and model."""
    asked = sweep.rows[sweep.rows.max_seq_len.notna()].copy()
    if len(asked) < 2:
        raise Unavailable("The longest sequence that fits: fewer than two rows have search=max_seq_len.")
    asked["kept"] = asked.recompute + asked.offload.map(lambda word: "" if word == "none" else " +\noffload")
    columns = list(dict.fromkeys(asked.kept.sort_values(key=how_much)))
    asked["who"] = asked.strategy + ", " + asked.world_size.astype(int).astype(str)
    lines = list(dict.fromkeys(asked.sort_values("world_size", kind="stable").who))
    panels = list(asked.groupby(["model", "cluster"], sort=False))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    size = (1.8 + 0.95 * len(columns) * across, 0.9 + down * (0.5 + 0.3 * len(lines)))
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", sharey=True, squeeze=False)
    highest = np.log2(asked.max_seq_len.max())
    for ax, ((model, cluster), part) in zip(axes.flat, panels, strict=False):
        best = part.pivot_table(index="who", columns="kept", values="max_seq_len", aggfunc="max")
        best = best.reindex(index=lines, columns=columns)
        shades = np.log2(best.clip(lower=1)).to_numpy()
        image = ax.imshow(shades, cmap="viridis", vmin=highest - 10, vmax=highest, aspect="auto")
        for y, x in np.ndindex(shades.shape):
            if np.isnan(shades[y, x]):
                ax.add_patch(hatched(x, y))
                continue
            ink = "black" if shades[y, x] > highest - 4 else "white"
            cell = ax.text(x, y, about(best.iloc[y, x]), ha="center", va="center", fontsize=8, color=ink)
            here = part[(part.who == lines[y]) & (part.kept == columns[x])]
            marked(cell, [told(here.loc[here.max_seq_len.idxmax()])])
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(lines)), lines)
        ax.set_title(f"{model} on {cluster}", loc="left", fontsize=9)
        ax.grid(False)
    ticks = list(range(int(highest), int(highest) - 10, -2))
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label="tokens of a sequence")
    bar.set_ticks(ticks, labels=[tokens(2**tick) for tick in ticks])
    figure.supxlabel("recompute (backward makes these again)", fontsize=9)
    figure.suptitle("The longest sequence that fits, each strategy's best mesh", x=0.01, ha="left", fontsize=10)
    return figure


def how_much(kept: pd.Series) -> pd.Series:
    """To sort by: what leaves most in a GPU's memory first."""
    order = keys()["recompute"].choices
    return kept.map(lambda words: order.index(words.split()[0]) + ("offload" in words) / 2)


def exposed(sweep: Sweep) -> Figure:
    """Step time as computation and communication that nothing hides."""
    tasks = bars(having(sweep, "exposed_comm_ms"), "step_ms_median")
    if not tasks:
        raise Unavailable("Compute and exposed communication: no row has exposed_comm_ms.")
    figure, axes = stacked(
        tasks,
        "What communication costs",
        "ms",
        lambda rows: {
            "computation": ((rows.step_ms_median - rows.exposed_comm_ms).to_numpy(float), BLUE),
            "exposed communication": (rows.exposed_comm_ms.to_numpy(float), ORANGE),
        },
    )
    axes[-1].set_xlabel("step time (ms)")
    legend_below(figure)
    return figure


def predicted_parts(sweep: Sweep) -> Figure:
    """Where a predicted step goes: what the device computes, and what it waits for."""
    tasks = bars(having(sweep, "predicted_step_ms"), "predicted_step_ms") if sweep.records else []
    if not tasks:
        raise Unavailable("Where a predicted step goes: no record has predicted_step_ms.")
    shades = {**WORK, **KINDS}

    def parts_of(rows: pd.DataFrame) -> Parts:
        parts = [sweep.records[run_id]["predicted_parts"] for run_id in rows.run_id]
        found = dict.fromkeys((which, name) for which in ("work", "exposed") for each in parts for name in each[which])
        sizes = {(which, name): np.array([each[which].get(name, 0.0) for each in parts]) for which, name in found}
        return {
            "waits: " * (which == "exposed") + name: (ms, shades.get(name, ROSE))
            for (which, name), ms in sizes.items()
            if ms.max() > SEEN * rows.predicted_step_ms.max()
        }

    figure, axes = stacked(tasks, "Where a predicted step goes", "ms", parts_of)
    axes[-1].set_xlabel("predicted step time (ms)")
    legend_below(figure)
    return figure


def pareto(sweep: Sweep) -> Figure:
    """Time against memory; the configurations that nothing beats in both are named."""
    _, column = timed(sweep.ok)
    tasks = [Task(task.said, timed(task.rows)[0]) for task in having(sweep, column)]
    tasks = few([task for task in tasks if len(task.rows) > 1 and task.rows.peak_bytes.notna().all()])
    if not tasks:
        raise Unavailable("Time against memory: no two rows that may be compared have both.")
    figure, panels = plt.subplots(
        len(tasks), 1, figsize=(7.5, 0.8 + 3.4 * len(tasks)), layout="constrained", squeeze=False
    )
    for ax, task in zip(panels[:, 0], tasks, strict=True):
        of, name = unit(task.rows.peak_bytes.max())
        for strategy, part in task.rows.groupby("strategy", sort=False):
            shade, mark = colour(strategy), marker(strategy)
            dots = ax.scatter(part.peak_bytes / of, part[column], color=shade, marker=mark, label=strategy)
            marked(dots, each_told(part), strategy)
        best = front_of(task.rows, column)
        ax.plot(best.peak_bytes / of, best[column], color="#999999", linewidth=1, zorder=0, drawstyle="steps-post")
        for n, (_, row) in enumerate(best.iterrows(), 1):
            point = row.peak_bytes / of, row[column]
            ax.annotate(str(n), point, xytext=(-9, -9), textcoords="offset points", fontsize=8, fontweight="bold")
        named_best = "\n".join(f"{n} {label}" for n, label in enumerate(best.label, 1))
        ax.text(1.02, 0.02, named_best, transform=ax.transAxes, fontsize=7.5, va="bottom")
        ax.set_ylabel("step time (ms)" if column == "step_ms_median" else "predicted step time (ms)")
        ax.set_xlabel(f"peak memory of the fullest rank ({name})")
        ax.set_ylim(0, 1.1 * task.rows[column].max())
        ax.margins(x=0.15)
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        ax.set_title(task.said, loc="left")
    figure.suptitle("Nothing beats those numbered in both", x=0.01, ha="left", fontsize=11)
    return figure


SIZES = {"s": 6, "^": 7, "v": 11, "o": 6}  # what is as even as another is seen behind it
LAYOUTS = {"contiguous": (ORANGE, "s"), "zigzag": (BLUE, "^"), "striped": (ROSE, "v"), "balanced": (GREEN, "o")}


def bytes_and_balance(sweep: Sweep) -> Figure:
    """Around a ring: what keys and values cost to send, against how evenly attention is shared out."""
    rows = sweep.ok[(sweep.ok.ring > 1) & sweep.ok.get("attention_work_max_by_mean", pd.Series(dtype=float)).notna()]
    if rows.empty or rows.ring_layout.nunique() < 2:
        raise Unavailable("Bytes against balance: no two layouts of a ring are in the sweep.")
    panels = grouped(rows, ["strategy", "ring", "world_size", "seq_len", "batch_size"])
    panels = sorted(panels, key=lambda part: -part.ring_layout.nunique())[:2]
    panels = sorted(panels, key=lambda part: part.world_size.iloc[0])
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), layout="constrained", squeeze=False)
    for ax, part in zip(axes[0], panels, strict=True):
        of, name = unit(part.comm_bytes_activations.max())
        for _, row in part.iterrows():
            shade, mark = LAYOUTS[row.ring_layout]
            face = shade if row.ring_kv == "needed" else "white"
            (dot,) = ax.plot(
                row.comm_bytes_activations / of,
                row.attention_work_max_by_mean,
                mark,
                color=shade,
                mfc=face,
                ms=SIZES[mark],
            )
            balance = f"attention's work, busiest rank over mean: {row.attention_work_max_by_mean:.3f}"
            marked(dot, [told(row, balance)], row.ring_layout)
        ax.set_xlim(left=0)
        ax.set_xlabel(f"activations sent by the busiest rank in a step ({name})")
        one = part.iloc[0]
        ax.set_title(f"{one.strategy}, ring={one.ring:g}, {tokens(one.seq_len)} tokens", loc="left")
    axes[0][0].set_ylabel("attention's work, busiest rank over mean")
    shown = [name for name in LAYOUTS if name in set(rows.ring_layout)]
    handles = [plt.Line2D([], [], color=LAYOUTS[name][0], marker=LAYOUTS[name][1], ls="", label=name) for name in shown]
    for kv in dict.fromkeys(rows.ring_kv):
        face = "black" if kv == "needed" else "white"
        handles.append(plt.Line2D([], [], color="black", mfc=face, marker="o", ls="", label=f"ring.kv={kv}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def front_of(rows: pd.DataFrame, time: str) -> pd.DataFrame:
    """The rows that no other beats in both step time, the column `time`, and peak memory, by memory."""
    front, fastest = [], float("inf")
    for index, row in rows.sort_values(["peak_bytes", time]).iterrows():
        if row[time] < fastest:
            front.append(index)
            fastest = row[time]
    return rows.loc[front]


# Of a machine: rates over sizes, with the curves of a clock where there are any.

Curves = Mapping[Any, Fit]
OF_KERNELS = {"norm": BLUE, "rotary": SKY, "swiglu": ORANGE, "merge": GREEN, "optimizer": ROSE, "copy": GREY}
OF_KERNELS |= {"other": "#000000", "products": BLUE, "attention_forward": ORANGE, "attention_backward": GREEN}


def over_size(
    groups: Mapping[Any, tuple[Points, dict]], curves: Curves, xlabel: str, ylabel: str, title: str
) -> Figure:
    """A group's points, and its curve if it has one: billions a second over what was done."""
    figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for key, (points, how) in groups.items():
        rates = points.work / points.us / 1000
        each = zip(points.work, points.us, rates, strict=True)
        of_each = [
            f"{how['label']}\n{work:,.0f} {points.unit} in {us:,.1f} us\n{rate:,.4g} G{points.unit}/s"
            for work, us, rate in each
        ]
        marked(ax.scatter(points.work, rates, s=16, **how), of_each, how["label"])
        if key in curves:
            x = np.geomspace(points.work.min(), points.work.max(), 200)
            ax.plot(x, x / curves[key].rate.us(x, np.maximum) / 1000, color=how["color"], linewidth=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    for put in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        put(LogFormatter(minor_thresholds=(1.5, 0.4)))
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.set_title(title, loc="left")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def flops_over_size(sweep: Sweep, curves: Curves = MappingProxyType({}), tile: int = 1) -> Figure:
    """What matrix products and attention reach."""
    found = {name: points for name, points in machine.of_kernels(sweep, tile).items() if points.unit == "FLOP"}
    if not found:
        raise Unavailable("FLOP/s over size: no row is of workload=kernels.")
    groups = {name: (points, {"color": OF_KERNELS[name], "label": name}) for name, points in found.items()}
    computed = "visible scores" if tile == 1 else f"scores in tiles of {tile} keys"
    xlabel = f"FLOPs; of attention, of {computed}"
    return over_size(groups, curves, xlabel, "GFLOP/s of a rank", "Larger products run nearer to the peak")


def bytes_over_size(sweep: Sweep, curves: Curves = MappingProxyType({})) -> Figure:
    """What the other kernels reach."""
    found = {name: points for name, points in machine.of_kernels(sweep).items() if points.unit == "B"}
    if not found:
        raise Unavailable("Kernels' bytes over size: no row is of workload=kernels.")
    groups = {name: (points, {"color": OF_KERNELS[name], "label": name}) for name, points in found.items()}
    title = "Small kernels wait for their call, large ones for memory"
    return over_size(groups, curves, "bytes read and written", "GB/s of a rank", title)


def bandwidth_over_size(sweep: Sweep, curves: Curves = MappingProxyType({})) -> Figure:
    """The bus bandwidth of each kind of collective and group."""
    found = machine.of_links(sweep)
    if not found:
        raise Unavailable("Bandwidth over size: no row is of workload=collectives.")
    groups_of = sorted({(tier, number) for tier, _, number in found}, key=str)
    groups = {}
    for (tier, kind, number), points in found.items():
        over = f"{number} {'ranks' if tier == 'intra' else 'nodes'}"
        how = {
            "color": KINDS[kind],
            "marker": "os^Dvp*X"[groups_of.index((tier, number)) % 8],
            "label": f"{kind}, {over}",
        }
        groups[tier, kind, number] = (points, how)
    title = "Bandwidth grows with size, up to the links'"
    return over_size(groups, curves, "bytes that a rank sends", "bus bandwidth (GB/s)", title)


PLOTS: dict[str, tuple[Callable[[Sweep], Figure], str]] = {
    "loss_curves": (
        loss_curves,
        "Every strategy trains the same model on the same tokens, so the curves lie on each other.",
    ),
    "time_and_throughput": (
        time_and_throughput,
        "Medians over the timed steps of the slowest rank; bars reach from p10 to p90.",
    ),
    "memory_parts": (
        memory_parts,
        "Params, grads and optimizer are the rank's share of the state; activations were kept "
        "from forward for backward; the rest is gathered weights and buffers.",
    ),
    "bytes_sent": (
        bytes_sent,
        "Bars are what the ledger counted on the busiest rank, by collective; the black mark is the "
        "formula of the cost table.",
    ),
    "ulysses_by_ring": (ulysses_by_ring, "How ranks are best divided between trading heads and travelling keys, here."),
    "bytes_by_tier": (
        bytes_by_tier,
        "Of the rank that sends most to other hosts. Hosts are consecutive ranks; the mesh, placement and ring.inner "
        "decide which collectives stay on one, and where links differ that decides more than the sum.",
    ),
    "what_fits": (
        what_fits,
        "The share of a GPU's memory that the fullest rank holds, with what a process holds before it begins, on the "
        "strategy's best mesh of those asked. Hatched in red: out of memory; grey: not possible, or not asked.",
    ),
    "longest_that_fits": (
        longest_that_fits,
        "Simulated memory of the fullest rank, with what a process holds before it begins, against the GPU's. "
        "A dash: not even the shortest sequence fits; hatched: not asked, or not possible.",
    ),
    "strong_scaling": (partial(scaling, weak=False), "The same work on more ranks."),
    "weak_scaling": (partial(scaling, weak=True), "Work that grows with the ranks."),
    "exposed": (
        exposed,
        "Exposed is what the step takes longer than the same step with collectives that return at once.",
    ),
    "predicted_parts": (
        predicted_parts,
        "By the cluster's clock, nothing of it measured: in grey what the device computes, in colour what it waits for "
        "because no computation hides it.",
    ),
    "bytes_and_balance": (
        bytes_and_balance,
        "Down is more even, left sends less. Where documents are short, sending only keys that are needed (filled) "
        "saves most of it; who deals chunks out evenly takes documents apart, and sends more of them.",
    ),
    "pareto": (pareto, "Left is smaller, down is faster."),
    "flops_over_size": (flops_over_size, "Each point is the median over ranks that computed at the same time."),
    "bytes_over_size": (bytes_over_size, "Bytes as conf/series.py counts them, whatever is moved beside them."),
    "bandwidth_over_size": (bandwidth_over_size, "Bytes sent over time: the bus bandwidth of nccl-tests."),
}
OF_STEPS = [name for name in PLOTS if not name.endswith("_over_size")]


def draw_all(sweep: Sweep) -> tuple[dict[str, Figure], list[str]]:
    """Every picture that the data allows, and a sentence for each that it does not."""
    figures, left_out = {}, []
    asked = [name for name in PLOTS if (sweep.series if name not in OF_STEPS else not sweep.series or len(sweep.ok))]
    for name, (draw, _) in ((name, PLOTS[name]) for name in asked):
        try:
            figures[name] = draw(sweep)
        except Unavailable as reason:
            left_out.append(str(reason))
    return figures, left_out


def parity(
    points: Mapping[str, tuple[np.ndarray, np.ndarray]],
    colours: Mapping[str, str] = MappingProxyType({}),
    who: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Figure:
    """Predicted over measured, by what was measured. points: a name in the legend -> measured and predicted, in ms;
    who: which configurations these are."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    axes.axhspan(0.9, 1.1, color="#eeeeee")
    axes.axhline(1, color="black", linewidth=0.8)
    for n, (name, (measured, predicted)) in enumerate(points.items()):
        marks = "os^Dv<>ph*"[n % 10]
        (dots,) = axes.plot(
            measured, predicted / measured, marks, color=colours.get(name), label=name, markersize=5, alpha=0.8
        )
        each = zip(who.get(name, [name] * len(measured)), measured, predicted, strict=True)
        marked(dots, [f"{one}\nmeasured {ms:,.1f} ms\npredicted {guess:,.1f} ms" for one, ms, guess in each], name)
    axes.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted over measured")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        low, high = axis.get_view_interval()
        if high < 10 * low:  # no room for all of them otherwise, and no need
            axis.set_minor_formatter(plain)
    axes.set_title("Is what is predicted what was measured? The band is 10 % either way")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def winners(squares: pd.DataFrame) -> Figure:
    """A map of length and ranks, coloured by the strategy that is fastest of what fits (analysis/advise.py)."""
    ranks, tokens = (sorted(set(squares[name])) for name in ("ranks", "tokens"))
    figure, axes = plt.subplots(figsize=(1.4 + 1.6 * len(ranks), 1.2 + 0.62 * len(tokens)), layout="constrained")
    for square in squares.itertuples():
        x, y = ranks.index(square.ranks), tokens.index(square.tokens)
        face = colour(square.strategy) if square.strategy else "#eeeeee"
        axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor="white", alpha=0.75))
        said = f"{textwrap.fill(square.label, 18)}\n{square.ms:,.0f} ms" if square.strategy else "nothing fits"
        axes.text(x, y, said, ha="center", va="center", fontsize=8)
    axes.set(xlim=(-0.5, len(ranks) - 0.5), ylim=(-0.5, len(tokens) - 0.5), xlabel="ranks", ylabel="tokens")
    axes.set_xticks(range(len(ranks)), [f"{n:,}" for n in ranks])
    axes.set_yticks(range(len(tokens)), [f"{n:,}" for n in tokens])
    axes.set_title("Who is fastest, of what fits", loc="left")
    return figure


def save(figure: Figure, folder: Path, name: str) -> bytes:
    """As PNG and SVG -> the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=120, metadata={"Software": None})
    svg = svg_of(figure)
    (folder / f"{name}.svg").write_bytes(svg)
    return svg


def svg_of(figure: Figure) -> bytes:
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    plt.close(figure)
    return svg.getvalue()
