"""The cost table's rows in sympy's symbols: every strategy and variant, in the order of strategies/."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import sympy

from analysis.accounts import account_of
from analysis.accounts.account import Account
from analysis.accounts.letters import OF_AXES, Amount, Letters
from analysis.accounts.sent import SHORT, Sent, total
from conf import meshes

NAMES = "B L d i h h_kv V N dp tp u r c rho e e_g H n_layers"
SYMBOLS = {name: sympy.Symbol(name, positive=True) for name in NAMES.split()}
LEGEND = {
    "B, L": "sequences of a dp rank, tokens of a sequence",
    "d, i, V": "hidden size, MLP size, vocabulary",
    "h, h_kv": "heads, kv heads (tp is taken to divide h_kv)",
    "N": "ranks, on the strategy's one axis; tp, u (ulysses), r (ring) where it has several; dp in front of them all",
    "c": "ranks of an inner ring (ring.inner), or of a row",
    "H": "keys of other ranks that a rank's queries see, of all its sequences together",
    "rho": "copies of a kv head: max(1, u tp / h_kv)",
    "e, e_g": "bytes of an element; of a travelling dK or dV (4 unless ring.grad_dtype=same)",
    "D": "B L d e bytes of a tp group's activation, on its part of the sequence",
    "P": "the block's parameters on a rank before ZeRO shards them, times e",
}


def letters(**changes: object) -> Letters:
    """All symbols, on one rank, but for what is changed; a name stands for its symbol."""
    alike = {name: name for name in ("B", "L", "d", "i", "h", "h_kv", "V", "e", "e_g")}
    sizes = {**alike, "K": SYMBOLS["d"] / SYMBOLS["h"], "layers": "n_layers", "e_w": "e", "e_dw": "e"}
    ranks = dict.fromkeys(OF_AXES.values(), 1)
    named: dict[str, Amount] = {**sizes, **ranks, **changes}
    return Letters(**{name: symbol(value) for name, value in named.items()})


def symbol(value: Amount) -> Amount:
    """What a name stands for, and each name of several."""
    if isinstance(value, dict):
        return {name: symbol(each) for name, each in value.items()}
    return SYMBOLS[value] if isinstance(value, str) else value


def ranks_of(strategy: str) -> dict[str, str]:
    """The letters of its axes: N where there is one alone."""
    footing = meshes.footing_of(strategy)
    if meshes.alone in footing.needs:
        return {}
    axes = footing.axes or ("dp",)
    copies = {"rho": "rho"} if "ulysses" in axes else {}
    return {**{OF_AXES[axis]: "N" if len(axes) == 1 else OF_AXES[axis] for axis in axes}, **copies}


@dataclass(frozen=True)
class Row:
    """One line of the table: a strategy, what is special about this variant, its account and its letters."""

    strategy: str
    variant: str
    account: Account
    letters: Letters

    @property
    def title(self) -> str:
        return f"{self.strategy} {self.variant}".strip()


def rows() -> list[Row]:
    """Every strategy that has an account, and under it its variants; recompute=block is the last of them."""
    return [row for strategy in meshes.STRATEGIES for row in rows_of(strategy)]


def rows_of(strategy: str) -> list[Row]:
    account, ranks = account_of(strategy), ranks_of(strategy)
    if account is None:
        return []
    variants = {variant: {**ranks, **changes} for variant, changes in account.rows.items()}
    if ranks:
        variants["recompute=block"] = {**ranks, **account.rows.get("", {}), "recompute": True}
    return [Row(strategy, variant, account, letters(**changes)) for variant, changes in variants.items()]


@cache
def neat(expression: Amount) -> sympy.Expr:
    """Factored; a sum of products stays a sum."""
    expression = sympy.sympify(expression)
    return sympy.factor(expression) if expression.free_symbols else expression


def collectives(lines: list[Sent], *phases: str) -> str:
    """What is sent in these phases, e.g. 2 AG(D) + 2 RS(D)."""
    words = []
    for line in added(line for line in lines if line.phase in phases):
        times = f"{neat(line.calls)} " if line.calls not in (0, 1) else ""
        times = f"({times.strip()}) " if " " in times.strip() else times
        words.append(f"{times}{SHORT[line.kind]}({line.of})" + (" once a step" if line.calls == 0 else ""))
    return " + ".join(words) or "0"


def added(lines: Iterable[Sent]) -> list[Sent]:
    """Exchanges of activations that are alike, as one line."""
    found: dict[object, Sent] = {}
    for line in lines:
        key = line.phase, line.kind, line.of, len(found) if line.weights else None
        before = found.get(key, replace(line, calls=0, bytes=0))
        found[key] = replace(line, calls=before.calls + line.calls, bytes=before.bytes + line.bytes)
    return list(found.values())


def sent(row: Row, weights: bool) -> sympy.Expr:
    """Bytes of weights, or of activations, and of their gradients that a rank sends for a block."""
    return neat(total(row.account.of_block(row.letters), weights=weights))


def saved(row: Row) -> sympy.Expr:
    """Bytes that a block keeps from forward for backward."""
    return neat(row.account.saved_by_block(row.letters))


def kept(row: Row) -> dict[str, sympy.Expr]:
    """Bytes of params, grads and optimizer state of one block, without AdamW's step counts."""
    one = row.account.state(replace(row.letters, layers=1), ends=False)
    counts = one["optimizer"].as_coeff_Add()[0]
    return {"params": neat(one["params"]), "grads": neat(one["grads"]), "optimizer": neat(one["optimizer"] - counts)}
