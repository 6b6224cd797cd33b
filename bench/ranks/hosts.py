"""The ranks of one configuration on several hosts, of each of which torchrun has started one process of ours.

Rendezvous, restarts and the hosts' numbers are torchrun's, and so is the store through which the hosts hold to each
other. The first host leads: it alone composes and writes rows. The others follow: they start their share of the ranks
of what it launches, and tell how these ended. Whatever ends a configuration on one host ends it on all.
"""

import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from math import ceil

import psutil
from torch import distributed as dist

from bench.ranks.launch import Clock, Interrupted, Progress, Ranks, interrupted, run_ranks, start_server
from bench.ranks.launch import launch as launch_here
from bench.ranks.scratch import scratch
from bench.ranks.task import HostLost, Meeting, Outcome, Task
from conf.keys import Config
from conf.words import Invalid

LOST_S = 10.0  # of silence, after which a host is given up
POLL_S = 0.1


def of_torchrun() -> tuple[int, int]:
    """This host's number and how many there are. Raises Invalid where torchrun has not started this process."""
    try:
        number, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    except (KeyError, ValueError):
        raise Invalid(
            "launch=torchrun: this process was not started by torchrun; torchrun --nnodes=2 --nproc-per-node=1 "
            "--rdzv-backend=c10d --rdzv-endpoint=HOST:PORT -m bench ... launch=torchrun on every host would do"
        ) from None
    if local != 1:
        raise Invalid(f"launch=torchrun: --nproc-per-node={local}: one process starts a host's ranks; 1 would do")
    return number, count


def interface_to(address: str) -> str:
    """The network interface of this host that leads to an address, its own included. Raises Invalid."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError as error:
            raise Invalid(
                f"launch.interface: no way leads to {address} ({error.strerror}); the name of one would do"
            ) from None
        own = probe.getsockname()[0]
    named = {given.address: name for name, all_given in psutil.net_if_addrs().items() for given in all_given}
    if own not in named or own.startswith("127."):
        others = ", ".join(name for name in psutil.net_if_addrs() if not name.startswith("lo"))
        raise Invalid(f"launch.interface: {address} is on this host's loopback alone; one of {others} would do")
    return named[own]


class Hosts:
    """The hosts of a sweep, as one of them sees them."""

    def __init__(self, config: Config) -> None:
        self.number, self.count = of_torchrun()
        self.store, _, _ = next(dist.rendezvous("env://", self.number, self.count, timeout=timedelta(seconds=60)))
        self.meeting_point = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.interface = config.launch.interface or interface_to(self.meeting_point[0])
        self.tasks = 0
        self.lost = ""
        self.store.set(f"name/{self.number}", socket.gethostname())
        self.names = [self.store.get(f"name/{host}").decode() for host in range(self.count)]

    # What every host does.

    def share(self, config: Config) -> range:
        """This host's ranks."""
        each = ranks_per_host(config, self.count)
        return range(self.number * each, (self.number + 1) * each)[: max(0, config.world_size - self.number * each)]

    def run_share(
        self, n: int, task: Task, progress: Progress, elsewhere: Callable[[Ranks], Outcome | None]
    ) -> tuple[Outcome, Clock]:
        clock = Clock(task.config.timeout_s)
        with tempfile.TemporaryDirectory(dir=scratch()) as folder:
            meeting = Meeting(self.interface, store=self.meeting_point, prefix=f"{n}/ranks")
            return run_ranks(self.share(task.config), task, meeting, folder, clock, progress, elsewhere), clock

    def is_set(self, key: str) -> bool:
        return self.store.check([key])

    # What a follower does.

    def follow(self) -> int:
        """Run this host's share of what the first host launches, until it says that there is no more -> how it ends.

        Raises HostLost where the first host is gone, and torchrun's store with it.
        """
        start_server()
        try:
            return self.follow_on()
        except (dist.DistNetworkError, dist.DistStoreError):
            raise HostLost(f"host {self.names[0]}: it no longer answers") from None

    def follow_on(self) -> int:
        while isinstance(task := self.next_task(), Task):
            outcome, _ = self.run_share(self.tasks, task, lambda text: None, lambda ranks: self.called_off())
            self.store.set(f"{self.tasks}/end/{self.number}", pickle.dumps(outcome))
            while self.called_off() is None:
                pause()
            self.tasks += 1
        self.store.set(f"bye/{self.number}", "")
        return task

    def next_task(self) -> Task | int:
        while not self.is_set(f"{self.tasks}/task"):
            pause()
        return pickle.loads(self.store.get(f"{self.tasks}/task"))

    def called_off(self) -> Outcome | None:
        """Is it over elsewhere? Who asks is still there."""
        self.store.add(f"{self.tasks}/beat/{self.number}", 1)
        return Outcome("error", "it is over elsewhere", []) if self.is_set(f"{self.tasks}/over") else None

    # What the leader does.

    def launch(self, task: Task, progress: Progress) -> Outcome:
        """Run a resolved configuration on its ranks, on all hosts. Raises HostLost after a host was lost."""
        if self.lost:
            raise HostLost(f"host {self.lost} is lost, and what is left needs it")
        start_server()
        if task.config.mode != "real":
            return launch_here(task, progress)
        n, self.tasks = self.tasks, self.tasks + 1
        self.store.set(f"{n}/task", pickle.dumps(task))
        watch = Watch(self, n)
        try:
            outcome, clock = self.run_share(n, task, progress, watch.news)
            outcome = watch.settle(outcome)
        finally:
            self.store.set(f"{n}/over", "")
        self.lost = watch.lost
        outcome.seconds = round(clock.so_far, 3)
        return outcome

    def dismiss(self, code: int) -> None:
        """Tell the others that there is no more, and with which code all hosts end."""
        self.store.set(f"{self.tasks}/task", pickle.dumps(code))
        until = time.monotonic() + LOST_S
        there = [host for host in range(1, self.count) if self.names[host] != self.lost]
        while time.monotonic() < until and not all(self.is_set(f"bye/{host}") for host in there):
            time.sleep(POLL_S)


class Watch:
    """How a configuration goes on the other hosts, as the leader learns it."""

    def __init__(self, hosts: Hosts, n: int) -> None:
        self.hosts, self.n = hosts, n
        self.ends: dict[int, Outcome] = {}
        self.beats: dict[int, tuple[int, float]] = dict.fromkeys(range(1, hosts.count), (-1, time.monotonic()))
        self.lost = ""

    def news(self, ranks: Ranks | None = None) -> Outcome | None:
        """A failure on another host that is not the echo of another's; or the loss of one."""
        for host in self.missing():
            if self.hosts.is_set(key := f"{self.n}/end/{host}"):
                self.ends[host] = self.named(host, pickle.loads(self.hosts.store.get(key)))
                continue
            beat, since = self.hosts.store.add(f"{self.n}/beat/{host}", 0), self.beats[host][1]
            if beat != self.beats[host][0]:
                self.beats[host] = beat, time.monotonic()
            elif time.monotonic() - since > LOST_S:
                self.lost = self.hosts.names[host]
                return Outcome("error", f"host {self.lost}: it no longer answers", [])
        return next((end for end in self.ends.values() if end.status not in ("ok", "timeout") and not end.echo), None)

    def missing(self) -> list[int]:
        return [host for host in self.beats if host not in self.ends]

    def named(self, host: int, outcome: Outcome) -> Outcome:
        """What is not well, with the host where it is so."""
        if outcome.status != "ok":
            outcome.reason = f"host {self.hosts.names[host]}: {outcome.reason}"
        return outcome

    def settle(self, own: Outcome) -> Outcome:
        """How the configuration ended, of how it ended here and elsewhere."""
        if self.lost or any(own is end for end in self.ends.values()):  # it was the news of another that ended it here
            return own
        own = self.named(0, own)
        if own.status in ("error", "oom") and not own.echo:
            return own
        while self.missing():
            if (news := self.news()) is not None:
                return news
            pause()
        if (news := self.news()) is not None:
            return news
        ends = [own, *(self.ends[host] for host in sorted(self.ends))]
        worst = next((end for end in ends if end.status != "ok"), None)
        if worst is None:
            return Outcome("ok", "", [rank for end in ends for rank in end.ranks])
        late = [end.reason for end in ends if end.status == "timeout"]
        return Outcome("timeout", "; ".join(late), []) if late else worst


def pause() -> None:
    if interrupted.is_set():
        raise Interrupted
    time.sleep(POLL_S)


def ranks_per_host(config: Config, hosts: int) -> int:
    """As many as were asked for, or an equal share. Raises Invalid where ranks would be left without a host."""
    each = config.launch.ranks_per_host or ceil(config.world_size / hosts)
    if each * hosts < config.world_size:
        raise Invalid(
            f"launch.ranks_per_host={each}: {hosts} hosts have room for {each * hosts} of world_size="
            f"{config.world_size} ranks; {ceil(config.world_size / hosts)} would do"
        )
    return each
