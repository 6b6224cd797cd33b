"""Hydra's other launchers and sweepers: refused where they would measure each other, at work where nothing is timed."""

import csv
import os
import re
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from bench.app import sweepers
from conf.compose import sentence
from conf.words import Invalid

ROOT = Path(__file__).parents[1]
SMALL = ["model=tiny", "model.n_layers=2", "seq_len=64", "world_size=8"]


def swept(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess, list[dict[str, str]]]:
    """What `python -m bench -m WORDS` says, and its rows."""
    command = [sys.executable, "-m", "bench", "-m", *words, "name=mine"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    file = folder / "runs" / "mine" / "results.csv"
    if not file.exists():
        return ended, []
    with open(file, newline="") as rows:
        return ended, list(csv.DictReader(rows))


@pytest.mark.slow
def test_joblib_is_refused_where_time_is_measured(tmp_path):
    ended, rows = swept(tmp_path, "hydra/launcher=joblib", "seq_len=64,128")
    assert ended.returncode == 1
    assert ended.stderr.startswith("bench: hydra/launcher=joblib: mode=real is timed, and configurations that run at")
    assert ended.stderr.count("\n") == 1
    assert not rows
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_joblib_leaves_a_row_for_each_job(tmp_path):
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "mode=simulate", "strategy=ulysses,usp,odysseus,ring"]
    ended, rows = swept(tmp_path, *words, *SMALL)
    assert ended.returncode == 0, ended.stderr
    found = {row["strategy"]: row["status"] for row in rows}
    assert found == dict.fromkeys(("ulysses", "usp", "odysseus", "ring"), "ok"), ended.stdout


@pytest.mark.slow
def test_optuna_finds_a_mesh(tmp_path):
    """Of six that it tries, some of which cannot stand, it names the one that sends least."""
    ended, rows = swept(tmp_path, "sweep=best_mesh", "hydra.sweeper.n_trials=6", *SMALL)
    assert ended.returncode == 0, ended.stderr
    assert {row["status"] for row in rows} == {"ok", "invalid"}, "the test wants a mesh that cannot stand, and goes on"
    assert len(re.findall("[KMGT]iB sent", ended.stdout)) + ended.stdout.count("invalid: ") == 6
    best = min((row for row in rows if row["status"] == "ok"), key=lambda row: float(row["comm_bytes"]))
    found = f"best comm_bytes: {float(best['comm_bytes']):,.10g}, with mesh.ulysses={best['ulysses']} "
    assert ended.stdout.splitlines()[-2].startswith(found)


def test_what_is_not_installed_is_asked_for():
    missing = MissingConfigException("there is none", "hydra/sweeper/optuna", ["basic"])
    assert sentence(missing) == "hydra/sweeper=optuna needs a package; pip install hydra-optuna-sweeper would do"


def asked(launcher: str = "ranks", sweeper: str = "optuna", **keys: str | None) -> object:
    choices = {"hydra/launcher": launcher, "hydra/sweeper": sweeper}
    config = {"mode": "simulate", "launch": {"name": keys.pop("launch", "local")}, "objective": "peak_bytes", **keys}
    return OmegaConf.create({**config, "hydra": {"runtime": {"choices": choices}}})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (asked(objective=None), r"^objective=null: hydra/sweeper=optuna needs a column .* would do$"),
        (asked(objective="peak_byte"), r"^objective=peak_byte is not one of .*; did you mean peak_bytes\?$"),
        (asked(objective="host_names"), r"^objective=host_names is not one of "),
        (asked(objective="step_ms_median"), r"^objective=step_ms_median: mode=simulate measures no time; .* would do$"),
        (asked(launch="torchrun"), r"^launch=torchrun: hosts run a whole sweep in step; .* would do$"),
        (asked("joblib", "product", mode="emulate"), r"^hydra/launcher=joblib: mode=emulate is timed, .* would do$"),
        (asked("joblib", "product", launch="slurm"), r"^launch=slurm: hosts run a whole sweep in step; "),
    ],
)
def test_what_cannot_be_swept_is_a_sentence(config, said):
    with pytest.raises(Invalid, match=said):
        sweepers.check(config)


@pytest.mark.parametrize(
    "config",
    [asked(), asked("joblib"), asked(mode="real", objective="step_ms_median"), asked("basic", "product", mode="real")],
)
def test_what_can_be_swept_is_not_refused(config):
    sweepers.check(config)


@pytest.mark.parametrize(
    ("row", "direction", "value"),
    [
        ({"status": "ok", "peak_bytes": 5}, "minimize", 5.0),
        ({"status": "oom", "peak_bytes": 5}, "minimize", inf),
        ({"status": "oom", "peak_bytes": 5}, "Direction.maximize", -inf),
        ({"status": "ok", "peak_bytes": None}, "minimize", inf),
    ],
)
def test_what_a_search_is_told(row, direction, value):
    assert sweepers.told(row, "peak_bytes", OmegaConf.create({"sweeper": {"direction": direction}})) == value
    assert sweepers.told(row, None, OmegaConf.create({"sweeper": {}})) is None
