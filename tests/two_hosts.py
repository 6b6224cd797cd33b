"""Two hosts of which both are this machine: torchrun twice, on the loopback device."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PATIENCE_S = 240  # a busy machine takes long to import torch four times


class Pair:
    """Two hosts that run the same command, each in a folder of its own."""

    module = "bench"

    def __init__(
        self, folder: Path, *overrides: str, restarts: int = 0, environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder, self.overrides, self.restarts = folder, overrides, restarts
        self.environment = environment or {}
        self.agents: dict[str, subprocess.Popen] = {}
        for name in ("a", "b"):
            self.start(name)

    def start(self, name: str) -> None:
        """Start a host's torchrun; what it says goes to its log."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        arguments = ["--nnodes=2", "--nproc-per-node=1", f"--max-restarts={self.restarts}", "--rdzv-backend=c10d"]
        arguments += [f"--rdzv-endpoint={self.endpoint}", "--local-addr=127.0.0.1", "-m", self.module]
        arguments[:0] = [f"--rdzv-conf=is_host={int(name == 'a')}"]  # torchrun's store, which must outlive the other
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **self.environment,
        }
        environment.pop("PYTEST_XDIST_WORKER", None)
        with open(folder / "log", "a") as log:
            self.agents[name] = subprocess.Popen(
                [shutil.which("torchrun"), *arguments, *self.overrides, "launch=torchrun", "launch.interface=lo"],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def log(self, name: str) -> str:
        return (self.folder / name / "log").read_text()

    def until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline, f"a:\n{self.log('a')}\nb:\n{self.log('b')}"
            time.sleep(0.05)

    def leader(self) -> str | None:
        """The host that writes rows, as soon as that is known."""
        return next((name for name in self.agents if "[1/" in self.log(name)), None)

    def ranks(self, name: str) -> list[psutil.Process]:
        """The ranks that run on a host: what its ranks' server has forked."""
        try:
            tree = psutil.Process(self.agents[name].pid).children(recursive=True)
            servers = [process for process in tree if "multiprocessing.forkserver" in " ".join(process.cmdline())]
            return [rank for server in servers[:1] for rank in server.children()]
        except psutil.Error:
            return []

    def kill(self, name: str) -> None:
        """The host is gone, with everything on it."""
        agent = psutil.Process(self.agents[name].pid)
        for process in [agent, *agent.children(recursive=True)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.agents[name].wait()

    def wait(self) -> list[int]:
        """The exit codes of both."""
        self.until(lambda: all(agent.poll() is not None for agent in self.agents.values()))
        return [agent.returncode for agent in self.agents.values()]

    def end(self) -> None:
        for name, agent in self.agents.items():
            if agent.poll() is None:
                self.kill(name)
