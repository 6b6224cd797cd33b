"""Which strategy, on which mesh: python -m analysis advise model=llama3_8b cluster=h100 world_size=64 seq_len=131072

Everything that is legal is priced in closed form (analysis/predict.py) and weighed by its account (analysis/peak.py).
Printed are the best, what else is on the front of time and memory, why every other strategy is not among them, and how
the answer changes with the links, the length and the ranks. --verify simulates the best.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from analysis import UserError, simulated
from analysis.accounts import account_of, none_of
from analysis.accounts.letters import OF_AXES
from analysis.candidates import Scenario, Space
from analysis.predict import machine_of
from analysis.templates import TEMPLATES
from conf import meshes
from conf.clock import COLLECTIVES, LAUNCH_BOUND
from conf.compose import REFUSED, configuration, sentence
from conf.files import FileFault, check_writable
from conf.keys import Config, MeshConfig, StrategyConfig
from conf.resolve import resolve
from conf.seen import special
from conf.sizes import GIB
from conf.words import Invalid

AS_TRAINED = ("precision=bf16_mixed", "device=cuda", "loss.chunks=8")  # unless given; of a CPU its own
ERROR = 0.05  # what both predictors may differ by (tests/test_predict.py)
WEIGHED = 0.02  # what the account's memory may be off
MESH = ["strategy", *OF_AXES.values()]
WAITING = (*COLLECTIVES, "offload")
PARTS = ("products", "attention", "kernels", "launches", *WAITING)
FACTORS = (0.25, 0.5, 1, 2, 4)  # of length and ranks, on the map
ASKED = "as asked"
NAME = "advise"  # of the sweep that --verify makes


@dataclass
class Advice:
    """What was asked, and everything that was priced for it."""

    space: Space
    rows: pd.DataFrame  # of all scenarios, by time; `fits`: into what a GPU has beside its context
    scenarios: list[Scenario]

    @property
    def config(self) -> Config:
        return self.space.config

    @property
    def free(self) -> int:
        """Bytes of a GPU's memory."""
        assert self.config.cluster is not None
        return self.config.cluster.capacity_bytes - self.config.cluster.context_bytes

    @cached_property
    def asked(self) -> pd.DataFrame:
        return self.rows[self.rows.scenario == ASKED]

    @cached_property
    def meshes(self) -> pd.DataFrame:
        """What fits: of every strategy and mesh the fastest way to run it."""
        return fastest(self.asked)

    @property
    def best(self) -> pd.DataFrame:
        return self.meshes.head(10)

    @property
    def tied(self) -> int:
        """How many of the best are as fast as the first, as far as one can tell."""
        return int((self.best.step_ms <= self.best.step_ms.min() * (1 + ERROR)).sum())

    @cached_property
    def front(self) -> pd.DataFrame:
        """Nothing that fits is faster and holds less; who holds less by a hair is left out."""
        least, front = float("inf"), []
        for place, held in self.asked[self.asked.fits].peak_bytes.items():
            if held < least * (1 - WEIGHED):
                least = held
                front.append(place)
        return self.asked.loc[front]

    @cached_property
    def others(self) -> list[str]:
        return list(others(self))

    @cached_property
    def otherwise(self) -> list[str]:
        return list(otherwise(self))


def fastest(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.fits].drop_duplicates(MESH)


def printed(overrides: Sequence[str], out: Path, verify: int) -> tuple[str, list[str]]:
    """What the command prints, and what is wrong with it: nothing fits, or a simulated row is not as foretold."""
    found = advice(overrides)
    best = table(found, found.best)
    text = [heading(found), ""]
    if found.best.empty:
        text += ["nothing fits", ""]
    else:
        text += [best.to_string(index=False), "", *ties(found), ""]
        text += ["Time for memory, of all that fits:", table(found, found.front).to_string(index=False), ""]
    text += ["Not among them:", *(f"  {line}" for line in found.others), ""]
    text += ["If it were otherwise:", *(f"  {line}" for line in found.otherwise), ""]
    problems = ["nothing fits"] if found.best.empty else []
    if verify > 0 and not found.best.empty:
        checked, wrong = verified(found, overrides, found.best.head(verify))
        text += ["Simulated:", checked.to_string(index=False), ""]
        problems += wrong
    text.append(f"{write(found, out)} has it with the map, {out / 'advise.csv'} all that was priced")
    return "\n".join(text), problems


def advice(overrides: Sequence[str]) -> Advice:
    """Raises UserError for what cannot be asked, and for a cluster whose speed is unknown."""
    try:
        space = asked(overrides)
        scenarios, rows = priced(space)
        if rows.empty:
            resolve(space.config)  # says why not
            raise UserError(
                f"strategy={space.config.strategy.name} on this mesh is another strategy's, or has idle ranks"
            )
    except REFUSED as error:
        raise UserError(sentence(error)) from None
    found = Advice(space, rows, scenarios)
    found.rows = rows.assign(fits=rows.peak_bytes <= found.free).sort_values("step_ms", kind="stable")
    return found


def priced(space: Space) -> tuple[list[Scenario], pd.DataFrame]:
    """In all scenarios; where nobody knows the links of more ranks than were asked for, in those with no more."""
    scenarios = list(imagined(space.config))
    try:
        return scenarios, space.priced(scenarios)
    except Invalid:
        scenarios = [each for each in scenarios if each.world_size <= space.config.world_size]
        return scenarios, space.priced(scenarios)


def asked(overrides: Sequence[str]) -> Space:
    """The configuration, and which of its keys were given. Raises what Hydra raises, and Invalid."""
    given = frozenset(override.partition("=")[0].lstrip("+~") for override in overrides)
    config = composed(overrides, given, AS_TRAINED)
    if config.cluster is None:
        raise Invalid("cluster is missing: advice is for a machine; cluster=h100 would do")
    if config.workload != "step":
        raise Invalid(f"workload={config.workload} is no training, which advice is about; workload=step would do")
    if config.cluster.intra_kind == "gloo":
        config = composed(overrides, given, ("device=cpu",))
    if "strategy" in given and account_of(config.strategy.name) is None:
        raise UserError(none_of(config.strategy.name))
    if special(replace(config, mesh=MeshConfig(ring=2))):
        raise UserError(
            "advise prices the causal mask, in layouts and hops that are the same for every batch; python -m bench "
            "mode=simulate predicts a configuration with documents, attention.window, ring.kv=needed or "
            "ring.layout=balanced, one by one"
        )
    known = resolve(replace(config, strategy=StrategyConfig("zero"), mesh=MeshConfig())).config
    return Space(replace(known, strategy=config.strategy, mesh=config.mesh), given, machine_of(config))


def composed(overrides: Sequence[str], given: frozenset[str], usual: Sequence[str]) -> Config:
    others = [word for word in usual if word.partition("=")[0] not in given]
    return configuration(["mode=simulate", *others, *overrides])


def imagined(config: Config) -> Iterator[Scenario]:
    """As asked; with other links, lengths and ranks; and what the map shows."""
    ranks, tokens = config.world_size, config.seq_len
    yield Scenario(ASKED, ranks, tokens)
    for word, n in (("half", 0.5), ("twice", 2)):
        yield Scenario(f"{word} the bandwidth", ranks, tokens, links=n)
        yield Scenario(f"{word} the length", ranks, int(tokens * n))
        if ranks * n >= 1:
            yield Scenario(f"{word} the ranks", int(ranks * n), tokens)
    for more_ranks in FACTORS:
        for longer in FACTORS:
            if ranks * more_ranks >= 1 and tokens * longer >= 1:
                at = int(ranks * more_ranks), int(tokens * longer)
                yield Scenario(f"map {at[0]} {at[1]}", *at, usual=True)


# In words.


def heading(found: Advice) -> str:
    config, cluster = found.config, found.config.cluster
    assert cluster is not None
    job = f"model={config.model.name} seq_len={config.seq_len} batch_size={config.batch_size}"
    how = f"precision={config.precision} device={config.device} loss.chunks={config.loss.chunks}"
    fits = f"{int(found.asked.fits.sum()):,} fit into {found.free / GIB:.1f} GiB"
    said = f"{job} on {config.world_size} x {cluster.name}, {how}: {len(found.asked):,} configurations priced, {fits}"
    tokens = config.micro_batch_size * config.seq_len // config.world_size
    if config.device == "cuda" and tokens < LAUNCH_BOUND:
        said += f"\n{tokens} tokens a GPU: launches decide, and no published time was held against that"
    return said


def mesh_of(row: pd.Series) -> str:
    return " ".join(f"{axis}={row[letter]}" for axis, letter in OF_AXES.items() if row[letter] > 1)


def label(row: pd.Series) -> str:
    return f"{row.strategy} {mesh_of(row)}".strip()


def keys_of(row: pd.Series) -> list[str]:
    """What is told apart beside strategy and mesh, as it is typed."""
    ring = [f"ring.layout={row.layout}"] if row.r > 1 else []
    ring += [f"ring.inner={row.inner:.0f}"] if row.inner == row.inner else []
    ring += ["ring.backward=q"] if row.queries else []
    return [f"zero_stage={row.zero_stage}", f"recompute={row.recompute}", f"placement={row.placement}", *ring]


def around(row: pd.Series) -> str:
    """How its ring is laid out, in the table."""
    inner = f", inner {row.inner:.0f}" if row.inner == row.inner else ""
    return f"{row.layout}{inner}{', q in backward' * bool(row.queries)}" if row.r > 1 else ""


def exposed(row: pd.Series) -> float:
    return sum(float(row[kind]) for kind in WAITING if row[kind] == row[kind])


def table(found: Advice, rows: pd.DataFrame) -> pd.DataFrame:
    tokens = found.config.batch_size * found.config.seq_len
    width = max((len(label(row)) for _, row in rows.iterrows()), default=0)
    return pd.DataFrame(
        {
            "strategy": label(row).ljust(width),
            "zero": row.zero_stage,
            "recompute": row.recompute,
            "placement": row.placement,
            "ring": around(row),
            "step ms": f"{row.step_ms:,.1f}",
            "tokens/s": f"{tokens / row.step_ms * 1000:,.0f}",
            "waiting": f"{exposed(row) / row.step_ms:.0%}",
            "GiB": f"{row.peak_bytes / GIB:.1f}",
            "GiB sent": f"{row.sent_bytes / GIB:.1f}",
        }
        for _, row in rows.iterrows()
    )


def ties(found: Advice) -> Iterator[str]:
    """Which of the best are as good as each other."""
    of = f"within {ERROR:.0%} of the first, by which this model and the replay of a simulated schedule may differ"
    if found.tied > 1:
        yield f"The first {found.tied} are ties: {of}."
    else:
        yield f"The first is ahead of all others: none is {of}."
    yield "python -m analysis validate says how far predicted steps are from published ones."


def others(found: Advice) -> Iterator[str]:
    """For each strategy that is not among the best, why not; and what copies of kv heads cost."""
    for name in found.space.strategies:
        if name not in set(found.best.strategy):
            yield f"{name}: {reason(found, name)}"
    for name in dict.fromkeys(found.meshes.strategy):
        yield from copies(found, name)


def reason(found: Advice, name: str) -> str:
    rows = found.asked[found.asked.strategy == name]
    if rows.empty:
        return not_legal(found, name)
    if not rows.fits.any():
        least = rows.loc[rows.peak_bytes.idxmin()]
        how = " ".join([mesh_of(least), *keys_of(least)[:2]]).strip()
        return f"{least.peak_bytes / GIB:,.0f} GiB on a rank, at least ({how}){idle(found, least)}"
    row, first = rows[rows.fits].iloc[0], found.best.iloc[0]
    more = {part: float(row[part]) - float(first[part]) for part in PARTS if row[part] == row[part]}
    part = max(more, key=lambda part: more[part])
    what = f"waiting for {part}" if part in WAITING else part
    sent = (row.sent_bytes - first.sent_bytes) / GIB
    slower = row.step_ms / first.step_ms - 1
    said = f"{mesh_of(row)} is {slower:.0%} slower: {more[part]:+,.0f} ms of {what}, {sent:+.1f} GiB sent"
    return said + idle(found, row) + ("; a tie" if slower <= ERROR else "")


def idle(found: Advice, row: pd.Series) -> str:
    without = row.dp - found.config.micro_batch_size
    return f"; {without} ranks have no sequence" if without > 0 else ""


def not_legal(found: Advice, name: str) -> str:
    """The sentence with which it is refused; or that it has no mesh of its own."""
    mesh = found.config.mesh if "strategy" in found.space.given else MeshConfig()
    try:
        resolve(replace(found.config, strategy=StrategyConfig(name), mesh=mesh))
    except Invalid as refused:
        return str(refused)
    return "no mesh on which it is no other strategy and every rank has a sequence"


def copies(found: Advice, name: str) -> Iterator[str]:
    """What the best mesh on which ulysses copies kv heads costs, against the best on which it does not."""
    rows = found.meshes[found.meshes.strategy == name]
    copied, plain = rows[rows.rho > 1], rows[rows.rho == 1]
    if copied.empty or plain.empty:
        return
    row = copied.iloc[0]
    alike = plain[plain.tp == row.tp]
    other = (plain if alike.empty else alike).iloc[0]
    heads, slower = found.config.model.n_kv_heads, row.step_ms / other.step_ms - 1
    more = (row.sent_bytes - other.sent_bytes) / GIB
    how = f"{abs(slower):.0%} {'slower' if slower > 0 else 'faster'} than {label(other)}"
    why = f"{row.u * row.tp} does not divide {heads} kv heads, {row.rho} copies"
    yield f"{label(row)}: {why}, {more:+.1f} GiB sent, {how}"


def otherwise(found: Advice) -> Iterator[str]:
    for scenario in found.scenarios[1:]:
        if scenario.usual:
            continue
        rows = found.rows[found.rows.scenario == scenario.name]
        best = fastest(rows)
        if best.empty:
            yield f"{scenario.name}: nothing {'is legal' if rows.empty else 'fits'}"
            continue
        first, now = best.iloc[0], found.best.iloc[0] if len(found.best) else None
        said = f"{scenario.name}: {label(first)}, {first.step_ms:,.0f} ms"
        if now is not None and label(now) != label(first):
            same = best[(best[MESH] == now[MESH]).all(axis=1)]
            said += "".join(f"; {label(now)} {ms / first.step_ms - 1:.0%} slower" for ms in same.step_ms)
        yield said


# Simulated.


def command(found: Advice, overrides: Sequence[str], row: pd.Series) -> list[str]:
    """The words with which python -m bench simulates a row."""
    given = {word.partition("=")[0] for word in overrides}
    usual = (*(AS_TRAINED if found.config.device == "cuda" else ("device=cpu",)), simulated.KERNEL)
    axes = ("dp", *meshes.footing_of(row.strategy).axes)
    mesh = [f"mesh.{axis}={row[OF_AXES[axis]]}" for axis in axes]
    ours = [f"strategy={row.strategy}", *mesh, *keys_of(row)]
    chosen = {word.partition("=")[0] for word in ours}
    rest = [word for word in overrides if word.partition("=")[0] not in chosen]
    return ["mode=simulate", *(word for word in usual if word.partition("=")[0] not in given), *rest, *ours]


def verified(found: Advice, overrides: Sequence[str], rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Each row beside its simulation by python -m bench: time by the replay, memory as it is held."""
    words = [command(found, overrides, row) for _, row in rows.iterrows()]
    wanted = {simulated.identity(configuration(each)): each for each in words}
    known = simulated.rows(wanted, NAME)
    lines, wrong = [], []
    for (_, row), (identity, each) in zip(rows.iterrows(), wanted.items(), strict=True):
        if identity not in known:
            wrong.append(f"`python -m bench -m {shlex.join(each)} name={NAME}` did not end well")
            continue
        there = known[identity]
        time, memory = row.step_ms / there["predicted_step_ms"] - 1, row.peak_bytes / there["peak_bytes"] - 1
        lines.append(
            {
                "strategy": f"{label(row)} {' '.join(keys_of(row))}",
                "step ms": f"{row.step_ms:,.1f}",
                "replayed": f"{there['predicted_step_ms']:,.1f} ({time:+.1%})",
                "GiB": f"{row.peak_bytes / GIB:.2f}",
                "simulated": f"{there['peak_bytes'] / GIB:.2f} ({memory:+.1%})",
            }
        )
    return pd.DataFrame(lines), wrong


# On paper.


def write(found: Advice, out: Path) -> Path:
    """The page, the map as a picture, and all that was priced. Raises UserError where nothing can be written."""
    from analysis import interactive, plots

    try:
        check_writable(out.parent)
        out.mkdir(parents=True, exist_ok=True)
        exported(found).to_csv(out / "advise.csv", index=False)
        picture = plots.winners(squares(found))
        (out / "map.svg").write_bytes(plots.svg_of(picture))
        page = TEMPLATES.get_template("advise.html").render(
            heading=heading(found),
            best=table(found, found.best).to_dict("records"),
            front=table(found, found.front).to_dict("records"),
            ties=list(ties(found)) if len(found.best) else ["Nothing fits."],
            others=found.others,
            otherwise=found.otherwise,
            picture=interactive.inlined(picture, "who is fastest"),
        )
        (out / "index.html").write_text(page, encoding="utf-8")
    except FileFault as fault:
        raise UserError(f"--out: {fault}") from None
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror}") from None
    return out / "index.html"


def exported(found: Advice) -> pd.DataFrame:
    return found.asked.drop(columns=["scenario"]).rename(columns={letter: axis for axis, letter in OF_AXES.items()})


def squares(found: Advice) -> pd.DataFrame:
    """Of the map: ranks, tokens, and the winner's strategy, label and time; none where nothing fits."""
    by_name = dict(list(found.rows.groupby("scenario")))
    lines = []
    for scenario in (each for each in found.scenarios if each.usual):
        best = fastest(by_name[scenario.name]) if scenario.name in by_name else found.rows[:0]
        line = {"ranks": scenario.world_size, "tokens": scenario.seq_len, "strategy": "", "label": "", "ms": 0.0}
        for _, row in best.head(1).iterrows():
            line |= {"strategy": row.strategy, "label": label(row), "ms": row.step_ms}
        lines.append(line)
    return pd.DataFrame(lines)
