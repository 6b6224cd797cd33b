"""What is drawn of exchanges is what the ledger counts, and says what each strategy is about."""

import os
import re
import subprocess
import sys
from collections import Counter
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from analysis import UserError, exchanges, sources
from analysis import __main__ as analysis
from analysis.reading import load
from bench.instruments.exchanges import Exchange
from bench.instruments.labels import field
from tests import instruments
from tests.cases import CASES, MASKED, MICRO, NEEDED, Case
from tests.ranks import on_ranks
from tests.test_ledger import SIZES

ROOT = Path(__file__).parents[1]
SEQ_LEN = 32
Line = tuple[str, str, str, int]  # a line, a kind of collective, along which axis, among how many ranks


def sent_and_arrived(rank: int, case: Case) -> tuple[dict[Line, float], list[tuple[Line | None, int]]]:
    """Bytes that this rank sends in forward, by line; and in order those that it has got, of lines that it sends on."""
    seen = instruments.exchanges(case, {**SIZES, "n_kv_heads": 4, "n_layers": 2}, SEQ_LEN)
    lines = {id(e): (e.source, e.kind, e.axis, e.group_size) for e in seen.entries.values()}
    sent = {lines[id(e)]: e.sent_bytes for e in seen.entries.values()}
    return sent, [(exchange.entry and lines[id(exchange.entry)], exchange.arrived) for exchange in seen.seen]


SEEN = [case for case in (*CASES, *MICRO, *NEEDED, *MASKED) if 1 < case.world_size <= 4]


@pytest.mark.parametrize("case", SEEN, ids=str)
def test_what_arrives_is_what_the_ledger_says_is_sent(case):
    sent: Counter = Counter()
    arrived: Counter = Counter()
    by_rank, in_order = zip(*on_ranks(case.world_size, sent_and_arrived, case), strict=True)
    for lines in by_rank:
        sent.update(lines)
    for exchange in zip(*in_order, strict=True):
        line = next((line for line, _ in exchange if line is not None), None)
        # Of an all_reduce every rank is given all parts here; the ledger's sends 2 / P of so much.
        arrived[line] += sum(size for _, size in exchange) * (2 / line[3] if line and line[1] == "all_reduce" else 1)
    assert sent or case.zero_stage < 2  # which has nothing to send before backward
    assert +arrived == pytest.approx(sent)


def of_a_block(rank: int, case: Case) -> list[Exchange]:
    seen = instruments.exchanges(case, {**SIZES, "n_kv_heads": 8, "n_layers": 2}, SEQ_LEN)
    return [exchange for exchange in seen.seen if exchange.in_block]


def places(labels: np.ndarray) -> set[tuple[int, int, int]]:
    """(x, y, owner) of labels."""
    return set(zip(*(field(labels, name).tolist() for name in ("x", "y", "owner")), strict=True))


def area(tokens: range, columns: range, owner: int | None = None) -> set[tuple[int, int, int]]:
    """The same of a rectangle; without an owner, each part of the sequence its own."""
    return {(x, y, x // PART if owner is None else owner) for x in tokens for y in columns}


DIM = SIZES["dim"]
PART = SEQ_LEN // 4


def test_ulysses_turns_tokens_into_heads_and_back():
    for rank, seen in enumerate(on_ranks(4, of_a_block, Case("ulysses", ulysses=4))):
        _, *qkv, out = seen
        tokens, heads = range(rank * PART, (rank + 1) * PART), range(rank * DIM // 4, (rank + 1) * DIM // 4)
        assert len(qkv) == 3
        for each in qkv:
            assert places(each.before) == area(tokens, range(DIM), rank)
            assert places(each.after) == area(range(SEQ_LEN), heads)
        assert places(out.before) == area(range(SEQ_LEN), heads, rank)
        assert places(out.after) == {(x, y, y // (DIM // 4)) for x in tokens for y in range(DIM)}


def test_the_ring_turns():
    for rank, (_, *hops) in enumerate(on_ranks(4, of_a_block, Case("ring", ring=4, layout="contiguous"))):
        assert len(hops) == 3
        for number, hop in enumerate(hops):
            for labels, source in ((hop.before, (rank - number) % 4), (hop.after, (rank - number - 1) % 4)):
                block = range(source * PART, (source + 1) * PART)
                assert places(labels) == area(block, range(DIM))


def test_tp_sp_gathers_tokens_and_scatters_sums():
    for rank, seen in enumerate(on_ranks(4, of_a_block, Case("tp_sp", tp=4))):
        own, whole = range(rank * PART, (rank + 1) * PART), range(SEQ_LEN)
        assert len(seen) == 4
        for gather, scatter in (seen[:2], seen[2:]):
            assert places(gather.before) == area(own, range(DIM), rank)
            assert places(gather.after) == area(whole, range(DIM))
            assert places(scatter.before) == area(whole, range(DIM), rank)
            assert places(scatter.after) == {place for owner in range(4) for place in area(own, range(DIM), owner)}


def test_weights_travel_and_tokens_stay():
    """Of tsp, q's, k's and v's: a quarter of their rows, then that of the rank before."""
    for rank, seen in enumerate(on_ranks(4, of_a_block, Case("tsp", ring=4, kv="all_gather"))):
        rows = {(x, owner) for x, _, owner in places(seen[0].after)}
        source = (rank - 1) % 4
        assert rows == {(x, source) for x in range(source * DIM // 4, (source + 1) * DIM // 4)}
        assert (field(seen[0].after, "plane") % 2 == 1).all()


KEPT = load(exchanges.KEPT)
STRATEGIES = KEPT.rows.strategy.tolist()
NAMESPACE = "{http://www.w3.org/2000/svg}"
RECTANGLE = re.compile(r"M[\d.]+ [\d.]+h([\d.]+)v([\d.]+)h-[\d.]+z")


@pytest.mark.slow
def test_what_is_kept_is_what_is_seen_today(tmp_path):
    """Where lines stand may differ. Renewed by what it runs: README.md says it."""
    command = [sys.executable, "-m", "bench", "-m", "sweep=exchanges"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    today = load(tmp_path / "runs" / "exchanges")
    assert today.rows.strategy.tolist() == STRATEGIES
    for strategy in STRATEGIES:
        new, old = (exchanges.pictured(strategy, sweep) for sweep in (today, KEPT))
        assert new.setting == old.setting
        for each in (*new.exchanges, *old.exchanges):
            each["source"] = each["source"].partition(":")[0]
        assert new.exchanges == old.exchanges, strategy


def test_the_readmes_picture_is_drawn_from_what_is_kept(tmp_path):
    """By the command that stands above it in docs/exchanges.md."""
    page = (ROOT / "docs" / "exchanges.md").read_text()
    command = re.search(r"python -m analysis (exchanges .* --out (docs/\S+))", page)
    assert f"]({command[2]})" in (ROOT / "README.md").read_text()
    assert f"]({command[2].removeprefix('docs/')})" in page
    words = [*command[1].split()[:-1], str(tmp_path / "x.svg")]
    assert analysis.run(analysis.parser().parse_args(words)) == 0
    assert (tmp_path / "x.svg").read_text() == (ROOT / command[2]).read_text()


def inked(path: str) -> float:
    found = RECTANGLE.findall(path)
    assert sum(len(match.group()) for match in RECTANGLE.finditer(path)) == len(path)
    return sum(float(width) * float(height) for width, height in found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_areas_are_to_scale_and_in_the_colours_of_their_owners(strategy):
    known = exchanges.pictured(strategy, KEPT)
    assert known.exchanges
    assert all(exchange["before"] != exchange["after"] for exchange in known.exchanges)
    found = [panel for panels in known.by_line().values() for panel in panels]
    assert sum(len(panel.stages) - 1 for panel in found) <= len(known.exchanges)
    for panel in found:
        picture = ElementTree.fromstring(exchanges.svg(panel, "p"))
        assert picture.find(f"{NAMESPACE}title").text.startswith(panel.title)
        frames, *areas = picture.findall(f"{NAMESPACE}path")
        ink = {path.get("fill"): inked(path.get("d")) for path in areas}
        numbers: Counter = Counter()
        for *_, width, height, owners in (area for ranks in panel.stages for rank in ranks for area in rank):
            ranks = exchanges.owners_of(owners)
            numbers[exchanges.COLOURS[ranks[0]] if len(ranks) == 1 else f"url(#p-{owners})"] += width * height
        frame = sum(p["x"] * p["y"] for p in panel.planes) * len(panel.stages) * len(panel.stages[0])
        scale = inked(frames.get("d")) / frame
        assert ink == pytest.approx({fill: n * scale for fill, n in numbers.items()}, rel=0.01)
        patterns = {f"url(#{pattern.get('id')})": pattern for pattern in picture.iter(f"{NAMESPACE}pattern")}
        assert patterns.keys() == {fill for fill in ink if fill.startswith("url")}


def test_hops_go_on_in_one_picture_and_what_travels_together_is_side_by_side():
    panels = {strategy: exchanges.panels(exchanges.pictured(strategy, KEPT).exchanges) for strategy in STRATEGIES}
    (_, hops), (_, there, back) = panels["ring"], panels["ulysses"]
    assert hops.captions == ["before", "after hop 1", "after hop 2", "after hop 3"]
    assert [plane["name"] for plane in there.planes] == ["q", "k", "v"]
    assert [plane["name"] for plane in back.planes] == ["out"]
    assert "rank 2 has 25%, made by 0, 1, 2, 3" in exchanges.said(there)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pictures_stand_at_the_lines_that_send(strategy, tmp_path):
    page = sources.write([strategy], None, tmp_path / "page.html").read_text()
    rows = page.partition("<article")[2].split('<div class="row')[1:]
    drawn = [
        (unescape(re.sub(r"<[^>]+>", "", row.partition('<span class="picture">')[0])), unescape(title))
        for row in rows
        for title in re.findall(r"<title[^>]*>([^.]*)\.", row)
    ]
    known = exchanges.pictured(strategy, None).by_line()
    assert len(drawn) == sum(len(panels) for panels in known.values())
    for (_, line), panels in known.items():
        texts = [line] if line else ["self.zero", "super().shard("]  # of ZeRO's, who hands it the weights
        at = [title for source, title in drawn if any(text in source for text in texts)]
        assert all(panel.title in at for panel in panels), line


def test_a_line_that_has_moved_is_found_and_one_that_has_changed_is_not():
    path = "strategies/ulysses.py"
    lines = (ROOT / path).read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if "arriving_k =" in line)
    assert sources.place_of(path, f"{path}:3", lines[number - 1].strip()) == (path, number)
    assert sources.place_of(path, f"{path}:{number}", "arriving_k = nothing") is None


@pytest.mark.parametrize("text", ["[", "[1]", '[{"source": "zero3 blocks.0"}]', "1"])
def test_what_cannot_be_read_is_a_sentence(text, tmp_path):
    (tmp_path / "exchanges.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read as exchanges"):
        exchanges.read(tmp_path / "exchanges.json")


def test_what_nobody_has_seen_is_not_drawn(tmp_path):
    with pytest.raises(UserError, match="strategy=constructor exchanges=true"):
        exchanges.write(["ring", "constructor"], None, tmp_path / "x.svg")
