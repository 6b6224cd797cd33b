"""Hydra's launcher and sweeper here: the launcher sees all jobs of a sweep at once, so it can say how many are left.

Hydra finds it because it looks for plugins in the namespace package hydra_plugins, which bench/__main__.py puts on the
path. Jobs run one after the other, each in ranks of its own. A sweep with a wrong key is refused before its first job.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from bench.ranks.scratch import scratch
from conf.files import check_writable


class RanksLauncher(Launcher):
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from bench.app.job import Job
        from bench.app.sweep import run_all

        if len(job_overrides) > 50:
            print(f"composing {len(job_overrides)} configurations ...", flush=True)
        load = self.hydra_context.config_loader.load_sweep_config
        rows = run_all([Job.of(load(self.config, list(overrides)), overrides) for overrides in job_overrides])
        if not any(row["status"] == "ok" for row in rows):
            sys.exit(1)
        return [JobReturn(overrides=overrides, status=JobStatus.COMPLETED) for overrides in job_overrides]


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
