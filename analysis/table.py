"""The cost table in print: formulas, or the values of one model, length and number of ranks, and where lines cross.

    python -m analysis table [--format text|markdown|latex|csv] [key=value ...]

Without keys it prints formulas. The keys are those of `python -m bench`, and so are defaults, meshes and the answers to
what cannot be. Without strategy= every strategy has a row; strategy=a,b names several.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import sympy

from analysis import UserError, symbols
from analysis.accounts import account_of, none_of
from analysis.accounts.account import Account
from analysis.accounts.letters import Amount, Letters
from analysis.accounts.sent import total
from conf import labels, meshes
from conf.columns import described
from conf.compose import REFUSED, configuration, sentence
from conf.keys import Config
from conf.resolve import resolve
from conf.sizes import GIB
from conf.words import Invalid


def printed(format: str, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The table as text, markdown, latex or csv, and what is wrong with it."""
    if not overrides:
        legend = [f"{letters}: {what}" for letters, what in symbols.LEGEND.items()]
        return laid_out(formulas(format), format, legend, paragraphs), []
    found = standings(overrides)
    stand = standing(found)
    if not stand:
        return laid_out(values(found), format), ["none of these strategies can stand here"]
    remarks = [f"{name}: {note}" for name, here in stand.items() for note in here.notes]
    return laid_out(values(found), format, [setting(stand), *remarks, *crossovers(stand)]), []


def as_table(table: pd.DataFrame) -> str:
    return table.to_string(index=False)


def paragraphs(table: pd.DataFrame) -> str:
    """One paragraph a row, its cells under each other: formulas are too wide to stand side by side."""
    found = []
    for _, row in table.iterrows():
        cells = [(name, text) for name, text in row.items() if text and name != "strategy"]
        width = max(len(name) for name, _ in cells)
        found.append("\n".join([row["strategy"], *(f"  {name:{width}}  {text}" for name, text in cells)]))
    return "\n\n".join(found)


def laid_out(
    table: pd.DataFrame, format: str, notes: Sequence[str] = (), in_text: Callable[[pd.DataFrame], str] = as_table
) -> str:
    """A table in a format, and notes under it where there is a place for them."""
    if format == "csv":
        return table.to_csv(index=False)
    if format == "latex":
        return table.to_latex(index=False, escape=False)
    if format == "markdown":
        body, lines = as_pipes(table), [f"- {note}" for note in notes]
    else:
        body, lines = in_text(table), list(notes)
    return body + ("\n\n" + "\n".join(lines) if lines else "")


def as_pipes(table: pd.DataFrame) -> str:
    """In Markdown, not padded: a longer cell changes its own line alone. In a cell | ends nothing, < begins no tag."""
    cells = table.astype(str).replace(r"([|<])", r"\\\1", regex=True)
    rows = [cells.columns, ["---"] * len(cells.columns), *cells.to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# Formulas.


def written(expression: Amount, format: str = "text") -> str:
    """A formula as it is read in a format."""
    expression = sympy.sympify(expression)
    if format == "latex":
        return f"${sympy.latex(expression)}$"
    return str(expression).replace("**2", "²").replace("*", " ").replace("sqrt", "√")


def formulas(format: str = "text") -> pd.DataFrame:
    """Every strategy and variant: what a block exchanges, sends and keeps, the whole model, and what was published."""
    table = []
    for strategy in meshes.STRATEGIES:
        rows = symbols.rows_of(strategy)
        table += [cells_of(row, format) for row in rows] or [{"strategy": strategy, "account": none_of(strategy)}]
    return pd.DataFrame(table).fillna("")


def cells_of(row: symbols.Row, format: str) -> dict[str, str]:
    lines, step = row.account.of_block(row.letters), row.account.of_step(row.letters)
    saved = row.letters.layers * row.account.saved_by_block(row.letters) + row.account.saved_by_ends(row.letters)
    sizes = {
        "activation bytes": symbols.sent(row, weights=False),
        "weight and gradient bytes": symbols.sent(row, weights=True),
        "kept for backward": symbols.saved(row),
        **{f"{part} of a block": size for part, size in symbols.kept(row).items()},
        "whole model: activation bytes": symbols.neat(total(step, weights=False)),
        "whole model: weight bytes": symbols.neat(total(step, weights=True)),
        "whole model: kept for backward": symbols.neat(saved),
    }
    return {
        "strategy": row.title,
        "forward": symbols.collectives(lines, "forward"),
        "backward": symbols.collectives(lines, "recompute", "backward", "optimizer"),
        **{name: written(size, format) for name, size in sizes.items()},
        **published(row),
    }


def published(row: symbols.Row) -> dict[str, str]:
    cells = {}
    about_it = [known for known in row.account.published if known.variant == row.variant]
    for number, known in enumerate(about_it, 1):
        why = f"Differs: {known.differs}" if known.differs else "Agrees"
        sizes = f"activations {known.activations or '-'}, weights {known.weights or '-'}, memory {known.memory}"
        cells[f"published {number}"] = f"{known.source}: {known.collectives}; {sizes}. {why}"
    return cells


# Values.


@dataclass(frozen=True)
class Standing:
    """A strategy in a configuration in which it can stand: its account, and what a reader should know."""

    account: Account
    config: Config
    notes: list[str]

    @property
    def letters(self) -> Letters:
        return Letters.of(self.config)


def standings(overrides: Sequence[str]) -> dict[str, Standing | str]:
    """Every strategy that is asked for, as `python -m bench` would run it; or why it would not, in a sentence.

    Raises UserError for what is no configuration, and if one sentence answers all.
    """
    chosen = [override for override in overrides if override.startswith("strategy=")]
    others = [override for override in overrides if override not in chosen]
    strategies = chosen[-1].removeprefix("strategy=").split(",") if chosen else list(meshes.STRATEGIES)
    try:
        found = {name: stand(configuration([*others, f"strategy={name}"])) for name in strategies}
    except REFUSED as error:
        raise UserError(sentence(error)) from None
    if not standing(found) and len(sentences := {str(here) for here in found.values()}) == 1:
        raise UserError(sentences.pop())
    return found


def stand(written: Config) -> Standing | str:
    try:
        resolved = resolve(written)
    except Invalid as reason:
        return str(reason)
    account = account_of(written.strategy.name)
    return Standing(account, resolved.config, resolved.notes) if account else none_of(written.strategy.name)


def standing(found: Mapping[str, Standing | str]) -> dict[str, Standing]:
    """Those that can stand."""
    return {name: here for name, here in found.items() if isinstance(here, Standing)}


def values(found: Mapping[str, Standing | str]) -> pd.DataFrame:
    """Bytes of one configuration, a row per strategy: GiB sent and kept."""
    table = [
        {"strategy": name, **(numbers(here) if isinstance(here, Standing) else {"mesh": here})}
        for name, here in found.items()
    ]
    return pd.DataFrame(table).fillna("")


def numbers(here: Standing) -> dict[str, str]:
    account, s = here.account, here.letters
    block, step = account.of_block(s), account.of_step(s)
    saved = s.layers * account.saved_by_block(s) + account.saved_by_ends(s)
    return {
        "mesh": labels.mesh(described(here.config)),
        "GiB a block": f"{total(block) / GIB:.3f}",
        "activations": f"{total(block, weights=False) / GIB:.3f}",
        "weights": f"{total(block, weights=True) / GIB:.3f}",
        "GiB a step": f"{total(step) / GIB:.2f}",
        "GiB for backward": f"{saved / GIB:.2f}",
        "GiB of state": f"{sum(account.state(s).values()) / GIB:.2f}",
    }


def setting(stand: Mapping[str, Standing]) -> str:
    """What the rows have in common; single has one rank whatever the others have."""
    config = max((here.config for here in stand.values()), key=lambda config: config.world_size)
    keys = ("seq_len", "world_size", "batch_size", "precision", "zero_stage", "recompute")
    return f"model={config.model.name} " + " ".join(f"{key}={getattr(config, key)}" for key in keys)


def crossovers(stand: Mapping[str, Standing]) -> list[str]:
    """From or up to which length one strategy sends less than another, all else as it is. Bytes are linear in L."""
    sent = {name: line(here) for name, here in stand.items() if name not in ("single", "zero")}
    sentences = []
    for a, b in itertools.combinations(sent, 2):
        (fixed_a, slope_a), (fixed_b, slope_b) = sent[a], sent[b]
        if slope_a == slope_b:
            continue
        length = (fixed_b - fixed_a) / (slope_a - slope_b)
        low, high = (a, b) if slope_a < slope_b else (b, a)
        if 1 <= length <= 2**30:
            sentences.append(f"from L = {length:,.0f} {low} sends less than {high}")
        else:
            sentences.append(
                f"{low} sends less than {high} at every L" if length < 1 else f"{high} sends less than {low}"
            )
    return sentences


def line(here: Standing) -> tuple[float, float]:
    """Bytes of a step: what is sent at any length, and what each token adds."""
    once, twice = (total(here.account.of_step(replace(here.letters, L=n, mlp_chunks=1))) for n in (2**20, 2**21))
    slope = (twice - once) / 2**20
    return once - slope * 2**20, slope
