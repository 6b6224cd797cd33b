"""launch=slurm: a whole sweep as one job, through submitit, on this machine and on a cluster of two nodes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import bench.app
from bench.app import launchers, slurm
from conf.words import Invalid
from tests.jobs import job
from tests.slurm_cluster import Cluster, NoCluster

ROOT = Path(__file__).parents[1]
TWO_HOSTS = ["strategy=ulysses", "seq_len=64", "world_size=2", "warmup=0", "launch=slurm", "launch.nodes=2"]


@pytest.fixture
def cluster():
    try:
        with Cluster() as started:
            yield started
    except NoCluster as why:
        pytest.skip(f"Slurm: {why}")
    gone = started.environment["SLURM_CONF"]
    assert not [each for each in psutil.process_iter() if environment_of(each).get("SLURM_CONF") == gone]


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except psutil.Error:
        return {}


def submitted(folder: Path, *words: str, **environment: str) -> subprocess.Popen:
    """The command that submits a sweep; what it says goes to the file `said`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    environment.pop("PYTEST_XDIST_WORKER", None)
    with open(folder / "said", "w") as said:
        command = [sys.executable, "-m", "bench", *words]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT)


def rows_of(folder: Path) -> list[dict[str, str]]:
    file = folder / "runs" / "default" / "results.csv"
    if not file.exists():
        return []
    with open(file, newline="") as rows:
        return sorted(csv.DictReader(rows), key=lambda row: row["started_at"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_requeued_job_goes_on_where_it_was(cluster, tmp_path):
    words = ["-m", *TWO_HOSTS, "steps=2,60", "launch.interface=lo"]
    command = submitted(tmp_path, *words, SLURM_CONF=cluster.environment["SLURM_CONF"])
    try:
        cluster.until(lambda: rows_of(tmp_path) or command.poll() is not None)
        before = rows_of(tmp_path)
        cluster.ask("scancel", "--signal=USR2", "1")  # as Slurm does when the time is nearly over: it is requeued
        cluster.until(lambda: command.poll() is not None)
    finally:
        command.kill()
    said = (tmp_path / "said").read_text()
    assert command.returncode == 0, said
    assert [row["steps"] for row in before] == ["2"]
    rows = rows_of(tmp_path)
    assert rows[0] == before[0], "what was finished is kept"
    assert [(row["steps"], row["status"]) for row in rows] == [("2", "ok"), ("60", "ok")], said
    assert {(row["launch"], row["hosts"], row["ranks_per_host"]) for row in rows} == {("torchrun", "2", "1")}
    assert "Restarts=1" in cluster.ask("scontrol", "show", "job", "1")
    assert "job 1: PENDING" in said
    assert "(kept from an earlier run)" in said
    assert said.endswith("job 1 ended: COMPLETED, exit code 0\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_can_be_tried_out_on_one_machine(tmp_path):
    """A configuration that cannot be ends as a row, and the job as the sweep does."""
    command = submitted(tmp_path, "-m", *TWO_HOSTS, "mesh.ulysses=16", "launch.executor=local")
    try:
        assert command.wait(120) == 1
    finally:
        command.kill()
    said = (tmp_path / "said").read_text()
    assert [row["status"] for row in rows_of(tmp_path)] == ["invalid"], said
    assert "invalid: " in said
    assert said.splitlines()[-1].endswith(" ended: FAILED")
    logs = tmp_path / "runs" / "default" / "slurm"
    assert len(list(logs.glob("*_log.out"))) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["launch.nodes=0"], r"^launch.nodes=0 must be at least 1$"),
        (["launch.executor=null"], r"^launch.executor=None is not one of slurm, local"),
        (["launch.partition='a b'"], r"^launch.partition='a b' is no name of a partition; "),
        ([], r"^launch=slurm: this machine has no sbatch and srun; .* launch.executor=local, would do$"),
    ],
)
def test_what_cannot_be_submitted_is_a_sentence(tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Invalid, match=sentence):
        launchers.submit(job("launch=slurm", *words).config)
    assert not list(tmp_path.iterdir())


def test_submitit_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "bench.app.slurm")
    monkeypatch.delattr(bench.app, "slurm")
    with pytest.raises(Invalid, match=r"^launch=slurm needs the package submitit; "):
        launchers.submit(job("launch=slurm").config)


class AJob:
    """A job that submitit knows, as it is followed."""

    job_id = "7"
    num_tasks = 1

    def __init__(self, log: Path) -> None:
        self.paths = self
        self.stdout = log

    def task(self, number: int) -> "AJob":
        return self


def test_the_job_goes_on_without_the_command_that_follows_it(tmp_path, monkeypatch, capsys):
    def interrupt(job: AJob) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "submitted", lambda config: AJob(tmp_path / "7_0_log.out"))
    monkeypatch.setattr(slurm, "follow", interrupt)
    with pytest.raises(SystemExit) as end:
        slurm.submit(job("launch=slurm").config)
    assert end.value.code == 130
    assert "job 7 goes on without this command; tail -f " in capsys.readouterr().out


def test_what_hosts_say_is_shown_once(tmp_path, monkeypatch, capsys):
    log = tmp_path / "7_0_log.out"
    told = iter([("PENDING", ""), ("RUNNING", "[1/2] one\n"), ("", "[2/2] two\n"), ("FAILED, exit code 1", "sorry\n")])

    def state(job: AJob) -> str:
        now, said = next(told)
        with open(log, "a") as file:
            file.write(said)
        return now

    monkeypatch.setattr(slurm, "state_of", state)
    monkeypatch.setattr(slurm, "POLL_S", 0)
    assert slurm.follow(AJob(log)) == "FAILED, exit code 1"
    assert capsys.readouterr().out.splitlines() == [
        "job 7: PENDING",
        "job 7: RUNNING",
        "[1/2] one",
        "[2/2] two",
        "job 7: FAILED, exit code 1",
        "sorry",
    ]
