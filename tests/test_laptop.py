"""A laptop is often a Mac: without what only Linux has, in parent and ranks, and with a shell's oldest tools.

What takes the names away is read by every Python process that starts (sitecustomize): os.sched_getaffinity is gone, and
so are /proc and /sys for whoever opens them as a Path.
"""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_LINUX = """
import io, os, pathlib
del os.sched_getaffinity, os.sched_setaffinity
opened, exists = io.open, pathlib.Path.exists
hidden = lambda file: str(file).startswith(("/proc/", "/sys/"))
def without(file, *args, **kwargs):
    if hidden(file):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return opened(file, *args, **kwargs)
io.open = without
pathlib.Path.exists = lambda self, **kwargs: not hidden(self) and exists(self, **kwargs)
with opened(os.environ["WITHOUT_LINUX"], "a") as started:
    started.write(f"{os.getpid()}\\n")
"""


@pytest.fixture
def mac(tmp_path) -> dict[str, str]:
    """The environment of such a laptop, as far as it can be had here."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NO_LINUX)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "WITHOUT_LINUX": str(tmp_path / "started")}
    gone = "import os, pathlib; print(hasattr(os, 'sched_getaffinity'), pathlib.Path('/proc/cpuinfo').exists())"
    said = subprocess.run([sys.executable, "-c", gone], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == "False False\n"
    return environment


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("-m sweep=quickstart strategy=single,ring seq_len=512 steps=1 warmup=0", "ok"),
        ("-m strategy=ring workload=attention seq_len=64 steps=1 world_size=2", "ok"),
        ("-m strategy=ring,ulysses mode=simulate world_size=2", "ok"),
        ("-m strategy=ring world_size=2 seq_len=64 steps=100000 timeout_s=3", "timeout"),  # each rank says where it is
    ],
)
def test_it_runs_without_what_only_linux_has(words, status, mac, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "bench", *words.split(), "name=mac"],
        cwd=tmp_path,
        env=mac,
        capture_output=True,
        text=True,
        check=False,
    )
    with open(tmp_path / "runs" / "mac" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == [status] * len(rows), ended.stdout + ended.stderr
    assert all("rank 0 is in " in row["reason"] and "rank 1 is in " in row["reason"] for row in rows if status != "ok")
    assert len((tmp_path / "started").read_text().split()) >= 3  # the parent, and the server that ranks are forked from


PYTHON = """#!/bin/sh
echo "${0##*/} $*" >> "$LOG"
case "$*" in
    --version) echo Python 3.12.0;;
    "-m venv .venv") mkdir -p .venv/bin; for each in python pip ruff mypy; do cp "$0" ".venv/bin/$each"; done;;
esac
"""
IN_BOTH = ("bash", "sh", "cat", "cksum", "cut", "dirname", "env", "mkdir", "cp", "rm")  # of macOS and of Linux


@pytest.fixture
def shell(tmp_path):
    """./run.sh with those tools alone, and a Python that writes down what it was to do -> what that was."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in IN_BOTH:
        (tools / name).symlink_to(shutil.which(name))
    for name in ("python3", "chromium"):
        (tools / name).write_text(PYTHON)
        (tools / name).chmod(0o755)
    for name in ("run.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    log = tmp_path / "log"

    def run(*words: str) -> list[str]:
        log.write_text("")
        environment = {"PATH": str(tools), "LOG": str(log)}
        ended = subprocess.run(
            ["./run.sh", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        return log.read_text().splitlines()

    return run


PYTEST = "python -m pytest -n auto --maxprocesses 4 --dist worksteal"


@pytest.mark.parametrize(
    ("words", "does"),
    [
        ("", ["python -m bench -m sweep=quickstart rerun=all", "python -m analysis report runs/quickstart"]),
        ("test", ["ruff check .", "ruff format --check .", "mypy ", PYTEST]),
        ("test quick -k ring", [f"{PYTEST} --quick -k ring"]),
        ("test faults --seed 3", ["python -m tests.faults.campaign --seed 3"]),
        ("gpu", ["python3 -m pytest -q -m cuda tests", "python3 -m bench -m sweep=gpu rerun=all"]),
    ],
)
def test_run_sh_uses_what_both_systems_have(words, does, shell):
    did = shell(*words.split())
    assert [line for line in did if line in does] == does, did


def test_run_sh_installs_once(shell, tmp_path):
    installs = [line for line in shell() if line.startswith("pip ")]
    assert [line.split()[-1] for line in installs] == ["torch==2.13.0", ".[test]"]
    assert not any(line.startswith("pip ") for line in shell())
    with open(tmp_path / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    assert any(line.startswith("pip ") for line in shell())
