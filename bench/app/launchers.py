"""Where a sweep's ranks are started: on this machine, on every host on which torchrun has started this command, or
elsewhere by Slurm."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from bench.ranks.launch import Progress, interrupted, launch, start_server
from bench.ranks.task import Outcome, Task
from conf.keys import Config
from conf.words import Invalid

led: list[Any] = []  # the hosts that follow this one: at most one bench.ranks.hosts.Hosts
Launch = Callable[[Task, Progress], Outcome]


def submit(config: Config) -> NoReturn:
    """This whole command as a job of Slurm."""
    try:
        from bench.app import slurm
    except ModuleNotFoundError:
        raise Invalid("launch=slurm needs the package submitit; pip install 'submitit>=1.5' would do") from None
    slurm.submit(config)


@contextmanager
def launching(config: Config) -> Iterator[Launch]:
    """What launches a task, as long as the sweep lasts. On a host that follows another, this is the whole sweep."""
    interrupted.clear()
    if config.launch.name != "torchrun":
        start_server()
        yield launch
        return
    from bench.ranks.hosts import Hosts  # it imports torch, which the parent on one machine does without

    hosts = Hosts(config)
    if hosts.number > 0:
        sys.exit(hosts.follow())
    led.append(hosts)
    yield hosts.launch


def dismiss(code: int) -> None:
    """End the hosts that follow this one as it ends itself: torchrun would wait for those that did not fail as well."""
    while led:
        led.pop().dismiss(code)
