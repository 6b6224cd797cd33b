"""Hydra's launcher and sweeper here: the launcher sees all jobs of a sweep at once, so it can say how many are left.

Hydra finds it because it looks for plugins in the namespace package hydra_plugins, which bench/__main__.py puts on the
path. Jobs run one after the other, each in ranks of its own. A sweep with a wrong key is refused before its first job.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from bench.app.launchers import submit
from bench.ranks.scratch import scratch
from conf.files import check_writable
from conf.words import Invalid


class RanksLauncher(Launcher):
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from bench.app import sweepers
        from bench.app.job import Job
        from bench.app.sweep import run_all, run_part

        if len(job_overrides) > 50:
            print(f"composing {len(job_overrides)} configurations ...", flush=True)
        load = self.hydra_context.config_loader.load_sweep_config
        jobs = [Job.of(load(self.config, list(overrides)), overrides) for overrides in job_overrides]
        first = jobs[0].config
        if first.launch.name == "slurm":
            submit(first)
        objective = first.objective
        rows = run_all(jobs) if objective is None else run_part(jobs)
        if objective is None and not any(row["status"] == "ok" for row in rows):
            sys.exit(1)
        values = [sweepers.told(row, objective, self.config.hydra) for row in rows]
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)
            for overrides, value in zip(job_overrides, values, strict=True)
        ]


class Searches(Callback):
    """What is said before and after a sweep of Hydra's other launchers and sweepers."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from bench.app import sweepers

        try:
            sweepers.check(config)
        except Invalid as fault:  # Hydra would go on after it
            sys.exit(f"bench: {fault}")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        found = Path(config.hydra.sweep.dir, "optimization_results.yaml")
        if config.hydra.runtime.choices["hydra/sweeper"] == "optuna" and found.exists():
            best = OmegaConf.load(found)
            said = " ".join(f"{key}={value}" for key, value in best.best_params.items())
            print(f"best {config.objective}: {best.best_value:,.10g}, with {said}")
            print(f"{found.with_name('results.csv')}: one row for each that was tried")


class ProductSweeper(BasicSweeper):
    """Hydra's own. It need not compose every job to see that it can be: RanksLauncher does, before the first runs."""

    def sweep(self, arguments: list[str]) -> None:
        assert self.config is not None
        if self.config.launch.name == "torchrun" and os.environ.get("RANK") != "0":  # the first host alone writes
            self.config.hydra.sweep.dir = str(scratch())
        check_writable(self.config.hydra.sweep.dir)
        super().sweep(arguments)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        if not isinstance(self.launcher, RanksLauncher):
            super().validate_batch_is_legal(batch)


@dataclass
class RanksLauncherConfig:
    _target_: str = "hydra_plugins.ranks.RanksLauncher"


@dataclass
class ProductSweeperConfig(BasicSweeperConf):
    _target_: str = "hydra_plugins.ranks.ProductSweeper"


ConfigStore.instance().store(group="hydra/launcher", name="ranks", node=RanksLauncherConfig)
ConfigStore.instance().store(group="hydra/sweeper", name="product", node=ProductSweeperConfig)
