"""What the methods found since 2024 are worth here, on one page: python -m analysis literature

docs/literature.md is what it prints of runs/reference/literature: its words and claims are those of
templates/literature.md, and its numbers those of the sweep (conf/sweep/literature.yaml).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from analysis import UserError, symbols
from analysis.reading import load
from analysis.templates import TEMPLATES
from conf.sizes import GIB

RANKS, MODELS = 32, {"llama2_7b": "MHA", "llama3_8b": "GQA"}


@dataclass(frozen=True)
class Method:
    """A row of the sweep on RANKS ranks, by the keys that set it apart, and of the cost table."""

    strategy: str
    variant: str = ""
    backward: str = "kv"
    kv: str = "rotate"
    inner: int | None = None
    cycles: str = "one"

    @property
    def name(self) -> str:
        return f"{self.strategy} {self.variant}".strip()

    @property
    def exchanges(self) -> str:
        """What a block exchanges, forward; backward. Of weights only where they travel shard by shard."""
        rows = {row.variant: row for row in symbols.rows_of(self.strategy)}
        row = rows.get("ring.inner=c" if self.inner else self.variant, rows[""])
        lines = [
            replace(line, weights=False, of="dW" if line.of.startswith("d ") else "W") if line.weights else line
            for line in row.account.of_block(row.letters)
            if not line.weights or line.kind == "p2p"
        ]
        said = "; ".join(symbols.collectives(lines, phase) for phase in ("forward", "backward"))
        return said.replace("*", " ")

    def among(self, rows: pd.DataFrame, model: str) -> pd.Series:
        """Raises UserError if it is not there."""
        found = rows[(rows.strategy == self.strategy) & (rows.model == model) & (rows.world_size == RANKS)]
        if self.strategy == "ring":
            inner = found.ring_inner.isna() if self.inner is None else found.ring_inner == self.inner
            asked = (found.ring_backward == self.backward) & (found.ring_kv == self.kv)
            found = found[asked & (found.ring_cycles.fillna("one") == self.cycles) & inner]
        if found.empty:
            raise UserError(
                f"{self.name} of {model} on {RANKS} ranks is not in the sweep; conf/sweep/literature.yaml has it"
            )
        return found.iloc[0]


METHODS = [
    Method("ring"),
    Method("ring", "ring.kv=all_gather", kv="all_gather"),
    Method("ring", "ring.backward=q", backward="q"),
    Method("ring", "ring.inner=8", inner=8),
    Method("ring", "ring.cycles=all", cycles="all"),
    Method("mesh_attention"),
    Method("ulysses"),
    Method("upipe"),
    Method("usp"),
    Method("odysseus"),
    Method("tsp"),
]


def printed(folder: Path) -> str:
    """The page, in markdown. Raises UserError for a sweep that lacks a method."""
    rows = load(folder).ok
    found = {(method.name, kind): method.among(rows, model) for method in METHODS for model, kind in MODELS.items()}
    page = TEMPLATES.get_template("literature.md")
    of_16 = rows[(rows.world_size == 16) & (rows.model == "llama2_7b")].set_index("ring_cycles").predicted_step_ms

    def s16(cycles: str) -> str:
        return f"{of_16[cycles] / 1000:.2f}"

    return page.render(methods=METHODS, rows=found, kinds=list(MODELS.values()), GIB=GIB, ranks=RANKS, s16=s16).strip()
