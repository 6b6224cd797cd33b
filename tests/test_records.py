"""What is on disk: damaged records, texts of every kind, a disk that is full, two commands on one folder."""

import copy
import csv
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
import psutil
import pytest

from analysis import reading
from bench.app import parquet, records, turns
from bench.app import sweep as app
from bench.app.job import Job
from bench.ranks.task import Outcome
from conf import files, recorded
from conf.files import FileFault
from conf.keys import Config
from tests.jobs import job

ROOT = Path(__file__).parents[1]
LONG_S = 60  # for what takes no time on an idle machine


@contextmanager
def no_ranks(config: Config) -> Iterator[Callable]:
    """In the place of ranks: each configuration ends at once, as an error."""
    yield lambda task, progress: Outcome("error", "there are no ranks here", [])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "launching", no_ranks)
    return tmp_path


@cache
def first_job(*words: str) -> Job:
    return job("name=mine", "strategy=single", "world_size=1", *words)


def jobs(*lengths: int, words: Sequence[str] = ()) -> list[Job]:
    like = first_job(*words)
    return [replace(like, config=replace(like.config, seq_len=n)) for n in lengths]


def written(folder: Path) -> list[dict]:
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def check_whole(folder: Path) -> int:
    """Every record and the table can be read and are the same rows, and nothing else is left -> how many."""
    found = [recorded.read(file)[0]["run_id"] for file in folder.glob("*/record.json")]
    assert sorted(found) == sorted(row["run_id"] for row in written(folder))
    assert not list(folder.rglob("*.tmp"))
    return len(found)


# Damaged records.

CONTENTS = {  # of record.json -> what is said
    b"[1, 2]": "holds a list",
    b"3": "holds a int",
    b"NaN": "holds a float",
    b"null": "holds a NoneType",
    b"": "not valid JSON",
    b'{"run_id": "': "not valid JSON",
    b'{"run_id": "\xff\xfe"}': "not valid JSON",
    b"[" * 100_000: "too many brackets",
    b'{"errors": ' + b'{"q": ' * 100_000: "too many brackets",
    b'{"seq_len": ' + b"9" * 10_000 + b"}": "not valid JSON",
    b"{}": "it has no run_id",
}
CHANGES = [  # of a record's fields -> what is said
    ({"status": None}, "it has no status"),
    ({"status": "fine"}, "status='fine' is not one of ok, invalid, oom, timeout, error"),
    ({"status": ["ok"]}, "status=['ok'] is no text"),
    ({"started_at": None}, "it has no started_at"),
    ({"started_at": 5}, "started_at=5 is no text"),
    ({"reason": None}, "it has no reason"),
    ({"run_id": "0123456789ab"}, "run_id='0123456789ab' is that of another folder"),
    ({"seq_len": "64"}, "seq_len='64' is no whole number"),
    ({"world_size": 1.5}, "world_size=1.5 is no whole number"),
    ({"compile": "yes"}, "compile='yes' is neither true nor false"),
    ({"device_name": 7}, "device_name=7 is no text"),
    ({"step_ms_median": "fast"}, "step_ms_median='fast' is no number"),
    ({"step_ms_median": math.nan}, "step_ms_median=nan is not finite"),
    ({"comm_bytes": -math.inf}, "comm_bytes=-inf is not finite"),
    ({"peak_bytes": 10**400}, "is not finite"),
    ({"losses": "5.4"}, "losses='5.4' is no list"),
    ({"losses": [5.4, "5.3"]}, "losses=[5.4, '5.3'] holds what is no number"),
    ({"losses": [5.4, math.inf]}, "losses=[5.4, inf] is not finite"),
    ({"errors": [1]}, "errors=[1] is no object"),
    ({"peak_bytes": None}, "it has no peak_bytes"),
    ({"config": None}, "it has no config"),
    ({"config": [1]}, "config=[1] is no section"),
    ({"config": {"seq_len": "64"}}, "seq_len='64' is no whole number"),
    ({"config": {"world_size": 10**12}}, "world_size=1000000000000 must be at most"),
    ({"config": {"precision": "fp8"}}, "precision=fp8 is not one of fp32"),
]


def fifo(file: Path) -> None:
    os.mkfifo(file)


def huge(file: Path) -> None:
    file.touch()
    os.truncate(file, 100 * 2**30)


THINGS = {Path.mkdir: "a folder, and a file is needed", fifo: "a device, and a file is needed", huge: "larger than"}


def damaged_by(content: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(content) and None


def changed(changes: dict) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        fine = {"status": "ok", "peak_bytes": 1, "comm_bytes": 0, "losses": [5.5, 5.4]}
        record = {**json.loads(aside(file).read_text()), **fine}
        file.write_text(json.dumps(record))
        recorded.read(file)  # it is fine, but for what changes
        file.write_text(json.dumps({**record, **changes}))

    return change


def aside(file: Path) -> Path:
    return file.with_name("before")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        *((damaged_by(content), said) for content, said in CONTENTS.items()),
        *((changed(changes), said) for changes, said in CHANGES),
        *THINGS.items(),
    ],
    ids=[*CONTENTS.values(), *(said for _, said in CHANGES), *(thing.__name__ for thing in THINGS)],
)
def test_a_damaged_record_is_set_aside_and_runs_again(damage, said, here, capsys):
    first, _ = app.run_all(jobs(64, 128))
    folder = here / "runs" / "mine"
    file = folder / first["run_id"] / "record.json"
    file.rename(aside(file))
    damage(file)
    before = file.lstat()
    problems = reading.load(folder).problems
    assert any(f"{first['run_id']}/record.json: " in problem and said in problem for problem in problems), problems
    capsys.readouterr()

    rows = app.run_all(jobs(64, 128))
    (sentence,) = [line for line in capsys.readouterr().out.splitlines() if "record.json.damaged" in line]
    assert said in sentence
    assert sentence.endswith("it is now record.json.damaged, and its configuration runs again")
    assert [row.get("kept", False) for row in rows] == [False, True]
    assert file.with_name("record.json.damaged").lstat().st_ino == before.st_ino
    assert check_whole(folder) == 2


def test_what_was_set_aside_is_never_overwritten(here):
    (row,) = app.run_all(jobs(64))
    file = here / "runs" / "mine" / row["run_id"] / "record.json"
    for n in range(3):
        file.write_text(f"[{n}]")
        app.run_all(jobs(64))
    names = ("record.json.damaged", "record.json.damaged.1", "record.json.damaged.2")
    assert [file.with_name(name).read_text() for name in names] == ["[0]", "[1]", "[2]"]


# Texts and numbers.

TEXTS = [
    *(
        "half a character \udcff\ud800",
        "NUL \0",
        "\r",
        "two\nlines\r\n",
        '"quotes", and; commas',
        "\u2028\u2029\x85\x1b[0m",
    ),
    *("=1+1", " \t ", "\N{GREEK SMALL LETTER ALPHA}\N{GRINNING FACE}", "\\udcff", "NaN", "x" * 100_000),
]


def test_whatever_a_text_holds_its_row_is_written_and_read(here, monkeypatch):
    @contextmanager
    def telling(config: Config) -> Iterator[Callable]:
        yield lambda task, progress: Outcome("error", TEXTS[task.config.seed], [], traceback=TEXTS[task.config.seed])

    monkeypatch.setattr(app, "launching", telling)
    each = [replace(like, config=replace(like.config, seed=n)) for n, like in enumerate(jobs(*[64] * len(TEXTS)))]
    refused = copy.deepcopy(each[0])  # in a sentence that holds it too
    refused.config.data.path = "".join(TEXTS)
    each.append(refused)
    rows = app.run_all(each)
    folder = here / "runs" / "mine"
    assert [row["reason"] for row in rows[:-1]] == TEXTS
    assert records.load_all(folder) == records.by_age([*rows])
    assert check_whole(folder) == len(rows)
    assert len((folder / "results.csv").read_text(encoding="utf-8").splitlines()) == len(rows) + 1
    table = pd.read_csv(folder / "results.csv", keep_default_na=False)
    assert list(table.run_id) == [row["run_id"] for row in written(folder)]
    assert list(table.reason) == [row["reason"] for row in written(folder)]
    assert not reading.load(folder).comm
    assert [row.get("kept", False) for row in app.run_all(each)] == [True] * len(TEXTS) + [False]


def test_a_number_that_is_not_finite_is_none_in_json(here):
    (row,) = app.run_all(jobs(64))
    folder = here / "runs" / "mine"
    lost = {"losses": [5.5, math.nan, math.inf], "loss_first": 5.5, "loss_last": math.inf, "errors": {"q": math.nan}}
    records.save(folder, {**row, **lost}, [])
    (stored,) = records.load_all(folder)
    assert (stored["losses"], stored["loss_last"], stored["errors"]) == ([5.5, None, None], None, {"q": None})
    text = (folder / row["run_id"] / "record.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss_first"] == 5.5
    assert [row.get("kept") for row in app.run_all(jobs(64))] == [True]


# A disk on which nothing can be written, or no longer.


def a_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small disk of its own."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        pytest.skip("a disk cannot be mounted here: it takes root's rights")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("place", ["runs", "runs/mine", "runs/mine/.turn.lock/inside"])
def test_what_stands_in_the_way_is_said_before_the_first_rank(place, here, monkeypatch):
    a_file(here / place)
    monkeypatch.setattr(app, "run", pytest.fail)
    for run in (lambda: app.run_all(jobs(64, 128)), lambda: app.run_one(jobs(64)[0])):
        with pytest.raises(FileFault, match=r"^runs/mine\S*: "):
            run()


@pytest.mark.parametrize(("options", "said"), [("ro", "Read-only file system"), ("size=8k", "No space left on device")])
def test_a_disk_that_cannot_be_written_is_said_before_the_first_rank(options, said, here, monkeypatch):
    monkeypatch.setattr(app, "run", pytest.fail)
    with mounted(here / "runs" / "mine", options), pytest.raises(FileFault, match=rf"^runs/mine: .*\({said}\)$"):
        app.run_all(jobs(64, 128))


def test_the_command_says_it_in_one_sentence(here):
    a_file(here / "runs" / "mine")
    for words in (["seq_len=64"], ["-m", "seq_len=64,128"]):
        result = subprocess.run(
            [sys.executable, "-m", "bench", "name=mine", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.startswith("bench: runs/mine: ")
        assert result.stderr.count("\n") == 1


LENGTHS = range(2, 80, 2)


def test_a_disk_that_fills_stops_the_sweep_and_harms_nothing(here, capsys):
    folder = here / "runs" / "mine"
    with mounted(folder, "size=300k"):
        with pytest.raises(SystemExit) as end:
            app.run_all(jobs(*LENGTHS))
        assert end.value.code == 1
        n = check_whole(folder)
        assert 5 < n < len(LENGTHS)
        last = " ".join(capsys.readouterr().out.splitlines()[-1:])
        lost = f"the row of single · world_size=1 · seq_len={LENGTHS[n]} is not written"
        assert last == (
            f"runs/mine: No space left on device, and {lost}: {n} of {len(LENGTHS)} rows are in runs/mine; the same "
            "command again goes on from there"
        )
        subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
        rows = app.run_all(jobs(*LENGTHS))
        assert sum(row.get("kept", False) for row in rows) == n
        assert check_whole(folder) == len(LENGTHS)


def sweep_elsewhere(limit: int = resource.RLIM_INFINITY, words: Sequence[str] = ()) -> None:
    """What another process of these tests runs: a sweep without ranks, under a limit on the size of files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    files.PROBE = 1
    parquet.available = lambda: False  # its schema alone is longer than that
    app.launching = no_ranks
    app.run_all(jobs(*LENGTHS, words=words))


def start(call: str) -> subprocess.Popen:
    """Another process that calls something of this file."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from tests.test_records import *; {call}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
    )


def test_a_file_that_may_grow_no_more_stops_the_sweep_and_harms_nothing(here):
    process = start("sweep_elsewhere(limit=12_000)")
    said, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    n = check_whole(here / "runs" / "mine")
    assert 5 < n < len(LENGTHS)
    assert f"File too large, and the row of single · world_size=1 · seq_len={LENGTHS[n]} is not written" in said
    assert sum(row.get("kept", False) for row in app.run_all(jobs(*LENGTHS))) == n


def test_what_a_killed_run_has_left_is_put_in_order(here):
    rows = app.run_all(jobs(64, 128))
    folder = here / "runs" / "mine"
    whole = (folder / "results.csv").read_text()
    for stray in (folder / "results.tmp", *(folder / row["run_id"] / "record.tmp" for row in rows)):
        stray.write_text('{"run_id": "')
    (folder / "results.csv").write_text("\n".join(whole.splitlines()[:2]))  # killed between a record and its row
    assert all(row["kept"] for row in app.run_all(jobs(64, 128)))
    assert (folder / "results.csv").read_text() == whole
    assert check_whole(folder) == 2


# Two commands on one folder.


def hold(folder: str) -> None:
    """Have a turn, and a child that outlives this process, until killed."""
    with turns.turn(Path(folder), shared=False, say=print):
        child = subprocess.Popen(["sleep", str(2 * LONG_S)], close_fds=False)
        print(child.pid, flush=True)
        signal.pause()


@pytest.fixture
def holder(here) -> Iterator[tuple[subprocess.Popen, psutil.Process]]:
    """A process whose turn it is, and its child."""
    (here / "runs" / "mine").mkdir(parents=True)
    process = start("hold('runs/mine')")
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    yield process, child
    process.kill()
    process.wait()
    child.kill()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_second_command_says_whose_turn_it_is_and_waits(holder, here):
    said: list[str] = []
    done: list[bool] = []

    def second() -> None:
        with records.opened(Path("runs/mine"), False, said.append):
            done.append(True)

    thread = threading.Thread(target=second)
    thread.start()
    wait_until(lambda: bool(said))
    process, child = holder
    assert said[0].startswith(f"runs/mine: it is the turn of process {process.pid} (python -m bench")
    assert said[0].endswith("; this command waits, and then takes what is left")
    assert not done
    process.kill()
    thread.join(LONG_S)
    assert done
    assert child.is_running(), "and it holds nothing"
    assert len(said) == 1


def test_ctrl_c_while_waiting_ends_at_once(holder, here):
    process = start("sweep_elsewhere()")
    assert process.stdout is not None
    assert "it is the turn of process" in process.stdout.readline()
    waits = re.compile(rf"-> FLOCK .* {process.pid} ")
    wait_until(lambda: bool(waits.search(Path("/proc/locks").read_text())))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 130
    assert said.startswith("interrupted: 0 of "), said


def test_those_that_need_no_quiet_share_a_turn_and_lose_no_row(here):
    """Two processes write a sweep each into one folder, and whoever looks finds a table that is whole."""
    both = [start(f"sweep_elsewhere(words=('mode=simulate', 'seed={n}'))") for n in (1, 2)]
    results = here / "runs" / "mine" / "results.csv"
    wait_until(results.exists)
    seen = 0
    while any(process.poll() is None for process in both):
        n = len(written(results.parent))
        assert n >= seen, "rows were lost"
        seen = n
    for process in both:
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert "turn of" not in said
    assert check_whole(results.parent) == 2 * len(LENGTHS)


@pytest.mark.slow
def test_two_commands_at_once_measure_every_configuration_once(here):
    words = ["name=mine", "strategy=single", "world_size=1", "seq_len=16,32", "steps=1", "warmup=0", "model=tiny"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "bench", "-m", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=4 * LONG_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(text.count("(kept from an earlier run)") for text in said) == 2
    assert sum(text.count("; this command waits, and then takes what is left") for text in said) <= 1
    assert check_whole(here / "runs" / "mine") == 2
    assert {row["status"] for row in written(here / "runs" / "mine")} == {"ok"}
