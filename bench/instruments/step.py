"""A step, told in one place for those who time it, observe it and trace it."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from strategies.base import Strategy


class Workload(Protocol):
    """Something that runs in steps: every micro-batch forward and backward, whose gradients add up; then an update."""

    @property
    def strategy(self) -> Strategy: ...

    @property
    def model(self) -> nn.Module: ...

    def forward(self, batch: Any) -> Tensor: ...

    def backward(self, result: Tensor, last: bool = True) -> None: ...

    def finish(self) -> None: ...

    def update(self) -> None: ...

    def state(self) -> dict[str, list[Tensor]]: ...


def run_step(
    workload: Workload,
    batches: Iterable[Any],
    reach: Callable[[str], object] = lambda part: None,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> list[Tensor]:
    """What forward gave for each micro-batch. reach: is told which part begins. around: is around each micro-batch."""
    results = []
    for batch in batches:
        with around():
            reach("forward")
            result = workload.forward(batch)
            reach("backward")
            workload.backward(result, last=False)
            results.append(result.detach())
    workload.finish()
    reach("optimizer")
    workload.update()
    return results
