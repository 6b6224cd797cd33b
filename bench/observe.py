"""One step with every instrument on: what it sends, computes and holds. Instruments cost time, so it is never timed."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.attention import AttentionAlone
from bench.comm import Ledger
from bench.flops import CountedKernel, FlopCounter
from bench.memory import MemoryLog, Peak
from bench.training import Batch, Training


@dataclass
class Observed:
    """One rank's step: the lines of comm.csv, FLOPs, and bytes held: at most, by place, and when forward ended."""

    comm: list[dict]
    flops: int
    peaks: dict[str, Peak]
    after_forward: int

    @property
    def peak(self) -> Peak:
        return max(self.peaks.values(), key=lambda peak: peak.total)


class Instruments(TorchDispatchMode):
    """Shows every operation that runs inside `with Instruments(...):`, once it has run, to all of them."""

    def __init__(self, log: MemoryLog, *others) -> None:
        super().__init__()
        self.lent, self.instruments, self.fake = log.lent, (log, *others), log.fake_mode
        self.contexts = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or every operation is wrapped once more

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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

    def __enter__(self):
        for instrument in self.instruments:
            self.contexts.enter_context(instrument.watching())
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        super().__exit__(*exc)
        self.contexts.close()


def observe(training: Training | AttentionAlone, batch: Batch | None, log: MemoryLog) -> Observed:
    """Run one more step, with nothing compiled: a fused kernel shows no instrument what it holds.

    Gradients and optimizer state must be there already, as they are from the second step on.
    """
    ledger, counter = Ledger(training.model), FlopCounter()
    options = training.strategy.options
    kernel, options.kernel = options.kernel, CountedKernel(options.kernel, counter)
    with torch.compiler.set_stance("force_eager"), Instruments(log, ledger, counter):
        loss = training.forward(batch)
        log.end_forward()
        ledger.phase = "backward"
        training.backward(loss)
        ledger.phase = "optimizer"
        log.reach("update")
        training.update()
    options.kernel = kernel
    return Observed([asdict(e) for e in ledger.entries.values()], counter.total, log.peaks(), log.after_forward)
