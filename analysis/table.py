"""The cost table in print: formulas, or the values of one model, length and number of ranks, and where lines cross.

    python -m analysis table [--format text|markdown|latex|csv] [key=value ...]

Without keys it prints formulas. The keys are those of `python -m bench`; what is not given is as in conf/config.yaml.
"""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import sympy
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from analysis import UserError, symbols
from analysis.cost_table import BLOCK, Letters, of_block, of_step, saved_by_block, saved_by_ends, state, total
from analysis.published import PUBLISHED

CONF = Path(__file__).parents[1] / "conf"
FORMATS = ("text", "markdown", "latex", "csv")
AXES = {  # strategy -> its axes, in the order in which it takes ranks
    "single": (),
    "zero": ("dp",),
    "tp": ("tp",),
    "tp_sp": ("tp",),
    "ulysses": ("ulysses",),
    "ring": ("ring",),
    "usp": ("ulysses", "ring"),
    "tp_usp": ("tp", "ulysses", "ring"),
    "odysseus": ("tp", "ring"),
}


def printed(format: str, overrides: list[str]) -> str:
    """The table in one of FORMATS."""
    if overrides:
        config = configuration(overrides)
        table, notes = values(config), [setting(config), *crossovers(config)]
    else:
        table, notes = formulas(format), [f"{letters}: {what}" for letters, what in symbols.LEGEND.items()]
    if format == "csv":
        return table.to_csv(index=False)
    if format == "markdown":
        return table.to_markdown(index=False, disable_numparse=True) + "\n\n" + "\n".join(f"- {note}" for note in notes)
    if format == "latex":
        return table.to_latex(index=False, escape=False)
    body = table.to_string(index=False) if overrides else records(table)
    return body + "\n\n" + "\n".join(notes)


def records(table: pd.DataFrame) -> str:
    """One paragraph a row, its cells under each other: formulas are too wide to stand side by side."""
    paragraphs = []
    for _, row in table.iterrows():
        cells = [(name, text) for name, text in row.items() if text and name != "strategy"]
        width = max(len(name) for name, _ in cells)
        paragraphs.append("\n".join([row["strategy"], *(f"  {name:{width}}  {text}" for name, text in cells)]))
    return "\n\n".join(paragraphs)


def written(expression, format: str) -> str:
    """A formula as it is read in one of FORMATS."""
    expression = sympy.sympify(expression)
    if format == "latex":
        return f"${sympy.latex(expression)}$"
    return str(expression).replace("**2", "²").replace("*", " ").replace("sqrt", "√")


def formulas(format: str = "text") -> pd.DataFrame:
    """Every strategy and variant: what a block exchanges, sends and keeps, the whole model, and what was published."""
    table = []
    for row in symbols.rows():
        lines = of_block(row.strategy, row.letters)
        step = of_step(row.strategy, row.letters)
        cells = {
            "strategy": f"{row.strategy} {row.variant}".strip(),
            "forward": symbols.collectives(lines, "forward"),
            "backward": symbols.collectives(lines, "recompute", "backward", "optimizer"),
            "activation bytes": written(symbols.activations(row), format),
            "weight and gradient bytes": written(symbols.weights(row), format),
            "kept for backward": written(symbols.saved(row), format),
            **{f"{part} of a block": written(size, format) for part, size in symbols.kept(row).items()},
            "whole model: activation bytes": written(symbols.neat(total(step, weights=False)), format),
            "whole model: weight bytes": written(symbols.neat(total(step, weights=True)), format),
            "whole model: kept for backward": written(
                symbols.neat(
                    row.letters.layers * saved_by_block(row.strategy, row.letters)
                    + saved_by_ends(row.strategy, row.letters)
                ),
                format,
            ),
        }
        if not row.variant:
            for i, known in enumerate(PUBLISHED.get(row.strategy, []), 1):
                why = f". Differs: {known.differs}" if known.differs else ". Agrees"
                said = f"{known.source}: {known.collectives}; activations {known.activations or '-'}, weights "
                cells[f"published {i}"] = said + f"{known.weights or '-'}, memory {known.memory}{why}"
        table.append(cells)
    return pd.DataFrame(table).fillna("")


def configuration(overrides: list[str]) -> dict:
    """conf/config.yaml with a model from conf/model/, and what the user says instead."""
    base = OmegaConf.load(CONF / "config.yaml")
    given = OmegaConf.from_dotlist(overrides)
    model = given.pop("model", "tiny") if not OmegaConf.is_dict(given.get("model")) else "tiny"
    file = CONF / "model" / f"{model}.yaml"
    known = sorted(f.stem for f in (CONF / "model").glob("*.yaml") if f.stem != "hf")
    if model not in known:
        raise UserError(f"model={model} is not one of {', '.join(known)}")
    strategies = str(given.pop("strategy", ",".join(BLOCK))).split(",")
    for name in strategies:
        if name not in BLOCK:
            raise UserError(f"strategy={name} is not one of {', '.join(BLOCK)}")
    overrides = [o for o in overrides if o.partition("=")[0] not in ("model", "strategy")]
    for key in ("defaults", "hydra"):
        base.pop(key)
    base.model = OmegaConf.load(file)
    OmegaConf.set_struct(base, True)
    try:
        config = OmegaConf.to_container(OmegaConf.merge(base, OmegaConf.from_dotlist(overrides)))
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None
    config["model"]["head_dim"] = (
        config["model"].get("head_dim") or config["model"]["dim"] // config["model"]["n_heads"]
    )
    return {**config, "strategies": strategies}


def letters(name: str, config: dict) -> Letters | None:
    """The numbers of a strategy in this configuration; None where it cannot stand on so many ranks."""
    mesh = mesh_of(name, config)
    if mesh is None:
        return None
    return Letters.of({**config, "mesh": mesh})


def mesh_of(name: str, config: dict) -> dict[str, int] | None:
    """Degrees as given; where several are open, ulysses takes what the kv heads allow beside a ring of 2 or more."""
    mesh = {axis: config["mesh"][axis] for axis in ("dp", *AXES[name])}
    free = config["world_size"] // math.prod(degree for degree in mesh.values() if degree)
    left_open = [axis for axis in AXES[name] if mesh[axis] is None]
    if not left_open and mesh["dp"] is None and name != "single":
        left_open = ["dp"]
    if left_open == ["ulysses", "ring"]:
        widest = [u for u in range(1, free) if free % u == 0 and config["model"]["n_kv_heads"] % u == 0]
        mesh["ulysses"] = max(widest, default=1)
    elif len(left_open) == 3:
        mesh["tp"] = mesh["ulysses"] = 2 if free % 4 == 0 else 1
    if left_open and mesh[left_open[-1]] is None:
        last = left_open[-1] if len(left_open) > 1 and mesh[left_open[0]] else left_open[0]
        mesh[last] = config["world_size"] // math.prod(degree for degree in mesh.values() if degree)
    mesh = {axis: mesh.get(axis) or 1 for axis in ("dp", "tp", "ulysses", "ring")}
    n_heads, n_kv_heads = config["model"]["n_heads"], config["model"]["n_kv_heads"]
    width = mesh["tp"] * mesh["ulysses"]
    fits = n_heads % width == 0 and (n_kv_heads % width == 0 or width % n_kv_heads == 0)
    return mesh if fits and math.prod(mesh.values()) == config["world_size"] else None


def values(config: dict) -> pd.DataFrame:
    """Bytes of one configuration, a row per strategy: GB sent (10^9), GiB kept (2^30)."""
    table = []
    for name in config["strategies"]:
        s = letters(name, config)
        if s is None:
            table.append({"strategy": name, "mesh": f"cannot stand on {config['world_size']} ranks"})
            continue
        block, step = of_block(name, s), of_step(name, s)
        degrees = {"dp": s.dp, "tp": s.tp, "ulysses": s.u, "ring": s.r}
        table.append(
            {
                "strategy": name,
                "mesh": " ".join(f"{axis}={degree}" for axis, degree in degrees.items() if degree > 1),
                "GB a block": f"{total(block) / 1e9:.3f}",
                "activations": f"{total(block, weights=False) / 1e9:.3f}",
                "weights": f"{total(block, weights=True) / 1e9:.3f}",
                "GB a step": f"{total(step) / 1e9:.2f}",
                "GiB for backward": f"{(s.layers * saved_by_block(name, s) + saved_by_ends(name, s)) / 2**30:.2f}",
                "GiB of state": f"{sum(state(name, s).values()) / 2**30:.2f}",
            }
        )
    return pd.DataFrame(table).fillna("")


def setting(config: dict) -> str:
    keys = ("seq_len", "world_size", "batch_size", "precision", "zero_stage", "recompute")
    return f"model={config['model']['name']} " + " ".join(f"{key}={config[key]}" for key in keys)


def crossovers(config: dict) -> list[str]:
    """From or up to which length one strategy sends less than another, all else as it is. Bytes are linear in L."""
    sent = {}
    for name in config["strategies"]:
        if name not in ("single", "zero") and (s := letters(name, config)) is not None:
            at = [total(of_step(name, replace(s, L=length, mlp_chunks=1))) for length in (0, 2**20)]
            sent[name] = at[0], (at[1] - at[0]) / 2**20
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
