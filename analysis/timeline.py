"""One block of a predicted step, drawn: python -m analysis timeline runs/NAME

A simulated row with profile=true has its whole step as a trace beside its record (bench/instruments/trace.py). Here is
a block from its middle, forward and backward: what the device computes, what each axis sends meanwhile, and in red what
is waited for.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import UserError
from analysis.plots import KINDS, WORK, save
from analysis.reading import load
from conf.files import FileFault, size_of
from conf.measurement import Span

WAITED = "#c00000"
WAYS = ("forward", "backward")


def printed(folder: Path) -> str:
    """Draw every row that has a trace; what the command prints."""
    sweep = load(folder)
    said = []
    for _, row in sweep.rows.iterrows():
        for file in sorted((folder / row.run_id).glob("trace_rank*.json")):
            if spans := predicted(file):
                save(drawn(spans, row.label), folder / "timeline", row.run_id)
                said.append(f"{in_short(spans, row)}\n  {folder / 'timeline' / row.run_id}.png, .svg; {file}")
                break
    if not said:
        raise UserError(f"{folder}: no row has a predicted step; mode=simulate cluster=h100 profile=true makes one")
    return "\n".join([*said, "The traces open in https://ui.perfetto.dev, beside those of measured rows."])


def predicted(file: Path) -> list[Span]:
    """The spans of a trace of a predicted step; none of a measured one. Raises UserError."""
    try:
        size_of(file)
        events = json.loads(file.read_text())["traceEvents"]
        lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        return [
            Span(lanes[event["tid"]], event["name"], event["ts"], event["ts"] + event["dur"])
            for event in events
            if event.get("cat") == "predicted"
        ]
    except (OSError, FileFault, ValueError, KeyError, TypeError) as fault:
        raise UserError(f"{file}: cannot be read as a trace ({type(fault).__name__}: {fault})") from None


def part(spans: list[Span], way: str) -> tuple[float, float]:
    """When the block in the middle of the model runs; of what has no blocks, when all of it does."""
    places = [span for span in spans if span.lane == "model" and span.name.startswith(way)]
    blocks = [span for span in places if "blocks" in span.name] or places
    middle = blocks[len(blocks) // 2]
    return middle.begun, middle.done


def within(spans: list[Span], begun: float, done: float) -> list[Span]:
    """What of the spans is in between, from there on."""
    cut = [Span(s.lane, s.name, max(s.begun, begun) - begun, min(s.done, done) - begun) for s in spans]
    return [span for span in cut if span.done > span.begun and span.lane != "model"]


def in_short(spans: list[Span], row: pd.Series) -> str:
    said = []
    for way in WAYS:
        begun, done = part(spans, way)
        waited = sum(s.done - s.begun for s in within(spans, begun, done) if s.lane == "exposed")
        said.append(f"{way} {(done - begun) / 1000:,.2f} ms, of which {waited / 1000:,.2f} waited")
    return f"{row.label}, a block: {'; '.join(said)}"


def drawn(spans: list[Span], label: str) -> Figure:
    """Forward above, backward below, in the same scale."""
    parts = {way: within(spans, *part(spans, way)) for way in WAYS}
    lanes = list(dict.fromkeys(s.lane for way in WAYS for s in parts[way] if s.lane not in ("compute", "exposed")))
    lanes = ["compute", *sorted(lanes, key=lambda lane: lane.startswith("FSDP2"))]
    figure, axes = plt.subplots(2, 1, figsize=(11, 1.6 + 0.75 * len(lanes)), sharex=True, layout="constrained")
    shown: dict[str, Any] = {}
    for ax, way in zip(axes, WAYS, strict=True):
        draw(ax, parts[way], lanes, shown)
        ax.set_title(way, loc="left", fontsize=9)
    axes[1].set_xlabel("ms since the block began")
    figure.suptitle(f"One block of {label}: what runs beside what, and in red what is waited for", x=0.01, ha="left")
    figure.legend(shown.values(), shown.keys(), ncols=8, fontsize=7, loc="outside lower center")
    return figure


def draw(ax: Axes, spans: list[Span], lanes: list[str], shown: dict[str, Any]) -> None:
    """A line for each lane; what the device waits for stands in its own."""
    kinds = dict.fromkeys((s.lane == "exposed", s.name) for s in spans)
    for waited, name in kinds:
        shade = WAITED if waited else {**WORK, **KINDS}.get(name, "#555555")
        for lane in lanes:
            here = [s for s in spans if s.name == name and s.lane == ("exposed" if waited else lane)]
            if here and (not waited or lane == "compute"):
                times = [(s.begun / 1000, (s.done - s.begun) / 1000) for s in here]
                bars = ax.broken_barh(times, (lanes.index(lane) - 0.4, 0.8), color=shade, linewidth=0)
                shown.setdefault("waited for" if waited else name, bars)
    ax.set_yticks(range(len(lanes)), lanes)
    ax.set_ylim(len(lanes) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
