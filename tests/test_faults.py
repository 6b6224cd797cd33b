"""A sample of the campaign of faults: whole sweeps of which nothing is lost, whatever strikes them (tests/faults/)."""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import kills, strikes
from tests.faults.left import NOTHING
from tests.faults.plan import KINDS, Sweep, plan

# A lost host is test_torchrun's, and a control group that runs out of memory would be seen by tests beside this one.
SAMPLE = [kind for kind in KINDS if kind not in ("host lost", "memory, cgroup")]
HANGS = [kind for kind in SAMPLE if KINDS[kind].hangs]
ENDS = [kind for kind in SAMPLE if kind not in HANGS]
SWEEPS = [
    *plan(len(HANGS), HANGS, seed=0, worlds=[2], launchers=["local"]),
    *plan(20 - len(HANGS), ENDS, seed=0, worlds=[2], size=9, spared=2),
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_sample_has_every_kind():
    struck = [(sweep.launcher, fault.kind) for sweep in SWEEPS for fault in sweep.faults.values()]
    assert len(struck) == 20
    assert {kind for _, kind in struck} == set(SAMPLE)
    assert {launcher for launcher, _ in struck} == {"local", "torchrun"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a path short enough for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="f-") as made:
        yield Path(made) / "f"


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_a_sweep_that_faults_strike_is_whole(sweep: Sweep, folder: Path):
    report = strikes.run(sweep, folder)
    assert report.wrong == []
    assert report.there == set(sweep.configurations)
    assert report.left == NOTHING


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_a_sweep_whose_parent_is_killed_goes_on(launcher: str, folder: Path):
    report = kills.run(launcher, 1, folder, random.Random(launcher))
    assert report.wrong == []
    assert report.left == NOTHING
