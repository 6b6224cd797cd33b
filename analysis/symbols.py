"""The cost table's rows in sympy's symbols: every strategy and variant, in the order of strategies/."""

from dataclasses import dataclass, replace
from functools import cache

import sympy

from analysis.cost_table import SHORT, Letters, Sent, of_block, saved_by_block, state, total

B, L, d, i, h, h_kv, V, N, dp, tp, u, r, rho, e, e_g, n_layers = sympy.symbols(
    "B L d i h h_kv V N dp tp u r rho e e_g n_layers", positive=True
)
LEGEND = {
    "B, L": "sequences of a dp rank, tokens of a sequence",
    "d, i, V": "hidden size, MLP size, vocabulary",
    "h, h_kv": "heads, kv heads (tp is taken to divide h_kv)",
    "N": "ranks, on the strategy's one axis; tp, u (ulysses), r (ring) where it has several; dp in front of them all",
    "rho": "copies of a kv head: max(1, u tp / h_kv)",
    "e, e_g": "bytes of an element; of a travelling dK or dV (4 unless ring.grad_dtype=same)",
    "D": "B L d e bytes of a tp group's activation, on its part of the sequence",
    "P": "the block's parameters on a rank before ZeRO shards them, times e",
}


def letters(**changes) -> Letters:
    """All symbols, on one rank, but for what is changed."""
    base = {"B": B, "L": L, "d": d, "i": i, "h": h, "h_kv": h_kv, "K": d / h, "V": V, "layers": n_layers}
    ranks = {"dp": 1, "tp": 1, "u": 1, "r": 1}
    return Letters(**{**base, **ranks, "e": e, "e_w": e, "e_g": e_g, **changes})


@dataclass(frozen=True)
class Row:
    """One line of the table: a strategy, what is special about this variant, and its letters."""

    strategy: str
    variant: str
    letters: Letters


def rows() -> list[Row]:
    """Every strategy, and under it its variants; recompute=block for each is the last of them."""
    found = [Row("single", "", letters())]
    found += [
        Row("zero", "" if stage == 3 else f"zero_stage={stage}", letters(dp=N, stage=stage)) for stage in (3, 2, 1, 0)
    ]
    found += [Row("tp", "", letters(tp=N)), Row("tp_sp", "", letters(tp=N))]
    found += [
        Row("ulysses", "", letters(u=N, rho=rho)),
        Row("ulysses", "ulysses.packed", letters(u=N, rho=rho, packed=True)),
        Row("ulysses", "ulysses.chunks=2", letters(u=N, rho=rho, head_chunks=2)),
    ]
    found += [Row("ring", "", letters(r=N)), Row("ring", "ring.kv=all_gather", letters(r=N, gather_kv=True))]
    found += [Row("usp", "", letters(u=u, r=r, rho=rho))]
    found += [Row("tp_usp", "", letters(tp=tp, u=u, r=r, rho=rho))]
    found += [Row("odysseus", "", letters(tp=N)), Row("odysseus", "with a ring", letters(tp=tp, r=r))]
    split = [row for row in found if not row.variant and row.strategy != "single"]
    found += [Row(row.strategy, "recompute=block", replace(row.letters, recompute=True)) for row in split]
    order = list(dict.fromkeys(row.strategy for row in found))
    return sorted(found, key=lambda row: order.index(row.strategy))


@cache
def neat(expression) -> sympy.Expr:
    """Factored; a sum of products stays a sum."""
    expression = sympy.sympify(expression)
    return sympy.factor(expression) if expression.free_symbols else expression


def collectives(lines: list[Sent], *phases: str) -> str:
    """What is sent in these phases, e.g. 2 AG(D) + 2 RS(D)."""
    words = []
    for line in lines:
        if line.phase in phases:
            times = f"{neat(line.calls)} " if line.calls not in (0, 1) else ""
            times = f"({times.strip()}) " if " " in times.strip() else times
            words.append(f"{times}{SHORT[line.kind]}({line.of})" + (" once a step" if line.calls == 0 else ""))
    return " + ".join(words) or "0"


def activations(row: Row) -> sympy.Expr:
    """Bytes of activations and their gradients that a rank sends for a block."""
    return neat(total(of_block(row.strategy, row.letters), weights=False))


def weights(row: Row) -> sympy.Expr:
    """Bytes of weights and their gradients."""
    return neat(total(of_block(row.strategy, row.letters), weights=True))


def saved(row: Row) -> sympy.Expr:
    """Bytes that a block keeps from forward for backward."""
    return neat(saved_by_block(row.strategy, row.letters))


def kept(row: Row) -> dict[str, sympy.Expr]:
    """Bytes of params, grads and optimizer state of one block, without AdamW's step counts."""
    one = state(row.strategy, replace(row.letters, layers=1), ends=False)
    counts = one["optimizer"].as_coeff_Add()[0]
    return {"params": neat(one["params"]), "grads": neat(one["grads"]), "optimizer": neat(one["optimizer"] - counts)}
