"""A picture in which one can point: matplotlib's own SVG, whose marks know which rows they are.

Not by plotly, vega or bokeh. Each adds 1 to 5 MB to a page (all of runs/reference/ is to stay below 12), and would draw
every picture a second time, in looks of its own, beside the PNG and the SVG that go into papers. Here a function of
plots.py draws once and says what its marks are: `marked(ax.scatter(x, y), told_of_each_row, strategy)`. In the page the
SVG stands in the text: what was told is a <title> at each mark, which a browser shows by itself, and
templates/pictures.js shows at once, of the mark that is nearest, for fingers too. A legend's entry keeps its series.

Tables sort and filter by DataTables with its ColumnControl, from itables' wheel: 0.7 MB, packed 0.25.
"""

import base64
import gzip
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.collections import PathCollection
from matplotlib.container import Container, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
READABLE = 0.8  # of its size: where a screen is narrower, a picture is moved sideways
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", XLINK)


@dataclass(frozen=True)
class Marks:
    """What is told of the marks of an artist, in their order; and the legend's word for them."""

    told: list[str]
    series: str


def marked(artist: Artist | Container, told: Sequence[str], series: str = "") -> None:
    """What the marks of an artist tell: points of a line or a scatter, bars of a container, a patch, a text."""
    if isinstance(artist, ErrorbarContainer):
        line, caps, bars = artist.lines
        marked(line, told, series)
        for part in (*caps, *bars):
            vars(part)["marks"] = Marks([], series)
    elif isinstance(artist, Container):
        for patch, text in zip(artist, told, strict=True):
            marked(patch, [text], series)
    else:
        vars(artist)["marks"] = Marks([told[n] for n in drawn(artist, len(told))], series)


def drawn(artist: Artist, number: int) -> Iterator[int]:
    """Which of the marks are: matplotlib leaves out those without a place."""
    if isinstance(artist, Line2D):
        places = np.asarray(artist.get_xydata(), float)
    elif isinstance(artist, PathCollection):
        places = np.ma.filled(np.ma.asarray(artist.get_offsets(), float), np.nan)
    else:
        return iter(range(number))
    return iter(np.flatnonzero(np.isfinite(places).all(axis=1)).tolist())


def inlined(figure: Figure, name: str) -> str:
    """The figure as an <svg> for a page. name: what it shows, for who hears the page."""
    artists = figure.findobj(lambda artist: "marks" in vars(artist))
    series = {vars(artist)["marks"].series for artist in artists} - {""}
    legends = figure.findobj(Legend)
    for n, artist in enumerate([*artists, *legends]):
        artist.set_gid(f"told{n}")
    root = parsed(figure)
    group = {each.get("id"): each for each in root.iter(f"{{{SVG}}}g")}
    for n, artist in enumerate(artists):
        tell(group[f"told{n}"], vars(artist)["marks"])
    for n in range(len(legends)):
        make_keys(group[f"told{len(artists) + n}"], series)
    for each in group.values():
        each.attrib.pop("id", None)  # of another picture's on the page, too
    width = float(root.attrib.pop("width").removesuffix("pt")) * 4 / 3
    root.attrib.pop("height")
    sizes = f"max-width: {width:.0f}px; min-width: {READABLE * width:.0f}px"
    root.attrib |= {"role": "group", "aria-label": name, "style": sizes}
    return ElementTree.tostring(root, encoding="unicode")


def parsed(figure: Figure) -> Element:
    """Its SVG, with text as text: it can be read, found, and is a third in size."""
    file = io.BytesIO()
    with plt.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    return root


def tell(group: Element, marks: Marks) -> None:
    if marks.series:
        group.set("data-series", marks.series)
    if not marks.told:
        return
    if len(marks.told) == 1 and group.find(f".//{{{SVG}}}use") is None:
        leaves = [group]
    else:
        hidden = {id(path) for defs in group.iter(f"{{{SVG}}}defs") for path in defs.iter()}
        uses, paths = ([*group.iter(f"{{{SVG}}}{tag}")] for tag in ("use", "path"))
        leaves = uses or [path for path in paths if id(path) not in hidden]
    for leaf, text in zip(leaves, marks.told, strict=True):
        title = ElementTree.SubElement(leaf, f"{{{SVG}}}title")
        title.text = text


def make_keys(legend: Element, series: set[str]) -> None:
    """What a legend draws for a series, its line or dot and its words, becomes a button."""
    before: list[Element] = []
    for child in list(legend):
        words = "".join(child.itertext()).strip()
        before.append(child)
        if words in series:
            at = list(legend).index(before[0])
            key = Element(f"{{{SVG}}}g", {"class": "key", "data-keeps": words, "role": "button", "tabindex": "0"})
            for each in before:
                legend.remove(each)
                key.append(each)
            key.set("aria-pressed", "false")
            legend.insert(at, key)
        if words:
            before = []


def packed(name: str) -> str:
    """A file of the tables' library as base64 of its gzip."""
    data = (files("itables") / "html" / name).read_bytes()
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()
