"""Configurations as the command line composes them, for tests that run them in this process."""

import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

import bench
from bench.config import Job, register

sys.path.append(str(Path(bench.__file__).parent / "plugins"))
QUICK = ["steps=2", "warmup=1", "seq_len=64", "world_size=2"]


def job(*overrides: str) -> Job:
    """What `python -m bench OVERRIDES` runs, small unless said otherwise."""
    import hydra_plugins.ranks  # noqa: F401 (registers itself)

    register()
    with initialize_config_dir(str(Path(bench.__file__).parents[1] / "conf"), version_base="1.3"):
        return Job.of(compose("config", overrides=[*QUICK, *overrides]), [*QUICK, *overrides])
