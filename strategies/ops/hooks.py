"""Where those who watch a step, or stand for ranks that are not there, hang in; nobody does in a run that is timed.

announce     the ledger: what the traffic inside means, where the dispatched operation alone does not say it
backend_of   the emulator: the backend whose messages a made-up process group stands for
hops         the simulator: which hops around a ring, or blocks of a grid's row, are run, where one can be counted for
             others that are alike, by what queries see there or by what the caller says that a hop is

And one thing is said to all of them: `again`, that a backward makes again what forward has made already.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Meaning:
    """Of what is sent: the collective that it stands for, and whose it is."""

    kind: str | None = None
    weights: bool = False  # weights or their gradients, not activations
    source: str | None = None  # who sends it, where that is no line of a strategy
    verb: str | None = None  # or the verb with which the strategy asked for it, when it took its shares


def nobody_listens(meaning: Meaning) -> AbstractContextManager:
    return nullcontext()


def every_hop(n: int, sees: Callable[[int], Any]) -> Iterable[int]:
    return range(n)


@dataclass
class Hooks:
    announce: Callable[[Meaning], AbstractContextManager] = nobody_listens
    backend_of: Callable[[dist.ProcessGroup], str] = dist.get_backend
    hops: Callable[[int, Callable[[int], Any]], Iterable[int]] = every_hop  # of n, with what there is to do in each
    again: bool = False


hooks = Hooks()


@contextmanager
def hooked(**changes: Any) -> Iterator[None]:
    """Hang in, for as long as this lasts."""
    before = {name: getattr(hooks, name) for name in changes}
    vars(hooks).update(changes)
    try:
        yield
    finally:
        vars(hooks).update(before)


def meaning(**what: object) -> AbstractContextManager:
    """Announce what is sent inside."""
    return hooks.announce(Meaning(**what))  # type: ignore[arg-type]
