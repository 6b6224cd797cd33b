"""A cluster of two nodes, both of which are this machine: slurmctld and two slurmd, in a namespace for processes.

With the namespace they all end, and whatever jobs have started, however the test ends.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")  # as nodes are called, since these need no name server
NAMESPACE = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
NEEDED = ("slurmctld", "slurmd", "sbatch", "unshare", "setpriv")
START_S = 60
PATIENCE_S = 240
CONFIGURATION = """
ClusterName=bench
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES State=UP
"""  # cred_expire: a job that is requeued waits for so long


class NoCluster(Exception):
    """Why there can be none here."""


class Cluster:
    """Two nodes, as long as the context lasts."""

    def __init__(self) -> None:
        if missing := [name for name in NEEDED if shutil.which(name) is None]:
            raise NoCluster(f"no {missing[0]} here (apt-get install slurm-wlm)")
        if os.geteuid() != 0:
            raise NoCluster("a namespace for slurmd's processes needs root")
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # the paths of sockets may not be long
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        said = CONFIGURATION.format(folder=self.folder, user=getpass.getuser(), nodes=NODES, ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(said)
        daemons = ["slurmctld -D", *(f"slurmd -D -N {node}" for node in NODES)]
        script = "".join(f"{daemon} & " for daemon in daemons) + "wait"
        with open(self.folder / "log", "w") as log:
            self.namespace = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *NAMESPACE, "bash", "-c", script],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self.until(lambda: self.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], START_S)
        except TimeoutError as error:
            self.__exit__()
            raise NoCluster(f"slurmctld and slurmd do not start here: {error}") from None
        return self

    def __exit__(self, *error: object) -> None:
        self.namespace.send_signal(signal.SIGKILL)
        self.namespace.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def until(self, is_so: Callable[[], object], within_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + within_s
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with ExitStack() as open_ones:
        found = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]
