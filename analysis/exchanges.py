"""Who sends what to whom in a block, drawn from what exchanges=true has seen (bench/instruments/exchanges.py).

    python -m analysis exchanges ulysses ring tp_sp [--run runs/NAME] [--out FILE.svg]

A row of a picture is a rank, a rectangle all of q, of x, of a matrix of weights. What a rank has of it is coloured by
the rank that made it, before and after a collective; blank is what it does not have. Where several have made a part of
the same numbers, which are to be added, their colours are striped. Areas are to scale.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from analysis import UserError
from analysis.examples import purest
from analysis.reading import Sweep, load
from conf.files import FileFault, size_of
from conf.labels import where

KEPT = Path(__file__).parents[1] / "runs" / "reference" / "exchanges"  # python -m bench -m sweep=exchanges
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#999999")  # Okabe and Ito's
KEYS = ("source", "line", "kind", "axis", "planes", "before", "after")
HEADS = ("q", "k", "v", "out", "lse")  # whose columns are heads
WIDTH, GUTTER, ROW, GAP = 360, 14, 26, 4
SMALL = 9  # pixels, in which no number would be readable
STRIPE = 4


@dataclass
class Panel:
    """One collective, or several alike: planes side by side, and what each rank has of them at every stage."""

    kind: str
    axis: str
    planes: list[dict[str, Any]]
    stages: list[list[list[list[int]]]]  # stage -> rank -> areas (plane, x, y, width, height, owners)

    def takes(self, exchange: dict[str, Any]) -> bool:
        """Does the exchange go on with what has arrived, or send something else of the same kind meanwhile?"""
        if (self.kind, self.axis) != (exchange["kind"], exchange["axis"]):
            return False
        if self.planes == exchange["planes"] and self.stages[-1] == exchange["before"]:
            self.stages.append(exchange["after"])
            return True
        given = exchange["before"], exchange["after"]
        ours, theirs = outline(self.planes, self.stages, 0), outline(exchange["planes"], given, -1)
        if ours != theirs or any(plane in self.planes for plane in exchange["planes"]):
            return False
        for stage, added in zip(self.stages, given, strict=True):
            for areas, new in zip(stage, added, strict=True):
                areas.extend([plane + len(self.planes), *area] for plane, *area in new)
        self.planes = [*self.planes, *exchange["planes"]]
        return True

    @property
    def title(self) -> str:
        names = ", ".join(called(plane) for plane in self.planes)
        if all(plane["weights"] for plane in self.planes):
            names = f"weights {names}" if len(self.planes) < 6 else "a block's weights"
        what = "hops" if self.kind == "p2p" else self.kind
        return f"{names}: {what} over {self.axis}"

    @property
    def axes(self) -> str:
        """What is across, and what is down."""
        if all(plane["weights"] for plane in self.planes):
            return "rows → columns ↓"
        return f"tokens → {'heads' if all(plane['name'] in HEADS for plane in self.planes) else 'columns'} ↓"

    @property
    def captions(self) -> list[str]:
        hops = len(self.stages) - 1
        return ["before", "after"] if hops == 1 else ["before", *(f"after hop {n + 1}" for n in range(hops))]


@dataclass
class Pictured:
    """What is known of a strategy: the setting, and the exchanges of a block in their order."""

    setting: str
    exchanges: list[dict[str, Any]] = field(default_factory=list)

    def by_line(self) -> dict[tuple[str, str], list[Panel]]:
        """The panels of each (source, line)."""
        lines: dict[tuple[str, str], list[dict]] = {}
        for exchange in self.exchanges:
            lines.setdefault((exchange["source"], exchange["line"]), []).append(exchange)
        return {line: panels(found) for line, found in lines.items()}


def outline(planes: list[dict[str, Any]], stages: Iterable[list[list[list[int]]]], which: int) -> list[Any]:
    """What each rank has of a plane, in parts of it, at every stage."""
    number, (x, y) = range(len(planes))[which], (planes[which]["x"], planes[which]["y"])
    return [
        [[(a / x, b / y, w / x, h / y, owners) for p, a, b, w, h, owners in areas if p == number] for areas in ranks]
        for ranks in stages
    ]


def called(plane: dict[str, Any]) -> str:
    name = plane["name"]
    return name if plane["weights"] or name in (*HEADS, "x") else f"output of {name}"


def panels(exchanges: Iterable[dict[str, Any]]) -> list[Panel]:
    """Of exchanges in a row, those that belong together in one."""
    found: list[Panel] = []
    for exchange in exchanges:
        if not found or not found[-1].takes(exchange):
            stages = [[list(areas) for areas in exchange[when]] for when in ("before", "after")]
            found.append(Panel(exchange["kind"], exchange["axis"], exchange["planes"], stages))
    return found


def pictured(strategy: str, sweep: Sweep | None) -> Pictured | None:
    """The exchanges that a sweep has of a strategy, or else those that are kept. Raises UserError."""
    for each in (sweep, kept()):
        if each is None:
            continue
        rows = each.ok[each.ok.strategy == strategy]
        rows = rows[[file_of(each, run_id).exists() for run_id in rows.run_id]]
        if not rows.empty:
            (row,) = rows.loc[[purest(strategy, rows).name]].to_dict("records")
            return Pictured(f"{where(row)}, seq_len={row['seq_len']:,.0f}", read(file_of(each, row["run_id"])))
    return None


@cache
def kept() -> Sweep | None:
    """Those of the reference, read once for all strategies."""
    return load(KEPT) if KEPT.exists() else None


def file_of(sweep: Sweep, run_id: str) -> Path:
    return sweep.folder / run_id / "exchanges.json"


def read(file: Path) -> list[dict[str, Any]]:
    try:
        size_of(file)
        return [{key: each[key] for key in KEYS} for each in json.loads(file.read_text())]
    except (OSError, FileFault, ValueError, KeyError, TypeError) as fault:
        raise UserError(f"{file}: cannot be read as exchanges ({type(fault).__name__}: {fault})") from None


def write(strategies: list[str], sweep: Sweep | None, out: Path) -> Path:
    """One picture of several strategies, a column each, in the order in which a block sends. Raises UserError."""
    columns, height = [], 0
    for number, strategy in enumerate(strategies):
        if (known := pictured(strategy, sweep)) is None:
            raise UserError(
                f"nothing is known of {strategy}: python -m bench strategy={strategy} exchanges=true sees it"
            )
        y, parts = 46, [text(0, 14, strategy, 'font-size="14" font-weight="bold"'), text(0, 30, known.setting, SOFT)]
        for place, panel in enumerate(panels(known.exchanges)):
            tall, inside = drawn(panel, f"{strategy}-{place}")
            parts.append(f'<g transform="translate(0 {y})"><title>{escape(said(panel))}</title>{inside}</g>')
            y += tall + 14
        columns.append(f'<g transform="translate({number * (WIDTH + 24)} 0)">{"".join(parts)}</g>')
        height = max(height, y)
    box = f"-12 -12 {len(strategies) * (WIDTH + 24)} {height + 6}"
    title = f"<title>Who sends what to whom: {', '.join(strategies)}</title>"
    ground = f'<rect x="-12" y="-12" width="100%" height="100%" fill="{WHITE}"/>'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'<svg {SVG} viewBox="{box}">{title}{ground}{"".join(columns)}</svg>\n')
    return out


def svg(panel: Panel, name: str) -> str:
    """A panel as a picture by itself. name: unlike all others on its page."""
    height, inside = drawn(panel, name)
    title = f'<title id="{name}-t">{escape(panel.title)}. {escape(said(panel))}</title>'
    return f'<svg {SVG} role="img" aria-labelledby="{name}-t" viewBox="0 0 {WIDTH} {height}">{title}{inside}</svg>'


def said(panel: Panel) -> str:
    """The picture in words."""
    sentences = []
    for caption, ranks in zip(panel.captions, panel.stages, strict=True):
        has = []
        for rank, areas in enumerate(ranks):
            owners = sorted({owner for area in areas for owner in owners_of(area[-1])})
            share = sum(w * h for _, _, _, w, h, _ in areas) / sum(p["x"] * p["y"] for p in panel.planes)
            has.append(f"rank {rank} has {share:.0%}, made by {', '.join(map(str, owners)) or 'nobody'}")
        sentences.append(f"{caption.capitalize()}: {'; '.join(has)}.")
    return " ".join(sentences)


def owners_of(bits: int) -> list[int]:
    return [rank for rank in range(len(COLOURS)) if bits >> rank & 1]


def drawn(panel: Panel, name: str) -> tuple[int, str]:
    """A panel's height, and what is in it: white frames, areas by their owners, and what is written over them."""
    ranks, top = range(len(panel.stages[0])), 31 if len(panel.planes) == 1 else 42
    each = (WIDTH - 1 - GUTTER - 2 * GAP * (len(panel.stages) - 1)) / len(panel.stages)
    frames, by_owners, written = "", dict[int, str](), []
    for number, stage in enumerate(panel.stages):
        left = GUTTER + number * (each + 2 * GAP)
        written.append(text(left, 25, panel.captions[number], SOFT))
        for plane, (x, width) in zip(panel.planes, spread(panel.planes, left, each), strict=True):
            if len(panel.planes) > 1 and width > 6 * len(plane["name"]):
                written.append(text(x + width / 2, 37, plane["name"], MIDDLE))
            for rank in ranks:
                y = top + rank * (ROW + GAP)
                frames += rectangle(x, y, width, ROW)
                for of, *at, owners in stage[rank]:
                    if panel.planes[of] is plane:
                        place = within(plane, at, x, y, width)
                        by_owners[owners] = by_owners.get(owners, "") + rectangle(*place)
                        written.extend(number_on(place, owners))
    fills = {owners: f"url(#{name}-{owners})" if len(owners_of(owners)) > 1 else None for owners in by_owners}
    patterns = "".join(stripes(owners, f"{name}-{owners}") for owners, fill in fills.items() if fill)
    coloured = "".join(
        f'<path d="{path}" fill="{fills[owners] or COLOURS[owners_of(owners)[0]]}"/>'
        for owners, path in by_owners.items()
    )
    axes = text(
        WIDTH, 25 if len(panel.stages) == 2 else 11, panel.axes, END
    )  # hops have many captions, and short titles
    titles = [text(0, 11, panel.title, 'font-size="11.5" font-weight="bold"'), axes]
    numbers = [text(GUTTER - 4, top + rank * (ROW + GAP) + ROW / 2 + 4, str(rank), END) for rank in ranks]
    frame = f'<path d="{frames}" fill="{WHITE}" stroke="#999"/>'
    return top + len(ranks) * (ROW + GAP), "".join([patterns, *titles, *numbers, frame, coloured, *written])


SVG = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="10"'
WHITE = "#ffffff"
SOFT = 'fill="#555"'
END = f'{SOFT} text-anchor="end"'
MIDDLE = 'text-anchor="middle"'
HALO = f'{MIDDLE} stroke="{WHITE}" stroke-width="3" paint-order="stroke"'


def text(x: float, y: float, said: str | int, looks: str) -> str:
    return f'<text x="{x:.4g}" y="{y:.4g}" {looks}>{escape(str(said))}</text>'


def rectangle(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.4g} {y:.4g}h{width:.4g}v{height:.4g}h-{width:.4g}z"


def spread(planes: list[dict[str, Any]], left: float, width: float) -> Iterator[tuple[float, float]]:
    """Where each plane begins, and its width: as many numbers, as much area."""
    room = width - 3 * (len(planes) - 1)
    total = sum(plane["x"] * plane["y"] for plane in planes)
    for plane in planes:
        share = room * plane["x"] * plane["y"] / total
        yield left, share
        left += share + 3


def within(plane: dict[str, Any], at: list[int], x: float, y: float, width: float) -> tuple[float, float, float, float]:
    """An area of a plane, in its frame."""
    across, down = width / plane["x"], ROW / plane["y"]
    return x + at[0] * across, y + at[1] * down, at[2] * across, at[3] * down


def number_on(place: tuple[float, float, float, float], owners: int) -> Iterator[str]:
    """Who made an area, or that it is a sum, where there is room to say it."""
    x, y, width, height = place
    if min(width, height) >= SMALL:
        one, *others = owners_of(owners)
        yield text(x + width / 2, y + height / 2 + 3.5, "Σ" if others else one, HALO if others else MIDDLE)


def stripes(owners: int, identity: str) -> str:
    """Slanted, a colour of each owner."""
    ranks = owners_of(owners)
    bars = "".join(
        f'<rect x="{place * STRIPE}" width="{STRIPE}" height="{STRIPE}" fill="{COLOURS[rank]}"/>'
        for place, rank in enumerate(ranks)
    )
    size = f'width="{STRIPE * len(ranks)}" height="{STRIPE}" patternUnits="userSpaceOnUse"'
    return f'<pattern id="{identity}" {size} patternTransform="rotate(45)">{bars}</pattern>'
