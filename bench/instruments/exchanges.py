"""exchanges=true: who sends what to whom, seen while it happens.

A ledger that follows labels (labels.py), and with each collective that it counts sends these as well, by the same
operation. So what a rank has afterwards says of every number where it belongs and who made it, whatever the strategy.
A sum has the labels of all its parts: gloo's reduce-scatter is an exchange of them, and for an all-reduce they are
gathered.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.instruments.labels import LSE, NONE, OUT, Labels, packed
from bench.instruments.ledger import COMMUNICATING, SILENT, Ledger, group_of, work_of
from bench.instruments.memory import MemoryLog
from bench.instruments.observe import Instruments
from conf.measurement import Entry
from strategies.ops.weights import in_whole, local, owned

Planes = dict[int, tuple[str, int, int]]  # their names, and how far x and y go
FINISHED = SILENT - {"recv_"}
SUMS = {"allreduce_"}


@dataclass
class Exchange:
    """A collective on one rank: the ledger's line, None where the rank only receives, and the labels that are known."""

    entry: Entry | None
    before: np.ndarray  # of what it gave
    after: np.ndarray  # of what it has been given
    itemsize: int
    in_block: bool  # the model's first

    @property
    def arrived(self) -> int:
        """Bytes that the rank did not have before."""
        return int((~np.isin(self.after, self.before)).sum()) * self.itemsize


class Exchanges(Ledger):
    """Sees the forward of a Training (bench/workloads) on a batch of it, of sequences of seq_len tokens."""

    def __init__(self, training: Any, batch: Any, seq_len: int) -> None:
        super().__init__(training.model, training.strategy)
        self.labels = Labels(dist.get_rank())
        self.seen: list[Exchange] = []
        self.in_block = False
        self.leaving: Any = None  # labels on their way to the next rank
        n, dp = len(batch.tokens), training.mesh.dp
        tokens, config = dp.size * n * seq_len, training.model.config
        self.planes: Planes = {
            OUT: ("out", tokens, config.n_heads * config.dim_of_head),
            LSE: ("lse", tokens, config.n_heads),
        }
        for number, (name, parameter, share) in enumerate(owned(training.model)):
            self.add_parameter(number, name, tokens, training.shapes[name], parameter, share)
        starts = (dp.rank * n + torch.arange(n)) * seq_len
        places = training.strategy.split(torch.arange(seq_len)[None]) + starts[:, None]
        self.labels.of(batch.tokens).copy_(packed(0, places, 0, self.labels.rank))

    def add_parameter(
        self, number: int, name: str, tokens: int, shape: torch.Size, parameter: Tensor, share: Any
    ) -> None:
        """Its plane, and that of its product with activations; and the labels of this rank's share."""
        rows, columns = shape if len(shape) > 1 else (*shape, 1)
        self.planes[2 * number] = name, tokens, columns if name.startswith("embed") else rows
        self.planes[2 * number + 1] = name, rows, columns
        whole = packed(2 * number + 1, torch.arange(rows)[:, None], torch.arange(columns), self.labels.rank)
        self.labels.of(local(parameter)).copy_(in_whole(whole.view(shape), parameter, share))

    def saw(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        name = func._schema.name.partition("::")[2]
        if func.namespace not in COMMUNICATING:
            self.labels.follow(func, args, kwargs, out)
        elif name == "recv_":
            self.receive(func, args)
        elif name not in FINISHED:
            self.exchange(func, name, args, self.count(func, args, out))

    def exchange(self, func: Any, name: str, args: tuple, entry: Entry | None) -> None:
        """Send the labels, too."""
        filled, given = tensors(args[0]), tensors(args[1]) or tensors(args[0])
        before = self.known(given)
        if name in SUMS:
            after = self.of_all(filled, group_of(args))
        else:
            work = func(*self.labels.beside_all(args))
            if name == "send":  # others wait for it, once they receive
                self.leaving, after = work, before[:0]
            else:
                work_of(work).wait()
                after = self.known(filled)
        self.seen.append(Exchange(entry, before, after, given[0].element_size(), self.in_block))

    def receive(self, func: Any, args: tuple) -> None:
        """What comes in return for what was sent last."""
        work_of(func(*self.labels.beside_all(args))).wait()
        work_of(self.leaving).wait()
        self.seen[-1].after = self.known(tensors(args[0]))

    def known(self, given: list[Tensor]) -> np.ndarray:
        labels = torch.cat([self.labels.of(t).flatten() for t in given]).numpy()
        return labels[labels != NONE]

    def of_all(self, summed: list[Tensor], group: dist.ProcessGroup) -> np.ndarray:
        """The labels that the ranks of a group have for what is summed over them."""
        mine = torch.cat([self.labels.of(t).flatten() for t in summed])
        parts = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(parts, mine, group=group)
        labels = torch.cat(parts).numpy()
        return labels[labels != NONE]


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def watched(training: Any, batch: Any, seq_len: int) -> Exchanges:
    """What is sent in one forward; no backward follows."""
    seen, model = Exchanges(training, batch, seq_len), training.model

    def within(block: bool) -> None:
        seen.in_block = block

    after_block = (*model.blocks[1:], model.head)[0]
    model.embed.register_forward_hook(lambda *_: within(True))  # before ZeRO gathers the block's weights
    after_block.register_forward_pre_hook(lambda *_: within(False), prepend=True)
    with torch.compiler.set_stance("force_eager"), Instruments(MemoryLog("cpu", training.state()), seen):
        training.forward(batch)
    return seen
