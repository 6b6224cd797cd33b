"""A command line as users give it, on one host or on two, and all that can be seen and done from outside."""

import csv
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from conf import recorded
from tests.faults import left
from tests.faults.inject import FOLDER
from tests.two_hosts import ROOT, Pair

MODULE = "tests.faults.faulty"
PATIENCE_S = 600  # for a whole sweep on a busy machine
RESTARTS = 9  # by torchrun, as often as something happens to a sweep


class Command(ABC):
    """A sweep that is started, maybe again, in a folder of its own: runs/, tmp/, logs, and the plan of its faults."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder, self.words = folder, words
        (folder / "tmp").mkdir(parents=True)
        (folder / "runs").mkdir()
        self.environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), FOLDER: str(folder)}
        self.runs = folder / "runs" / "faulty"
        self.shared_memory = left.shared_memory()

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def codes(self) -> list[int | None]:
        """How each host's command has ended."""

    @abstractmethod
    def leads(self, process: psutil.Process) -> bool:
        """Is it the one that writes rows, if it is one of ours that run the command?"""

    def is_over(self) -> bool:
        return None not in self.codes()

    def leader(self) -> psutil.Process | None:
        for process in left.processes_of(self.folder):
            with suppress(psutil.Error):
                if MODULE in process.cmdline() and self.leads(process):
                    return process
        return None

    def said(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("**/log")))

    def until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder} {' '.join(self.words)}\n{self.said()[-5000:]}")
            time.sleep(0.05)

    def end(self) -> None:
        """Kill what is left of it."""
        while there := left.processes_of(self.folder):
            for process in there:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)

    def rows(self) -> list[dict[str, str]]:
        """The table as it is now. Raises what is wrong with it."""
        try:
            with open(self.runs / "results.csv", newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file, strict=True))
        except FileNotFoundError:
            return []
        if bad := [row for row in rows if None in row or None in row.values() or not row["run_id"]]:
            raise ValueError(f"{self.runs}/results.csv: {bad[0]}")
        return rows

    def records(self) -> set[str]:
        """The run_ids of what has been finished. Raises what is wrong with a record."""
        return {recorded.read(file)[0]["run_id"] for file in self.runs.glob("*/record.json")}


class Local(Command):
    """On this machine alone."""

    def start(self) -> None:
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", MODULE, *self.words],
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def codes(self) -> list[int | None]:
        return [self.process.poll()]

    def leads(self, process: psutil.Process) -> bool:
        return process.pid == self.process.pid


class Faulty(Pair):
    module = MODULE


class Torchrun(Command):
    """On two hosts with one disk."""

    def start(self) -> None:
        for name in ("a", "b"):
            (self.folder / name).mkdir(exist_ok=True)
            if not (self.folder / name / "runs").is_symlink():
                (self.folder / name / "runs").symlink_to("../runs")
        self.hosts = Faulty(self.folder, *self.words, restarts=RESTARTS, environment=self.environment)

    def codes(self) -> list[int | None]:
        return [agent.poll() for agent in self.hosts.agents.values()]

    def leads(self, process: psutil.Process) -> bool:
        return process.environ().get("RANK") == "0"

    def lose_a_host(self) -> None:
        """The one that follows, until that was noticed."""
        gone = "it no longer answers\n"
        leader, before = self.leader(), self.said().count(gone)
        follower = next(name for name, agent in self.hosts.agents.items() if agent.pid != leader.ppid())
        self.hosts.kill(follower)
        self.until(lambda: self.said().count(gone) > before)
        self.hosts.start(follower)


LAUNCHERS: dict[str, type[Command]] = {"local": Local, "torchrun": Torchrun}
