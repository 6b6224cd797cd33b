"""One step with every instrument on: what it sends, computes and holds. Instruments cost time, so it is never timed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.instruments.flops import CountedKernel, FlopCounter
from bench.instruments.instrument import Instrument
from bench.instruments.ledger import Ledger
from bench.instruments.memory import MemoryLog
from bench.instruments.step import Workload, run_step
from conf.measurement import Entry, Peak, Predicted, Span
from strategies.ops.hooks import every_hop, hooked
from strategies.ops.mesh import Axis
from strategies.ops.options import Options


@dataclass
class Observed:
    """One rank's step: the lines of comm.csv, FLOPs, bytes held: at most, by place; when forward ended; by the host."""

    comm: list[Entry]
    flops: int
    peaks: dict[str, Peak]
    after_forward: int
    host_bytes: int = 0
    predicted: Predicted | str | None = None  # by a clock, or why not
    spans: list[Span] = field(default_factory=list)  # what ran when by that clock, where that was asked for

    @property
    def peak(self) -> Peak:
        return max(self.peaks.values(), key=lambda peak: peak.total)


class Instruments(TorchDispatchMode):
    """Shows every operation that runs inside `with Instruments(...):`, once it has run, to all of them."""

    def __init__(self, log: MemoryLog, *others: Instrument) -> None:
        super().__init__()
        self.lent, self.instruments, self.fake = log.lent, (log, *others), log.fake_mode
        self.contexts = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or every operation is wrapped once more

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes back as operations on its local tensor, which is what is here
        kwargs = kwargs or {}
        if self.fake is not None:  # asked here, for to send every operation through two modes takes a third more
            out = self.fake.__torch_dispatch__(func, types, args, kwargs)
        else:
            self.lent.settle()
            out = func(*(self.lent.lend(args) if func.namespace == "c10d" else args), **kwargs)
        if func.namespace != "prim":
            for instrument in self.instruments:
                instrument.saw(func, args, kwargs, out)
        return out

    def __enter__(self) -> "Instruments":
        for instrument in self.instruments:
            self.contexts.enter_context(instrument.watching())
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.contexts.close()

    @contextmanager
    def counting(self, times: int) -> Iterator[None]:
        """What runs inside stands for so many alike."""
        with ExitStack() as each:
            for instrument in self.instruments:
                each.enter_context(instrument.counting(times))
            yield


def all_hops(seen: Instruments, axis: Axis, options: Options, *like: Any) -> Iterable[int]:
    return every_hop(axis, options)


def observe(
    training: Workload,
    batches: Iterable[Any],
    log: MemoryLog,
    hops: Callable[..., Iterable[int]] = all_hops,
    alike: int = 1,
    others: Iterable[Instrument] = (),
) -> Observed:
    """Run one more step, with nothing compiled: a fused kernel shows no instrument what it holds.

    Gradients and optimizer state must be there already, as they are from the second step on. alike: for how many each
    of the micro-batches stands. others: who watches, too.
    """
    ledger, counter = Ledger(training.model, training.strategy), FlopCounter()
    options = training.strategy.options
    kernel, options.kernel = options.kernel, CountedKernel(options.kernel, counter)
    seen = Instruments(log, ledger, counter, *others)
    around = hooked(hops=lambda *around: hops(seen, *around))

    def reach(part: str) -> None:
        for instrument in seen.instruments:
            instrument.reached(part)

    with torch.compiler.set_stance("force_eager"), seen, around:
        run_step(training, batches, reach, lambda: seen.counting(alike))
    options.kernel = kernel
    return Observed(list(ledger.entries.values()), counter.total, log.peaks(), log.after_forward, log.host_bytes())
