"""Whatever happens to a rank or to the sweep, it ends as a row that says why, and nothing is left behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

from bench.app import interrupts, records
from bench.app import sweep as app
from bench.app.row import resolved_here
from bench.ranks import ends, launch, worker
from bench.ranks import scratch as scratches
from bench.ranks.launch import Clock, run_ranks
from bench.ranks.task import Meeting, Outcome, Ready, Task
from tests.jobs import job

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120
pytestmark = pytest.mark.slow


def forked() -> set[psutil.Process]:
    """What the ranks' server of this process has forked, of this test and of others."""
    server = forkserver._forkserver._forkserver_pid
    return set(psutil.Process(server).children()) if server else set()


def task_of(*overrides: str) -> Task:
    return Task(resolved_here(job(*overrides).config).config)


def hit_a_rank(blow: signal.Signals, *overrides: str) -> tuple[Outcome, list[psutil.Process]]:
    """Launch four ranks and do something to the third after its first step -> the outcome, and who is left."""
    launch.start_server()
    others, struck = forked(), []

    def progress(text: str) -> None:
        if not struck:
            struck.extend(sorted(forked() - others, key=lambda process: (process.create_time(), process.pid)))
            assert len(struck) == 4
            struck[2].send_signal(blow)

    outcome = launch.launch(task_of("world_size=4", "steps=100000", *overrides), progress)
    return outcome, [process for process in struck if process.is_running()]


def test_a_rank_that_comes_after_its_parent_has_ended_says_nothing(tmp_path, monkeypatch):
    """Whoever is interrupted while the server imports torch has removed the folder before the rank is forked."""
    served = []
    monkeypatch.setattr(worker, "serve", lambda *arguments: served.append(arguments))
    for folder in (tmp_path, tmp_path / "gone"):
        launch.rank_main(0, None, None, str(folder), None)
    assert [folder for *_, folder, _ in served] == [str(tmp_path)]


@pytest.mark.parametrize("strategy", ["tp_sp", "ring", "ulysses"])
def test_a_killed_rank_is_an_error_and_takes_the_others_along(strategy):
    outcome, left = hit_a_rank(signal.SIGKILL, f"strategy={strategy}")
    assert outcome.status == "error"
    assert outcome.reason == "rank 2: the process was killed by SIGKILL"
    assert left == []


@pytest.mark.parametrize("blow", [signal.SIGABRT, signal.SIGSEGV])
def test_a_rank_that_dies_of_a_signal_says_where_it_was(blow):
    outcome, left = hit_a_rank(blow, "strategy=ulysses")
    assert outcome.status == "error"
    assert outcome.reason.startswith(f"rank 2: the process was killed by {blow.name} in "), outcome.reason
    assert "Fatal Python error" in outcome.traceback
    assert left == []


def test_a_stopped_rank_is_said_to_be_where_it_was():
    outcome, left = hit_a_rank(signal.SIGSTOP, "strategy=tp_sp", "timeout_s=15")
    assert outcome.status == "timeout"
    assert outcome.reason.startswith("timeout_s=15 is over; rank 0 is in ")
    assert "rank 2 was stopped in " in outcome.reason
    collectives = ("all_gather", "all_to_all", "all_reduce", "barrier", "wait")
    assert any(name in outcome.reason for name in collectives), outcome.reason
    assert left == []


def slow_to_start(rank, task, meeting, folder, pipe) -> None:
    """A rank that takes long to start and then measures at once; the second never starts if its folder says so."""
    time.sleep(1.5 if rank < 7 else 1000)
    pipe.send(Ready())
    pipe.send("measured")
    pipe.send(7.0)


def slow_to_end(rank, task, meeting, folder, pipe) -> None:
    pipe.send(Ready())
    time.sleep(1000)


@pytest.fixture
def ranks_of(monkeypatch, tmp_path):
    """Run a function in the place of a rank's process, with a limit of so many seconds."""

    def run(function, ranks, limit_s) -> Outcome:
        monkeypatch.setattr(launch, "rank_main", function)
        launch.start_server()
        task = task_of("strategy=zero", "world_size=8", "batch_size=8")
        return run_ranks(ranks, task, Meeting("lo"), str(tmp_path), Clock(limit_s), lambda text: None)

    return run


def test_the_clock_starts_when_ranks_run(ranks_of):
    outcome = ranks_of(slow_to_start, [0, 1], 1.0)
    assert (outcome.status, outcome.ranks) == ("ok", [7.0, 7.0])
    outcome = ranks_of(slow_to_end, [0, 1], 1.0)
    assert outcome.status == "timeout"
    assert outcome.reason.startswith("timeout_s=1 is over; rank 0 ")


def test_a_rank_that_never_starts_is_not_asked_and_not_killed_by_the_question(ranks_of, monkeypatch):
    monkeypatch.setattr(launch, "START_S", 4.0)
    outcome = ranks_of(slow_to_start, [0, 7], 1.0)
    assert (outcome.status, outcome.reason) == ("timeout", "after 4 s rank 0 has ended, rank 7 is starting")


@pytest.mark.parametrize(
    ("words", "oom", "said"),
    [
        (
            "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n",
            True,
            "bad_alloc",
        ),
        ("[enforce fail at tcp/pair.cc:446] 1 == 2. \n", False, "enforce fail"),
    ],
)
def test_last_words_are_in_the_row(words, oom, said):
    stack = "Fatal Python error: Aborted\n\nCurrent thread 0x1 (most recent call first):\n"
    stack += '  File "/x/strategies/ring.py", line 7 in attention\n'
    failure = ends.last_words(-signal.SIGABRT, words + stack, killed_for_memory=False)
    assert failure.oom is oom
    assert failure.message.startswith("the process was killed by SIGABRT in attention (strategies/ring.py:7): ")
    assert said in failure.message


def test_who_died_is_not_the_thread_beside_it():
    stack = "Fatal Python error: Aborted\n\nThread 0x1 (most recent call first):\n"
    stack += '  File "selectors.py", line 415 in select\n\nCurrent thread 0x2 (most recent call first):\n'
    stack += '  File "training.py", line 9 in update\n\nExtension modules: torch._C (total: 1)\n'
    failure = ends.last_words(-signal.SIGABRT, stack, killed_for_memory=False)
    assert failure.message == "the process was killed by SIGABRT in update (training.py:9)"


def test_the_kernels_kill_for_memory_is_oom():
    assert ends.last_words(-signal.SIGKILL, "", killed_for_memory=True).oom
    assert not ends.last_words(-signal.SIGKILL, "", killed_for_memory=False).oom


def test_out_of_memory_under_a_limit_is_oom(tmp_path):
    """Of the address space: what torch cannot have, and what a thread's stack cannot."""
    command = [sys.executable, "-m", "bench", "strategy=single", "model.vocab_size=16000000", "steps=1"]
    limit = 7 * 2**30
    subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        stdout=subprocess.DEVNULL,
        check=False,
    )
    (row,) = records.load_all(tmp_path / "runs" / "default")
    assert row["status"] == "oom", row["reason"]
    assert row["reason"].startswith("rank 0: ")


def one_cannot(rank, task, meeting, folder, pipe) -> None:
    """A rank of which the second raises, and the first hears of it as gloo does."""
    pipe.send(Ready())
    try:
        raise FileNotFoundError("nowhere") if rank == 1 else RuntimeError("Connection closed by peer")
    except Exception as error:
        pipe.send(worker.describe(error))


def test_an_exception_in_one_rank_is_its_message(ranks_of):
    outcome = ranks_of(one_cannot, [0, 1], 60)
    assert (outcome.status, outcome.reason) == ("error", "rank 1: FileNotFoundError: nowhere")
    assert "Traceback" in outcome.traceback


def test_a_sweep_goes_on_past_what_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [
        job("name=mixed", "strategy=ulysses", "seq_len=63"),
        job("name=mixed", "strategy=tp", "model.vocab_size=16000000", "model.dim=65536"),
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


def session_of(pid: int) -> list[psutil.Process]:
    """Every process of the session that process `pid` leads."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (OSError, psutil.Error):
            continue
    return members


def listening(processes: list[psutil.Process]) -> set[str]:
    """The addresses on which they can be reached."""
    addresses = set()
    for process in processes:
        try:
            found = process.net_connections(kind="inet")
        except psutil.Error:
            continue
        addresses |= {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}
    return addresses


def left_in(scratch: Path) -> list[Path]:
    """What is there, but torch's cache of compiled kernels, which is for the next process, too."""
    return [path for path in scratch.iterdir() if not path.name.startswith("torchinductor_")]


def lines(results: Path) -> list[str]:
    return results.read_text().splitlines() if results.exists() else []


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files, with a path short enough for a socket's."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


def test_a_long_way_to_temporary_files_is_no_obstacle(monkeypatch):
    """The path of a socket has room for 107 characters."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 90 * "x")
    assert scratches.place() == "/tmp"
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/short")
    assert scratches.place() == "/tmp/short"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_sweep_leaves_its_rows_and_nothing_else(end, tmp_path, scratch):
    command = [sys.executable, "-m", "bench", "-m", "name=cut", "world_size=2", "seq_len=64"]
    command += ["strategy=single,tp,ulysses", "steps=2,100000"]  # the second that runs does so until it is ended
    outward = next(name for name in psutil.net_if_addrs() if name != launch.loopback())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), "GLOO_SOCKET_IFNAME": outward}
    sweep = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    results = tmp_path / "runs" / "cut" / "results.csv"
    heard: set[str] = set()
    deadline = time.monotonic() + PATIENCE_S
    while len(lines(results)) < 4 or not heard:  # two invalid (single), one measured, and one runs
        assert time.monotonic() < deadline
        heard |= listening(session_of(sweep.pid))
        time.sleep(0.1)
    assert heard == {"127.0.0.1"}
    sweep.send_signal(end)
    sweep.wait(PATIENCE_S)
    while session_of(sweep.pid):
        assert time.monotonic() < deadline, "a process outlived its sweep"
        time.sleep(0.1)
    assert any(",ok," in row for row in lines(results))
    for record in results.parent.glob("*/record.json"):
        json.loads(record.read_text())
    left = left_in(scratch)
    if end == signal.SIGKILL:
        assert len(left) == 1
        subprocess.run([sys.executable, "-c", CLEAN], env=environment, check=True)
        assert left_in(scratch) == []
    else:
        assert left == []
        assert sweep.returncode == 128 + end
        said = "interrupted" if end == signal.SIGINT else f"interrupted by {end.name}"
        assert f"{said}: ".encode() in sweep.stdout.read()


# A process that starts later, and cleans up after the one that was killed.
CLEAN = "import time; time.sleep(1.1); from bench.ranks.scratch import scratch; scratch()"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_other_ways_to_end_are_answered_alike(number):
    before = {each: signal.getsignal(each) for each in interrupts.ASKED}
    try:
        signal.signal(number, signal.SIG_DFL)  # whoever started the tests, as under nohup, may have had it ignored
        interrupts.heed()
        with pytest.raises(interrupts.Asked, match=f"interrupted by {number.name}") as asked:
            signal.raise_signal(number)
        with pytest.raises(SystemExit) as left:
            interrupts.leave(asked.value)
        assert left.value.code == 128 + number
    finally:
        launch.interrupted.clear()
        for each, handler in before.items():
            signal.signal(each, handler)
