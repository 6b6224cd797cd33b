"""What an instrument is, and the one thing that several need."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import getattr_static
from typing import Any


class Instrument:
    """Sees every operation that is dispatched in a step."""

    times = 1  # how many alike the operations of the moment stand for (bench/simulation)

    def counting(self, times: int) -> AbstractContextManager:
        """What runs inside stands for so many alike."""
        return replaced(self, "times", self.times * times)

    def watching(self) -> AbstractContextManager:
        """Around the step."""
        return nullcontext()

    def reached(self, part: str) -> None:
        """Forward, backward or the optimizer begins."""

    def saw(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """An operation has run."""
        raise NotImplementedError


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute, for as long as this lasts."""
    before = getattr_static(holder, name)  # a method as its class has it, static or not
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
