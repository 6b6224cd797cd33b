"""A configuration to run, and the words that say it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from conf.compose import config_of
from conf.keys import Config


@dataclass
class Job:
    """One configuration as it was written, and the overrides that say it in short."""

    config: Config
    overrides: list[str]

    @classmethod
    def of(cls, composed: DictConfig, overrides: Sequence[str]) -> "Job":
        return cls(config_of(composed), list(overrides))

    @property
    def command(self) -> str:
        """The command line that reproduces it."""
        return shlex.join(["python", "-m", "bench", *self.overrides])
