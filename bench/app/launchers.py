"""Where a sweep's ranks are started: on this machine, or on every host on which torchrun has started this command."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.ranks.launch import Progress, interrupted, launch, start_server
from bench.ranks.task import Outcome, Task
from conf.keys import Config

Launch = Callable[[Task, Progress], Outcome]


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
        hosts.follow()
        sys.exit(0)
    try:
        yield hosts.launch
    finally:
        hosts.dismiss()
