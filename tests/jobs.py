"""Configurations as the command line composes them, for tests that run them in this process."""

from bench.app.job import Job
from conf.compose import configuration

QUICK = ["steps=2", "warmup=1", "seq_len=64", "world_size=2"]


def job(*overrides: str) -> Job:
    """What `python -m bench OVERRIDES` runs, small unless said otherwise."""
    return Job(configuration([*QUICK, *overrides]), [*QUICK, *overrides])
