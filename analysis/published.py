"""Published memory figures beside ours: python -m analysis published.

analysis/data/memory.csv has what was published and the overrides that simulate it. What has not been simulated yet is,
by the command line that the page prints; docs/published_memory.md is written from these rows. Nothing is fitted: what
the published code keeps beyond ours (`beyond`) is a formula for tensors that its source shows.
"""

import csv
import shlex
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from analysis import UserError, simulated
from analysis.reading import read_csv
from analysis.templates import TEMPLATES
from conf.sizes import GIB

FIGURES = Path(__file__).parent / "data" / "memory.csv"
NAME = "published_memory"
SIZES = ("dim", "n_layers", "head_dim", "ffn_dim", "vocab_size")


@dataclass(frozen=True)
class Figure:
    """A published cell, and the row that simulates it, where one does.

    published: what kind of figure: after_forward_gib, peak_gib, ran, oom, longest. value: in GiB, or in tokens.
    """

    source: str
    url: str
    where: str
    model: str
    gpus: str
    world_size: int
    what: str
    published: str
    value: float | None
    overrides: str
    note: str
    row: dict | None = None

    @property
    def held(self) -> float:
        """What ours holds, in GiB: after forward less gradients, which the published code had freed, or at the peak."""
        row = self.simulated
        if self.published == "after_forward_gib":
            return (row["after_forward_bytes"] - row["grad_bytes"]) / GIB
        return row["peak_bytes"] / GIB

    @property
    def simulated(self) -> dict:
        assert self.row is not None, self.overrides
        return self.row

    def part(self, name: str) -> float:
        """Of the peak: GiB of param, grad, optimizer, activation, other; beside it: context, capacity."""
        return self.simulated[f"{name}_bytes"] / GIB

    @property
    def over(self) -> float:
        """GiB that ours holds, with its context, beyond the GPU's capacity."""
        return self.held + self.part("context") - self.part("capacity")

    @property
    def logits(self) -> float:
        """GiB of a rank's logits in bf16: tp splits the vocabulary, the other axes the tokens."""
        row = self.simulated
        tokens = row["seq_len"] * row["batch_size"] / row["micro_batches"]
        return tokens * row["vocab_size"] / row["world_size"] * 2 / GIB

    @property
    def right(self) -> bool:
        """Of a cell that ran or was lost: does ours say the same?"""
        return (self.simulated["fits"] != "oom") == (self.published == "ran")

    @property
    def beyond(self) -> dict[str, float]:
        return beyond(self.simulated) if self.published == "after_forward_gib" else {}

    @property
    def difference(self) -> float:
        """Ours, with what is known to be kept beyond it, over what was published, less 1."""
        assert self.value is not None
        return (self.held + sum(self.beyond.values())) / self.value - 1


def beyond(row: dict) -> dict[str, float]:
    """GiB that Odysseus' authors' code keeps after forward and ours does not, by tensor (bf16, one sequence).

    Hugging Face's RMSNorm keeps its input in fp32 and the normalized values, where ours keeps its input: two of
    [S/N, D] more, twice a layer. Its MLP keeps silu(gate). FSDP without a wrapping policy keeps all that it was given
    gathered until backward: the whole model, or the embedding, the head and the norms where attention and MLP are cut
    by hand. There, too, cos and sin of all positions are kept by every layer, and one gathered [S, D].
    """
    d, layers, hd, i, v = (int(row[size]) for size in SIZES)
    tokens, ranks = int(row["seq_len"]), int(row["world_size"])
    local = tokens / ranks
    cut = row["strategy"] in ("tp_sp", "odysseus")
    apart = 2 * v * d + (2 * layers + 1) * d
    block = layers * (2 * d * d + 2 * d * int(row["n_kv_heads"]) * hd + 3 * d * i)
    elements = {
        "norms": layers * 2 * 2 * local * d,
        "silu(gate)": layers * local * i,
        "gathered weights": apart if cut else apart + block,
        "cos and sin": layers * 2 * tokens * hd if cut else 0,
        "gathered tokens": tokens * d if cut else 0,
    }
    return {name: 2 * count / GIB for name, count in elements.items() if count}


def figures() -> list[Figure]:
    """The published cells, none simulated yet."""
    with open(FIGURES, newline="") as file:
        return [figure(line) for line in csv.DictReader(file)]


def figure(line: dict[str, Any]) -> Figure:
    value = float(line["value"]) if line["value"] else None
    return Figure(**{**line, "world_size": int(line["world_size"]), "value": value})


def command(figure: Figure) -> str:
    """What simulates a cell, as a user would type it."""
    return f"python -m bench {figure.overrides} name={NAME}"


def beside(cells: list[Figure], folder: Path) -> list[Figure]:
    """The cells with their rows, found by the command that made them; those without overrides as they are."""
    rows = {row["command"]: row for row in read_csv(folder, []) if row["status"] in ("ok", "oom")}
    return [replace(cell, row=rows.get(command(cell))) for cell in cells]


def simulate(cells: list[Figure], folder: Path) -> None:
    """Run what has no row in a sweep's folder, one after the other. A row of oom is a row, too."""
    for cell in cells:
        if cell.overrides and beside([cell], folder)[0].row is None:
            simulated.run(shlex.split(cell.overrides), NAME)


def written(cells: list[Figure]) -> str:
    """The page. Raises UserError where a cell that can be simulated has no row."""
    missing = [cell for cell in cells if cell.overrides and cell.row is None]
    if missing:
        raise UserError(
            f"no row of `{command(missing[0])}`: it did not end, or runs/{NAME} was written by another version"
        )
    sources = [(name, list(group)) for name, group in groupby(cells, lambda cell: cell.source)]
    seen = [cell for cell in cells if cell.published in ("ran", "oom")]
    return TEMPLATES.get_template("published_memory.md").render(
        sources=sources,
        seen=seen,
        right=sum(cell.right for cell in seen),
        first=[cell for cell in cells if cell.published == "after_forward_gib"],
        peaks=[cell for cell in cells if cell.published == "peak_gib" and cell.row],
        median_of=lambda found: median(abs(cell.difference) for cell in found),
    )


def write(out: Path, runs: Path = Path("runs")) -> Path:
    """Simulate what has no row yet, and write the page."""
    cells = figures()
    simulate(cells, runs / NAME)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(written(beside(cells, runs / NAME)))
    return out
