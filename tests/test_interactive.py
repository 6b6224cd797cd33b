"""The report's pictures and tables, pointed at, filtered and sorted in a real browser: reports of what is in
runs/reference/, whose results.csv has what they must show."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import advise, sources
from analysis.reading import load
from analysis.report import write
from conf.labels import where
from conf.meshes import STRATEGIES
from tests.browser import CUT_OFF, opened

REFERENCE = Path(__file__).parents[1] / "runs" / "reference"
SWEEPS = ("quickstart", "mesh8", "simulate")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Path:
    """A folder of reports."""
    here = tmp_path_factory.mktemp("reports")
    for name in SWEEPS:
        (here / name).mkdir()
        shutil.copy(REFERENCE / name / "results.csv", here / name)
        write(here / name)
    return here


def page_of(reports: Path, name: str) -> Path:
    return reports / name / "report" / "index.html"


def stored(name: str) -> pd.DataFrame:
    """What the results of the page are to be."""
    return load(REFERENCE / name).steps.set_index("run_id")


def listed(page) -> list[str]:
    """run_ids in the order of the table."""
    return page.locator("#results-table tbody tr").evaluate_all("rows => rows.map(row => row.dataset.run)")


def number(said: str) -> float:
    return float(said.strip().lstrip("~").replace(",", ""))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", SWEEPS)
def test_a_page_opens_from_disk_whole_and_small(browser, reports, name, width):
    page, wrong = opened(browser, page_of(reports, name), width)
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("performance.getEntriesByType('resource').filter(r => r.name.startsWith('http'))") == []
    assert wrong == []
    assert page_of(reports, name).stat().st_size < 1_000_000
    page.close()


@pytest.mark.parametrize("name", SWEEPS)
def test_every_cell_is_a_number_of_the_csv(browser, reports, name):
    page, _ = opened(browser, page_of(reports, name), 1280)
    cells = page.locator("#results-table td[data-column]").evaluate_all(
        "cells => cells.map(c => [c.parentNode.dataset.run, c.dataset.column, c.dataset.order, c.textContent])"
    )
    rows = stored(name)
    assert {run for run, *_ in cells} == set(rows.index)
    for run, column, value, text in cells:
        held = rows.loc[run, column]
        if isinstance(held, str):
            assert text == value == held
            continue
        assert float(value) == held
        if column == "step_ms_median":
            assert number(text) == pytest.approx(held, rel=1e-3)
    page.close()


def test_headings_sort(browser, reports):
    page, _ = opened(browser, page_of(reports, "mesh8"), 1280)
    times = stored("mesh8").step_ms_median
    heading = page.locator("#results-table th", has_text="step ms")
    for order in ("ascending", "descending"):
        heading.click()
        page.wait_for_selector(f"#results-table th[aria-sort={order}]")
        found = times[listed(page)].dropna()
        assert list(found) == sorted(times.dropna(), reverse=order == "descending")
    page.close()


def choose(page, heading: str, *words: str) -> None:
    """Tick words in a heading's list."""
    page.locator("#results-table th", has_text=heading).locator("button", has_text="filter").click()
    for word in words:
        page.locator(".dtcc-dropdown").get_by_role("button", name=word, exact=True).click()
    page.keyboard.press("Escape")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_table_filters_by_strategy_mesh_and_status(browser, reports, width):
    rows = stored("simulate")
    meshes = pd.Series({run: where(row) for run, row in rows.iterrows()})
    page, wrong = opened(browser, page_of(reports, "simulate"), width)
    choose(page, "status", "oom")
    lost = rows.status == "oom"
    assert 0 < lost.sum() < len(rows)
    assert sorted(listed(page)) == sorted(rows.index[lost])
    choose(page, "strategy", "ring", "ulysses")
    both = lost & rows.strategy.isin(["ring", "ulysses"])
    assert sorted(listed(page)) == sorted(rows.index[both])
    word = meshes[both].iloc[0]
    choose(page, "mesh", word)
    one = rows.index[both & (meshes == word)]
    assert sorted(listed(page)) == sorted(one)
    assert page.locator(".dt-info").inner_text().startswith(f"{len(one)} row")
    assert wrong == []
    page.close()


def dots(page) -> list:
    return page.locator("#pareto [data-series] use").all()


def test_pointing_at_a_dot_names_its_configuration_and_its_numbers(browser, reports):
    """And it is that dot's: where it lies follows from the numbers."""
    rows = load(REFERENCE / "mesh8").ok
    page, wrong = opened(browser, page_of(reports, "mesh8"), 1280)
    page.locator("#pareto").scroll_into_view_if_needed()
    found = []
    for dot in dots(page):
        box = dot.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        name, *lines = page.locator(".tip").inner_text().splitlines()
        (row,) = (row for _, row in rows.iterrows() if name in (row.label, f"{row.label} {where(row)}"))
        said = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("p10"))
        assert number(said["step ms"]) == pytest.approx(row.step_ms_median, rel=1e-3)
        assert number(said["tokens/s"]) == pytest.approx(row.tokens_per_s, rel=1e-3)
        assert number(said["peak MiB"]) == pytest.approx(row.peak_bytes / 2**20, abs=0.06)
        at = page.locator("#pareto .at").bounding_box()
        found.append((at["x"] + at["width"] / 2, row.peak_bytes, at["y"] + at["height"] / 2, row.step_ms_median))
    assert len(found) == len(rows)
    x, peak, y, ms = np.array(found).T
    for pixels, values in ((x, peak), (y, ms)):
        assert np.abs(np.polyval(np.polyfit(values, pixels, 1), values) - pixels).max() < 1.5
    page.mouse.move(2, 2)
    assert page.locator(".tip").is_hidden()
    assert wrong == []
    page.close()


def test_a_bar_tells_the_part_that_it_draws(browser, reports):
    """Its length is what it says, and the parts of a bar are those of the CSV."""
    page, _ = opened(browser, page_of(reports, "quickstart"), 1280)
    bars = page.evaluate(
        """() => [...document.querySelectorAll("#memory_parts svg *")].filter(mark => mark.told)
        .map(mark => [mark.told, mark.querySelector("path").getBBox().width])"""
    )
    rows = load(REFERENCE / "quickstart").ok
    longest = rows[rows.seq_len == rows.seq_len.max()]
    parts = {"params": "param", "grads": "grad", "optimizer": "optimizer", "activation": "activation", "other": "other"}
    assert len(bars) == len(parts) * len(longest)
    lengths, values = [], []
    for told, length in bars:
        name, first, *_ = told.splitlines()
        part, _, value = first.removesuffix(" MiB").partition(": ")
        (row,) = (row for _, row in longest.iterrows() if name in (row.label, f"{row.label} {where(row)}"))
        assert number(value) == pytest.approx(row[f"{parts[part]}_bytes"] / 2**20, rel=1e-3)
        lengths.append(length)
        values.append(number(value))
    scale = max(lengths) / max(values)
    assert np.array(lengths) == pytest.approx(scale * np.array(values), abs=0.2)
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_legends_entry_keeps_its_strategy_alone(browser, reports, width):
    page, wrong = opened(browser, page_of(reports, "mesh8"), width)
    rows = load(REFERENCE / "mesh8").ok
    key = page.locator("#pareto .key[data-keeps=usp]")
    faded = page.locator("#pareto .faded use")
    key.click()
    legend = rows.strategy.nunique() - 1
    assert faded.count() == (rows.strategy != "usp").sum() + legend
    assert page.locator("#pareto [data-series=usp].faded").count() == 0
    assert key.get_attribute("aria-pressed") == "true"
    key.press("Enter")
    assert faded.count() == 0
    assert wrong == []
    page.close()


def test_a_finger_asks_as_a_pointer_does(browser, reports):
    """On a telephone a picture is moved sideways, and its letters stay as large as to be read."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True)
    page = context.new_page()
    page.goto(page_of(reports, "quickstart").as_uri())
    size = page.locator("#memory_parts text").evaluate_all(
        "texts => Math.min(...texts.map(text => text.getBoundingClientRect().height))"
    )
    assert size > 7
    dot = page.locator("#pareto [data-series] use").first
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    page.touchscreen.tap(box["x"] + 8, box["y"] + 8)
    assert "step ms" in page.locator(".tip").inner_text()
    context.close()


def test_at_390_a_row_shows_every_number_with_its_name(browser, reports):
    page, _ = opened(browser, page_of(reports, "mesh8"), 390)
    cells = page.locator("#results-table tbody tr").first.locator("td").all()
    assert len(cells) == page.locator("#results-table th").count()
    for cell in cells[1:]:
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert cell.evaluate("cell => getComputedStyle(cell, '::before').content").strip('"')
    page.close()


@pytest.fixture(scope="module")
def advised(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("advised")
    advise.printed(["model=llama3_8b", "cluster=h100", "world_size=8", "seq_len=16384"], folder, 0)
    return folder / "index.html"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", [*SWEEPS, "advise", "sources"])
def test_axe_finds_no_serious_fault(browser, reports, advised, tmp_path, name, width):
    from axe_playwright_python.sync_playwright import Axe

    if name == "sources":
        file = sources.write(list(STRATEGIES), None, tmp_path / "sources.html")
    else:
        file = advised if name == "advise" else page_of(reports, name)
    page, wrong = opened(browser, file, width)
    response = Axe().run(page).response
    assert len(response["passes"]) > 10
    found = [(v["id"], v["nodes"][0]["html"]) for v in response["violations"] if v["impact"] in ("serious", "critical")]
    assert found == []
    assert wrong == []
    page.close()
