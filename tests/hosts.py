"""Two hosts on one machine: network namespaces with names of their own, joined by a cable.

    python -m tests.hosts [RATE] OVERRIDES...            # e.g. 200mbit -m sweep=placement

starts `torchrun ... -m bench OVERRIDES launch=torchrun` on both; what the first says is passed on. RATE is the cable's,
each way, as `tc` has it; without one it is as fast as memory. Nothing stays: a host is all that was started on it, and
goes with the process that made it, however that ends. It takes root, and Debian's package iproute2.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
CABLE = "veth0"  # its end on each host
PATIENCE_S = 60  # with what was asked to end


ADDRESSES = {"hosta": "10.0.0.1", "hostb": "10.0.0.2"}
BOOT = """
hostname {name}
mount -t tmpfs names /mnt  # seen by this host alone
printf '%s\\n' '127.0.0.1 localhost' {known} > /mnt/hosts
mount --bind /mnt/hosts /etc/hosts
ip link set lo up
echo ready
exec sleep infinity
"""


class NotAllowed(Exception):
    """There can be no such hosts here; says why."""


class Host:
    """A machine of its own to whoever runs on it: its network, its name, its processes."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        known = " ".join(f"'{address} {name}'" for name, address in ADDRESSES.items())
        script = BOOT.format(name=name, known=known)
        own = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.maker = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *own, "sh", "-e", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C ends what runs on it first
        )
        if self.maker.stdout.readline() != "ready\n":
            raise NotAllowed(f"no host can be made of a network namespace here: {self.maker.communicate()[1].strip()}")
        (first_process,) = psutil.Process(self.maker.pid).children()
        self.pid = first_process.pid

    def inside(self, *command: str) -> list[str]:
        """A command as it is run on this host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--pid", "--mount", "--", *command]

    def do(self, command: str) -> str:
        return subprocess.run(self.inside(*command.split()), capture_output=True, text=True, check=True).stdout

    def sent(self) -> int:
        """Bytes that have left it, by its kernel's count."""
        return int(counters(self.do("cat /proc/net/dev"))[8])

    def end(self) -> None:
        self.maker.kill()
        self.maker.communicate()


def counters(proc_net_dev: str) -> list[str]:
    """Of the cable: 8 numbers of what came in, and 8 of what went out, bytes first."""
    return re.search(rf"^ *{CABLE}: *(.*)$", proc_net_dev, re.MULTILINE)[1].split()


class TwoHosts:
    """hosta and hostb, as long as this lasts. Raises NotAllowed."""

    def __init__(self, rate: str | None = None) -> None:
        self.rate = rate
        self.hosts: list[Host] = []
        self.running: list[subprocess.Popen] = []

    def __enter__(self) -> "TwoHosts":
        try:
            for name, address in ADDRESSES.items():
                self.hosts.append(Host(name, address))
            self.join()
        except FileNotFoundError as error:
            self.__exit__()
            raise NotAllowed(f"no host can be made of a network namespace here: there is no {error.filename}") from None
        except subprocess.CalledProcessError as error:
            self.__exit__()
            raise NotAllowed(f"no hosts can be joined here: {' '.join(error.cmd)}: {error.stderr.strip()}") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def join(self) -> None:
        a, b = self.hosts
        cable = f"ip link add {CABLE} netns {a.pid} type veth peer name {CABLE} netns {b.pid}"
        subprocess.run(cable.split(), check=True, capture_output=True, text=True)
        for host in self.hosts:
            host.do(f"ip address add {host.address}/24 dev {CABLE}")
            host.do(f"ip link set {CABLE} up")
            if self.rate:
                host.do(f"tc qdisc add dev {CABLE} root tbf rate {self.rate} burst 256kb latency 100ms")

    def torchrun(self, arguments: list[str], outputs: list[object], folder: str = ".") -> list[subprocess.Popen]:
        """Start torchrun on both, with these arguments, in a folder; outputs: whereto each writes."""
        options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.hosts[0].address}:29500"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": CABLE}
        environment.pop("PYTEST_XDIST_WORKER", None)
        for host, output in zip(self.hosts, outputs, strict=True):
            torchrun = [sys.executable, "-m", "torch.distributed.run", *options, f"--local-addr={host.address}"]
            command = host.inside("env", f"--chdir={os.path.abspath(folder)}", *torchrun, *arguments)
            how = {"env": environment, "stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.running.append(subprocess.Popen(command, **how))
        return self.running

    def interrupt(self) -> None:
        """Ctrl-C on both."""
        for process in self.running:
            for torchrun in psutil.Process(process.pid).children():
                torchrun.send_signal(signal.SIGINT)

    def __exit__(self, *error: object) -> None:
        for host in self.hosts:
            host.end()
        for process in self.running:
            process.kill()
            process.wait()


def main(words: list[str]) -> int:
    """The exit code of the first host's."""
    rate = words.pop(0) if words and re.fullmatch(r"[\d.]+[kmg]?bit", words[0]) else None
    arguments = ["--nproc-per-node=1", "-m", "bench", *words, "launch=torchrun"]
    with tempfile.TemporaryFile("w+") as others, TwoHosts(rate) as two:
        first, second = two.torchrun(arguments, [None, others])
        try:
            codes = first.wait(), second.wait(PATIENCE_S)
        except KeyboardInterrupt:
            two.interrupt()
            for torchrun in (first, second):
                torchrun.wait(PATIENCE_S)
            return 128 + signal.SIGINT
        if any(codes):
            others.seek(0)
            print(f"{two.hosts[1].name}:\n{others.read()}", file=sys.stderr)
    return max(codes)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except NotAllowed as why:
        sys.exit(f"tests.hosts: {why}")
