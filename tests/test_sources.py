"""The page of sources side by side: which columns it shows, what is tinted, and that it can be read and printed."""

import itertools
import re
from pathlib import Path
from textwrap import dedent

import pytest

from analysis import sources
from tests.browser import CUT_OFF, opened

KNOWN = sorted(path.stem for path in sources.ROOT.glob("strategies/*.py") if path.stem not in ("__init__", "base"))
SHOWN = "() => [...document.querySelectorAll('article:not([hidden])')].map(column => column.dataset.strategy)"
CHOSEN = "() => [...document.querySelectorAll('.choice select')].map(pick => pick.value)"
TINTED = """([name, side]) => [...document.querySelectorAll(`[data-strategy=${name}] .row.from-${side}`)]
  .map(row => row.querySelector(".src").textContent)"""
PLAIN = """([name, side]) => [...document.querySelectorAll(`[data-strategy=${name}] section`)].map(section =>
  [...section.querySelectorAll(`.row:not(.from-${side}) .src`)].map(line => line.textContent))"""
BROKEN = """() => [...document.querySelectorAll("article:not([hidden]) .src span")]
  .filter(word => !/\\s/.test(word.textContent) && word.getClientRects().length > 1).map(word => word.textContent)"""
LEFT_EDGES = "() => [...document.querySelectorAll('article:not([hidden]) h2')].map(h => h.getBoundingClientRect().left)"

ONE = '''
    """one: the first.

    tokens          S/N everywhere
    mlp             local
    """


    class One:
        def split(self, tokens):
            return tokens

        def attention(self, attn, x):
            q = attn.q(x)
            out = attend(q)
            return out

        def mlp(self, mlp, x):
            return mlp(x)
'''
TWO = ONE.replace("one: the first", "two: the second").replace(
    "q = attn.q(x)", "q = gather(x)\n            q = attn.q(q)"
)
THREE = TWO.replace("S/N everywhere", "all of them").replace("return mlp(x)", "return reduce(mlp(x))")


@pytest.fixture(scope="module")
def page_of_all(tmp_path_factory) -> Path:
    return sources.write(KNOWN, None, tmp_path_factory.mktemp("sources") / "sources.html")


@pytest.fixture
def page_of_three(tmp_path, monkeypatch) -> Path:
    """Three strategies whose differences are known: two gathers where one does not, three reduces as well."""
    for name, text in (("one", ONE), ("two", TWO), ("three", THREE)):
        (tmp_path / "strategies").mkdir(exist_ok=True)
        (tmp_path / "strategies" / f"{name}.py").write_text(dedent(text).lstrip())
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    return sources.write(["one", "two", "three"], None, tmp_path / "sources.html")


@pytest.mark.parametrize(
    ("fragment", "shown"),
    [
        ("", KNOWN[:3]),
        ("#usp,ring", ["usp", "ring"]),
        ("#tsp%2Culysses,ring", ["tsp", "ulysses", "ring"]),
        ("#ring", ["ring"]),
        ("#ring,ring,constructor,zero", ["ring", "zero"]),
        ("#nothing,%", KNOWN[:3]),
        ("#ring,zero,tp,usp", ["ring", "zero", "tp"]),
    ],
)
def test_the_address_names_the_columns(browser, page_of_all, fragment, shown):
    page, wrong = opened(browser, page_of_all, 1280, fragment)
    assert page.evaluate(SHOWN) == shown
    assert page.evaluate(CHOSEN) == [*shown, "", ""][:3]
    edges = page.evaluate(LEFT_EDGES)
    assert edges == sorted(set(edges))  # beside each other, in that order
    assert wrong == []
    page.close()


def test_a_choice_is_an_address(browser, page_of_all):
    page, wrong = opened(browser, page_of_all, 1280, "#ring,ulysses")
    page.get_by_label("Third").select_option("zero")
    assert page.url.endswith("#ring,ulysses,zero")
    page.wait_for_function(f"({SHOWN})().length == 3")
    page.get_by_label("First").select_option("tp_sp")
    page.wait_for_function(f"({SHOWN})()[0] == 'tp_sp'")
    assert page.title().startswith("tp_sp, ulysses, zero")
    assert page.get_by_label("Second").locator("option", has_text=re.compile("^zero$")).is_disabled()
    page.go_back()
    page.wait_for_function(f"({SHOWN})()[0] == 'ring'")
    assert page.evaluate(CHOSEN) == ["ring", "ulysses", "zero"]
    page.get_by_label("Second").focus()
    page.keyboard.press("ArrowDown")  # upipe, after ulysses
    page.wait_for_function(f"({SHOWN})()[1] == 'upipe'")
    assert wrong == []
    page.close()


def test_the_tint_is_on_the_lines_that_differ(browser, page_of_three):
    page, wrong = opened(browser, page_of_three, 1280)
    gathers = ["q = gather(x)", "q = attn.q(q)"]
    assert page.evaluate(TINTED, ["one", "right"]) == ["q = attn.q(x)"]
    assert page.evaluate(TINTED, ["two", "left"]) == gathers
    assert page.evaluate(TINTED, ["two", "right"]) == ["return mlp(x)"]
    assert page.evaluate(TINTED, ["three", "left"]) == ["return reduce(mlp(x))"]
    assert page.evaluate(TINTED, ["one", "left"]) == page.evaluate(TINTED, ["three", "right"]) == []
    assert page.locator("dd.from-left, dd.from-right").all_inner_texts() == ["S/N everywhere", "all of them"]
    page.evaluate("location.hash = 'three,one'")
    page.wait_for_function(f"({SHOWN})().length == 2")
    assert page.evaluate(TINTED, ["one", "left"]) == ["q = attn.q(x)", "return mlp(x)"]
    assert page.evaluate(TINTED, ["three", "right"]) == [*gathers, "return reduce(mlp(x))"]
    row = page.locator("[data-strategy=one] .row")
    grounds = {r.evaluate("row => getComputedStyle(row).backgroundColor") for r in row.all()}
    assert len(grounds) == 2  # a tint that can be seen, and none
    assert wrong == []
    page.close()


def test_what_is_not_tinted_reads_the_same(browser, page_of_all):
    page, _ = opened(browser, page_of_all, 1280)
    for left, right in itertools.pairwise(KNOWN):
        page.evaluate("names => location.hash = names", f"{left},{right}")
        page.wait_for_function("names => document.title.startsWith(names)", arg=f"{left}, {right}")
        assert page.evaluate(PLAIN, [left, "right"]) == page.evaluate(PLAIN, [right, "left"])
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_no_name_is_broken_and_nothing_is_cut_off(browser, page_of_all, width):
    page, wrong = opened(browser, page_of_all, width)
    for first in range(0, len(KNOWN), 3):
        names = [*KNOWN[first:], *KNOWN][:3]
        page.evaluate("names => location.hash = names", ",".join(names))
        page.wait_for_function("names => document.title.startsWith(names)", arg=", ".join(names))
        assert page.evaluate(BROKEN) == []
        assert page.evaluate(CUT_OFF) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert len(set(page.evaluate(LEFT_EDGES))) == (3 if width == 1280 else 1)
        for name in names:
            headings = page.locator(f"[data-strategy={name}] h3").all_inner_texts()
            assert headings
            assert all(heading.startswith(f"{name}: ") for heading in headings)
    assert wrong == []
    page.close()


def test_it_prints_on_a4_landscape(browser, page_of_all):
    page, _ = opened(browser, page_of_all, 390, "#ring,mesh_attention,tsp")
    sheets = re.findall(rb"/MediaBox ?\[([\d. ]+)\]", page.pdf(prefer_css_page_size=True))
    assert sheets
    assert {tuple(round(float(side)) for side in sheet.split()) for sheet in sheets} == {(0, 0, 842, 595)}
    page.emulate_media(media="print")
    assert len(set(page.evaluate(LEFT_EDGES))) == 3  # however narrow the window was
    assert not page.locator(".choice").is_visible()
    page.close()
