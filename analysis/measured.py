"""Times that were measured, each with the row that simulates it: published ones, and those of real rows.

analysis/data/steps.csv has the published times, with the overrides that simulate each. A row is `fit` or `held out`:
constants may be fitted to the former alone, and are judged on the latter. The marks are older than any fit.
"""

import csv
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import UserError, calibrate, simulated
from analysis.reading import Sweep, load
from conf.compose import configuration
from conf.keys import ClusterConfig, Config, run_id

STEPS = Path(__file__).parent / "data" / "steps.csv"
PUBLISHED = "published"  # the word that means them, where others are folders
NAME = "published_steps"
ALIKE = ("workload", "direction", "model", "seq_len", "batch_size", "precision")  # in a group of real rows
MS: dict[str, Callable[[float, Config], float]] = {  # a published figure by its unit -> ms
    "s": lambda value, config: 1000 * value,
    "1/s": lambda value, config: 1000 / value,
    "tokens/s/GPU": lambda value, config: 1000 * config.seq_len * config.batch_size / config.world_size / value,
    "ms a layer": lambda value, config: value * config.model.n_layers,
}


@dataclass(frozen=True)
class Pair:
    """A measured time, and the row that simulates it, once there is one."""

    source: str  # who measured: a framework on a GPU, or a folder
    use: str  # fit, held out
    group: str  # of those that were measured under the same conditions, and can be ranked; or nothing
    metric: str  # step, forward or backward
    ms: float
    config: Config
    words: list[str]  # that simulate it
    spread: float | None = None  # of a real row's steps, p10 to p90, over their median
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def replayed(self) -> float:
        """What the replay of the simulated schedule says, in ms."""
        return float(self.row[f"predicted_{self.metric}_ms"])

    @property
    def tokens(self) -> float:
        """A GPU's, in one forward."""
        return self.config.seq_len * self.config.micro_batch_size / self.config.world_size


def lines() -> list[dict[str, str]]:
    """analysis/data/steps.csv."""
    with open(STEPS, newline="") as file:
        return list(csv.DictReader(file))


@cache
def figures() -> tuple[Pair, ...]:
    """What is published, not simulated yet."""
    return tuple(pair_of(line) for line in lines())


def priced(pair: Pair) -> bool:
    """Is it known how fast its GPU is?"""
    return pair.config.cluster is not None and pair.config.cluster.clock is not None


def published(runs: Path = Path("runs")) -> list[Pair]:
    """The published times that can be priced."""
    return with_rows([pair for pair in figures() if priced(pair)], NAME, runs)


def pair_of(line: dict[str, str]) -> Pair:
    words = [*shlex.split(line["overrides"]), simulated.KERNEL]
    config = configuration(words)
    ms = MS[line["unit"]](float(line["value"]), config)
    source = f"{line['framework']}, {line['gpu']}"
    return Pair(source, line["use"], line["group"], line["metric"], ms, config, words)


def measured_here(folder: Path, calibration: Path) -> list[Pair]:
    """The real rows of a sweep, beside the same simulated on this machine as it was measured. Raises UserError."""
    sweep, file = load(folder), calibration / "cluster.yaml"
    real = sweep.ok[sweep.ok["mode"] == "real"]
    if real.empty:
        raise UserError(f"{folder}: no real row that ended well; python -m bench -m sweep=mesh2 makes some")
    if not file.exists():
        calibrate.printed(calibration, None)
    path = str(file) if "/" in str(file) else f"./{file}"
    cluster = configuration([f"cluster={path}"]).cluster
    assert cluster is not None
    for name in dict.fromkeys(real.device_name):
        if not is_of(cluster, name):
            raise UserError(f"{folder} ran on {name}, and {file} is of {', '.join(cluster.device_names)}")
    asked = ["mode=simulate", f"cluster={path}", "rounds=1"]
    wanted = [
        replace(
            pair,
            config=replace(pair.config, mode="simulate", cluster=cluster, rounds=1),
            words=[*pair.words, *asked, f"attention.kernel={pair.row['attention_kernel']}"],
        )
        for pair in pairs_of(sweep, real)
    ]
    return with_rows(wanted, predicted_of(folder).name)


def foretold(sweep: Sweep) -> list[Pair]:
    """The real rows of a sweep whose configuration was simulated on their device's clock: there, or by `validate`.

    Of several clocks the one that was asked last counts.
    """
    folder = predicted_of(sweep.folder)
    simulations = [
        (there.configs[row["run_id"]], row.to_dict())
        for there in (sweep, *([load(folder)] if folder.is_dir() else []))
        for _, row in there.ok[there.ok.predicted_step_ms.notna() & there.ok.run_id.isin(there.configs)].iterrows()
    ]
    found = []
    for pair in pairs_of(sweep, sweep.ok[(sweep.ok["mode"] == "real") & sweep.ok.run_id.isin(sweep.configs)]):
        alike = [
            row
            for config, row in simulations
            if config.cluster
            and is_of(config.cluster, pair.row["device_name"])
            and as_if_real(config) == as_if_real(pair.config)
        ]
        found += [replace(pair, row=row) for row in alike[-1:]]
    return found


def predicted_of(folder: Path) -> Path:
    """Where `validate` has the simulated rows of a folder's real ones."""
    return folder.with_name(f"{folder.name}_predicted")


def as_if_real(config: Config) -> str:
    """What a simulated row and a real one have in common, if they are of the same step."""
    return run_id(replace(config, mode="real", cluster=None))


def is_of(cluster: ClusterConfig, device_name: str) -> bool:
    return any(known in device_name for known in cluster.device_names)


def pairs_of(sweep: Sweep, real: pd.DataFrame) -> list[Pair]:
    """Its real rows, each beside itself. Raises UserError."""
    return [
        Pair(
            source=f"{sweep.folder}",
            use="held out",
            group=", ".join(str(row[key]) for key in ALIKE),
            metric="step",
            ms=row["step_ms_median"],
            config=config_of(sweep, row["run_id"]),
            words=shlex.split(row["command"])[3:],
            spread=(row["step_ms_p90"] - row["step_ms_p10"]) / row["step_ms_median"],
            row=row.to_dict(),
        )
        for _, row in real.iterrows()
    ]


def config_of(sweep: Sweep, run_id: str) -> Config:
    if run_id not in sweep.configs:
        raise UserError(f"{sweep.folder / run_id}: no record.json that says its configuration")
    return sweep.configs[run_id]


def with_rows(pairs: Sequence[Pair], name: str, runs: Path = Path("runs")) -> list[Pair]:
    """With the rows that simulate them. Raises UserError where one has no predicted time."""
    rows = simulated.rows({simulated.identity(pair.config): pair.words for pair in pairs}, name, runs)
    found = [replace(pair, row=rows.get(simulated.identity(pair.config), {})) for pair in pairs]
    for pair in found:
        if pair.row.get(f"predicted_{pair.metric}_ms") is None:
            raise UserError(f"no predicted time of `python -m bench -m {shlex.join(pair.words)} name={name}`")
    return found
