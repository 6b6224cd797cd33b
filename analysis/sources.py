"""Strategies side by side: their own source in columns, section by section, and at each line what it sent.

    python -m analysis sources [tp_sp odysseus ulysses] [--run runs/NAME] [--out FILE]

The page holds every strategy that it is asked for and shows up to three of them, those that its address names
(sources.html#ring,ulysses), with the lines tinted that a neighbour does not have. The source is read as text, never
imported. What a strategy inherits is shown where it counts, marked with the file that it comes from. Bytes are those of
comm.csv of one measured step, divided by the number of blocks where a line belongs to a block.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from itertools import combinations
from pathlib import Path
from textwrap import dedent

import pandas as pd
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from analysis import UserError, exchanges
from analysis.accounts import account_of
from analysis.accounts.letters import Letters
from analysis.accounts.sent import SHORT, total
from analysis.examples import purest
from analysis.looks import colour
from analysis.reading import Sweep
from analysis.templates import TEMPLATES
from conf.columns import described
from conf.labels import mesh
from conf.sizes import size

ROOT = Path(__file__).parents[1]
IN_ATTENTION = ("attention", "core_attention", "inner_attention", "through_heads", "send_heads", "forward", "backward")
IN_BLOCK = (*IN_ATTENTION, "mlp")
SECTIONS = {  # title -> the methods and functions that it shows, in this order
    "split": ("split",),
    "shard": ("shard", "shard_mlp"),
    "attention": IN_ATTENTION,
    "mlp": ("mlp",),
    "embedding, head": ("embed", "loss"),
}
LEADING = re.compile(r"^(<[^>]*>)?\s+")


@dataclass
class Module:
    """A strategy's file: its text, its card, its class's parent, and where every method and function stands.

    forward and backward are those of an autograd.Function beside it.
    """

    path: str  # strategies/x.py
    lines: list[str]
    card: list[tuple[str, str]]
    title: str
    parent: str | None  # the strategies/y.py that holds the class inherited from
    imported: dict[str, str]  # a name -> the strategies/y.py that it comes from
    spans: dict[str, tuple[int, int]]


@cache
def module(path: str) -> Module:
    text = (ROOT / path).read_text()
    tree = ast.parse(text)
    imported = {
        alias.asname or alias.name: f"{(node.module or '').replace('.', '/')}.py"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and re.match(r"strategies\.(?!ops)", node.module or "")
        for alias in node.names
    }
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    own = next((each for each in classes if parent_of(each) in imported), classes[-1])
    bodies = [tree.body, *(each.body for each in classes if each is not own), own.body]
    spans = {node.name: span(node) for body in bodies for node in body if isinstance(node, ast.FunctionDef)}
    title, card = read_card(ast.get_docstring(tree) or "")
    return Module(path, text.splitlines(), card, title, imported.get(parent_of(own)), imported, spans)


def parent_of(node: ast.ClassDef) -> str:
    return ast.unparse(node.bases[0]) if node.bases else ""


def span(node: ast.FunctionDef) -> tuple[int, int]:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return first, node.end_lineno or first


def read_card(docstring: str) -> tuple[str, list[tuple[str, str]]]:
    """The first sentence, and the card's lines as (name, text)."""
    title, _, rest = docstring.partition("\n")
    card: list[tuple[str, str]] = []
    for line in rest.splitlines():
        if line.strip() and not line.startswith(" "):
            name, text = line[:16].strip(), line[16:].strip()
            card.append((name, text))
        elif line.strip():
            card[-1] = (card[-1][0], f"{card[-1][1]} {line.strip()}")
    return title, card


def find(path: str, name: str) -> Module | None:
    """The module that holds a strategy's method or helper: its own, its parent's, or that of a helper it imports."""
    here = module(path)
    if name in here.spans:
        return here
    if here.parent and (found := find(here.parent, name)) is not None:
        return found
    helpers = (module(where) for helper, where in here.imported.items() if helper in module(where).spans)
    return next((helper for helper in helpers if name in helper.spans), None)


@dataclass
class Chip:
    """What one line sent in one direction by one kind of collective."""

    arrow: str
    kind: str
    calls: str
    bytes: float

    @property
    def text(self) -> str:
        return f"{self.arrow} {self.calls}{SHORT[self.kind]} {size(self.bytes)}"


@dataclass(unsafe_hash=True)
class Entry:
    """A paragraph of a card, equal to those that say the same, and the other strategies on the page that have it."""

    name: str
    text: str
    shared: list[str] = field(default_factory=list, compare=False)


@dataclass(unsafe_hash=True)
class Line:
    """A line of source, equal to those of the same text, and the other strategies that have it at the same place."""

    text: str
    number: int = field(compare=False)
    html: str = field(compare=False)  # without its leading blanks
    indent: int = field(compare=False)
    shared: list[str] = field(default_factory=list, compare=False)
    chips: list[Chip] = field(default_factory=list, compare=False)
    pictures: list[str] = field(default_factory=list, compare=False)  # of what it sends, as svg
    counterpart: str = field(default="", compare=False)


@dataclass
class Part:
    """A method as it is shown: its lines, and the file that it is inherited from, if it is."""

    name: str
    lines: list[Line]
    inherited: str | None


@dataclass
class Column:
    """A strategy: its card, its parts by section, and the step that its numbers are from."""

    strategy: str
    colour: str
    title: str
    card: list[Entry]
    measured: str
    sums: list[tuple[str, str, str, bool]]  # what, counted, derived (empty without an account), are they equal
    sections: dict[str, list[Part]]
    drawn: str  # the setting of its pictures


def column(strategy: str, sweep: Sweep | None) -> Column:
    path = f"strategies/{strategy}.py"
    own = module(path)
    run = None if sweep is None else measured_row(strategy, sweep)
    sent, sums, where = ({}, [], "") if sweep is None or run is None else counted(path, run, sweep)
    known = exchanges.pictured(strategy, sweep)
    pictures = {} if known is None else placed_pictures(path, known)
    sections = {}
    for title, names in SECTIONS.items():
        sections[title] = [part for name in names if (part := shown(path, name, sent, pictures)) is not None]
    title = own.title.partition(": ")[2] or own.title
    card = [Entry(*said) for said in own.card]
    return Column(strategy, colour(strategy), title, card, where, sums, sections, known.setting if known else "")


def compare(columns: list[Column]) -> None:
    """Write at every line, and at every entry of a card, which of the other columns have it too (difflib's matches)."""
    for one, other in combinations(columns, 2):
        for mine, theirs in zip(texts(one), texts(other), strict=True):
            for i, j, length in SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks():
                for here, there in zip(mine[i : i + length], theirs[j : j + length], strict=True):
                    here.shared.append(other.strategy)
                    there.shared.append(one.strategy)


def texts(column: Column) -> list[Sequence[Entry | Line]]:
    """What is compared with other columns, each by itself: the card, and every section's lines."""
    return [column.card, *([line for part in parts for line in part.lines] for parts in column.sections.values())]


def shown(
    path: str, name: str, sent: dict[tuple[str, int], dict], pictures: dict[tuple[str, int], list[str]]
) -> Part | None:
    holder = find(path, name)
    if holder is None:
        return None
    first, last = holder.spans[name]
    source = dedent("\n".join(holder.lines[first - 1 : last]))
    html = highlight(source, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
    html = html.replace("(</span>", "(</span><wbr>").split("\n")  # where a name would be broken in a narrow column
    lines = []
    for offset, (text, marked) in enumerate(zip(source.split("\n"), html, strict=False)):
        line = Line(text, first + offset, LEADING.sub(r"\1", marked), len(text) - len(text.lstrip()))
        on_it = sent.get((holder.path, line.number), {})
        for (direction, kind), (calls, amount) in sorted(on_it.items(), reverse=True):
            times = "" if calls == 1 else f"{calls:g} "
            line.chips.append(Chip("→" if direction == "forward" else "←", kind, times, amount))
        if line.chips:
            line.counterpart = counterpart(name, text)
        line.pictures = pictures.get((holder.path, line.number), [])
        lines.append(line)
    return Part(name, lines, holder.path if holder.path != path else None)


def counterpart(name: str, text: str) -> str:
    """The place in a strategy that this line stands at: what another strategy sends there is its counterpart."""
    if "ring_attention(" in text:
        return "around the ring"
    side = "after" if text.strip().startswith("return") else "before"
    side = {"send_heads": "before", "through_heads": "after"}.get(name, side)
    if name in IN_ATTENTION:
        return f"{side} attention"
    return f"{side} the MLP" if name == "mlp" else name


def measured_row(strategy: str, sweep: Sweep) -> pd.Series | None:
    """The row whose bytes are shown: the strategy's longest plain training step of the sweep."""
    known = [run_id for run_id, lines in sweep.comm.items() if lines and run_id in sweep.configs]
    rows = sweep.ok[(sweep.ok.strategy == strategy) & (sweep.ok.workload == "step") & sweep.ok.run_id.isin(known)]
    if rows.empty:
        return None
    plain = rows[(rows.zero_stage == 3) & (rows.recompute == "none")]
    return purest(strategy, rows if plain.empty else plain)


def counted(path: str, row: pd.Series, sweep: Sweep) -> tuple[dict, list, str]:
    """What each line sent: (file, line) -> (direction, kind) -> [calls, bytes]; the block's sums; what was measured."""
    config = sweep.configs[row.run_id]
    layers = config.model.n_layers
    sent: dict[tuple[str, int], dict] = {}
    of_activations = of_weights = 0.0
    account = account_of(row.strategy)
    lines = account.of_block(Letters.of(config)) if account else []
    with_weights = {(line.kind, line.axis) for line in lines if line.weights}
    for entry in sweep.comm[row.run_id]:
        place = placed(path, entry["source"])
        if place is None:
            continue
        file, line, name = place
        shares = layers if name in IN_BLOCK or entry["source"].startswith("zero3 blocks.") else 1
        direction = "forward" if entry["phase"] == "forward" else "backward"
        if name == "shard" and entry["source"].startswith("zero3") and "blocks." not in entry["source"]:
            continue  # embedding and head: shown is a block's share
        slot = sent.setdefault((file, line), {}).setdefault((direction, entry["kind"]), [0, 0.0])
        slot[0] += entry["calls"] / shares
        slot[1] += entry["sent_bytes"] / shares
        if name in IN_BLOCK and (entry["kind"], entry["axis"]) not in with_weights:
            of_activations += entry["sent_bytes"] / shares
        elif name in IN_BLOCK or entry["source"].startswith("zero3 blocks."):
            of_weights += entry["sent_bytes"] / shares
    sums = []
    for what, amount, weights in (("activations", of_activations, False), ("weights", of_weights, True)):
        derived = total(lines, weights=weights)
        equal = abs(amount - derived) <= len(sweep.comm[row.run_id])
        sums.append((what, size(amount), size(derived) if account else "", equal))
    where = mesh(described(config)) or "one process"
    setting = f"{where}, seq_len={config.seq_len:,}, batch {config.batch_size}, {config.precision}"
    return sent, sums, f"model {config.model.name}, {setting}"


def placed(path: str, source: str) -> tuple[str, int, str] | None:
    """The line that a source of comm.csv is shown at: file, number and the method or function around it."""
    if source.startswith("zero"):
        return zero_line(path, "shard_mlp" if source.endswith(".mlp") else "shard")
    file, _, number = source.partition(":")
    if not number.isdigit():
        return None
    for name, (first, last) in module(file).spans.items():
        if first <= int(number) <= last:
            return file, int(number), name
    raise UserError(f"{source} is no line of a strategy's method any more: measure the run again with today's files")


def placed_pictures(path: str, known: exchanges.Pictured) -> dict[tuple[str, int], list[str]]:
    """(file, line) -> what is drawn of it: a line of the same text as when it was seen, or none."""
    found: dict[tuple[str, int], list[str]] = {}
    for (source, text), panels in known.by_line().items():
        if (place := place_of(path, source, text)) is not None:
            so_far = sum(len(pictures) for pictures in found.values())
            pictures = [exchanges.svg(panel, f"{Path(path).stem}-{so_far + n}") for n, panel in enumerate(panels)]
            found.setdefault(place, []).extend(pictures)
    return found


def place_of(path: str, source: str, text: str) -> tuple[str, int] | None:
    """Where the line is now: that of its text which is nearest to where it was."""
    if source.startswith("zero"):
        at = placed(path, source)
        return at and at[:2]
    file, _, number = source.partition(":")
    alike = [n for n, line in enumerate(module(file).lines, 1) if line.strip() == text]
    return (file, min(alike, key=lambda n: abs(n - int(number)))) if alike else None


def zero_line(path: str, name: str) -> tuple[str, int, str] | None:
    """The line that hands weights to ZeRO, or that asks the method that this one extends to."""
    here = module(path)
    first, last = here.spans.get(name, (1, 0))
    for line in range(first, last + 1):
        if any(words in here.lines[line - 1] for words in ("self.zero", f"super().{name}(")):
            return path, line, name
    return zero_line(here.parent, name) if here.parent else None


def write(strategies: list[str], sweep: Sweep | None, out: Path) -> Path:
    """The page, of all strategies where none is named.

    Raises UserError for a strategy without a file, and for a sweep that has no comm.csv.
    """
    known = sorted(p.stem for p in (ROOT / "strategies").glob("*.py") if p.stem not in ("__init__", "base"))
    for strategy in strategies:
        if strategy not in known:
            raise UserError(f"there is no strategies/{strategy}.py; there are {', '.join(known)}")
    if sweep is not None and not sweep.comm:
        raise UserError(f"{sweep.folder}: no comm.csv beside its records, so no line's bytes are known")
    columns = [column(strategy, sweep) for strategy in dict.fromkeys(strategies or known)]
    compare(columns)
    silent = [c.strategy for c in columns if sweep is not None and not c.measured and c.strategy != "single"]
    page = TEMPLATES.get_template("sources.html").render(
        columns=columns,
        sections=[title for title in SECTIONS if any(c.sections[title] for c in columns)],
        run=sweep and sweep.folder,
        silent=silent,
        pygments_css=HtmlFormatter(style="xcode").get_style_defs(".code"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    return out
