"""Whatever happens to a rank, its configuration ends as a row, the sweep goes on and no process is left."""

import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.app import records
from bench.app import sweep as app
from bench.app.row import resolved_here
from bench.ranks.launch import launch
from bench.ranks.task import Task
from tests.jobs import job

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def hit_a_rank(blow: signal.Signals, *overrides: str):
    """Launch four ranks and do something to the third after its first step -> the outcome, seconds since, pids left."""
    task = Task(resolved_here(job("world_size=4", "steps=200", *overrides).config).config)
    struck: dict = {}

    def progress(text: str) -> None:
        if not struck:
            ranks = [process for process in mp.active_children() if process.name.startswith("ForkServerProcess-")]
            ranks = sorted(ranks, key=lambda process: int(process.name.rpartition("-")[2]))[-4:]  # pids start again
            struck.update(pids=[process.pid for process in ranks], at=time.monotonic())
            os.kill(struck["pids"][2], blow)

    outcome = launch(task, progress)
    return outcome, time.monotonic() - struck["at"], alive(struck["pids"])


@pytest.mark.parametrize("strategy", ["tp_sp", "ring", "ulysses"])
def test_a_killed_rank_is_an_error_and_takes_the_others_along(strategy):
    outcome, seconds, left = hit_a_rank(signal.SIGKILL, f"strategy={strategy}")
    assert outcome.status == "error"
    assert outcome.reason == "rank 2: the process was killed by SIGKILL"
    assert seconds < 10
    assert left == []


def test_a_hang_is_a_timeout_that_names_the_collective():
    outcome, _, left = hit_a_rank(signal.SIGSTOP, "strategy=tp_sp", "timeout_s=15")
    assert outcome.status == "timeout"
    assert outcome.reason.startswith("timeout_s=15 is over; rank 0 is in ")
    collectives = ("all_gather", "all_to_all", "all_reduce", "barrier", "wait")
    assert any(name in outcome.reason for name in collectives), outcome.reason
    assert left == []


def test_an_exception_in_one_rank_is_its_message():
    """Only rank 0 writes, and it cannot."""
    task = Task(resolved_here(job("strategy=tp", "save_path=/proc/nowhere").config).config)
    outcome = launch(task, lambda text: None)
    assert outcome.status == "error"
    assert outcome.reason.startswith("rank 0: FileNotFoundError")
    assert "Traceback" in outcome.traceback


def test_a_sweep_goes_on_past_what_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [
        job("name=mixed", "strategy=ulysses", "seq_len=63"),
        job("name=mixed", "strategy=tp", "model.vocab_size=20000000000"),
        job("name=mixed", "strategy=zero", "batch_size=1"),
        job("name=mixed", "strategy=ring"),
    ]
    rows = app.run_all(jobs)
    assert [row["status"] for row in rows] == ["invalid", "oom", "ok", "ok"]
    assert rows[0]["reason"] == "seq_len=63 must be a multiple of mesh.ulysses = 2; 62 or 64 would do"
    assert "memory" in rows[1]["reason"]
    assert rows[2]["reason"] == "batch_size=1 leaves 1 of mesh.dp=2 without a sequence"
    stored = records.load_all(tmp_path / "runs" / "mixed")
    assert {row["run_id"] for row in stored} == {row["run_id"] for row in rows}

    again = app.run_all(jobs)  # keeps what was measured or failed, and looks at the invalid one again
    assert [row.get("kept", False) for row in again] == [False, True, True, True]
    jobs[1].config.rerun = jobs[3].config.rerun = "failed"
    assert [row.get("kept", False) for row in app.run_all(jobs)] == [False, False, True, True]


def session_of(pid: int) -> list[int]:
    """Every process of the session that process `pid` leads."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_sweep_leaves_its_rows_and_no_process(end, tmp_path):
    command = [sys.executable, "-m", "bench", "-m", "name=cut", "world_size=2", "seq_len=64", "steps=2"]
    command += ["strategy=single,tp,ulysses,ring,zero", "batch_size=1,2,3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    sweep = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    results = tmp_path / "runs" / "cut" / "results.csv"
    deadline = time.monotonic() + 60
    while not results.exists() or len(results.read_text().splitlines()) < 5:  # three invalid (single), one measured
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sweep.send_signal(end)
    sweep.wait(10)
    deadline = time.monotonic() + 10
    while session_of(sweep.pid):
        assert time.monotonic() < deadline, "a process outlived its sweep"
        time.sleep(0.1)
    rows = results.read_text().splitlines()
    assert len(rows) >= 5
    assert any(",ok," in row for row in rows)
    for record in results.parent.glob("*/record.json"):
        json.loads(record.read_text())
    if end == signal.SIGINT:
        assert sweep.returncode == 130
        assert b"rows are in runs/cut; the same command again goes on from there" in sweep.stdout.read()
