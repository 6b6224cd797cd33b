"""How long a simulated step takes on a cluster's clock: its schedule is replayed while it is observed.

Every operation that is dispatched takes its time (prices.py) on the stream on which the code puts it, and every
collective beside it (streams.py). Prefetch and overlap are so those of the code that runs. On CUDA FSDP2's streams are
streams, and the host that launches runs ahead of them. On a CPU everything is one stream: ranks compute with all cores,
and what moves their bytes has none of its own.

What a GPU does in one kernel counts as one: attention, norms, rotary embedding, SwiGLU, ring's merge. What is
dispatched inside these takes no time, and no view does.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp2

from bench.instruments.instrument import Instrument, replaced
from bench.instruments.ledger import COMMUNICATING, dispatched, group_of, name_of
from bench.simulation.emulated import number_of
from bench.simulation.prices import Prices
from bench.simulation.streams import MAIN, Streams
from conf import tiers
from conf.clock import Clock, Group, computed
from conf.keys import Config
from conf.measurement import Predicted, Span
from conf.series import moved
from conf.words import Invalid
from models import llama, offload
from strategies.ops import grid_attention, ring_attention
from strategies.ops.kernels import Grads, Kernel
from strategies.ops.layouts import pairs
from strategies.ops.options import Options

OFFLOAD = "offload"  # the one stream that models/offload.py has for both ways


class Replay(Instrument):
    """One rank's step. predicted() tells how long it took, or why nobody can tell."""

    def __init__(self, config: Config, rank: int, clock: Clock, options: Options) -> None:
        self.config, self.rank, self.clock, self.options = config, rank, clock, options
        self.on_gpu = config.device == "cuda"
        self.streams = Streams(clock.call_us, ahead=self.on_gpu, drawn=config.profile)
        self.prices = Prices(clock)
        self.names = {torch.cpu.current_stream(): MAIN}
        self.groups: dict[tuple, Group] = {}
        self.inside = 0  # of a kernel that is priced as one
        self.unknown = ""

    def predicted(self) -> Predicted | str:
        """Of the whole step; or a sentence, where the clock lacks a figure that it needs."""
        self.reached("")
        found = self.streams.laps, self.streams.work, self.streams.exposed
        ms = ({name: us / 1000 for name, us in each.items() if us} for each in found)
        return self.unknown or Predicted(*ms)

    def drawn(self) -> list[Span]:
        """Of profile=true: what ran when, and which part of the model that was."""
        return self.streams.spans

    # What the step shows.

    def reached(self, part: str) -> None:
        self.streams.reach(part)

    def counting(self, times: int) -> AbstractContextManager:
        return self.streams.repeated(times)

    def saw(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if func.namespace in COMMUNICATING:
            self.communicates(func, args, out)
        elif func.namespace == "offload" and self.on_gpu:
            us = self.known(lambda: self.clock.host_us(args[0].numel() * args[0].element_size(), self.cluster))
            self.streams.launch(self.now, OFFLOAD, OFFLOAD, "offload", us)
        elif not self.inside:
            part, us = self.prices.of(func, args, kwargs, out)
            if us:
                self.streams.take(self.now, part, us)

    def communicates(self, func: Any, args: tuple, out: Any) -> None:
        """From here on its axis is busy, until it is done."""
        number = number_of(out)
        if func._opname == "recv_" and number is not None:  # it comes while as much leaves for the other side
            self.streams.mark(number, name_of(group_of(args)))
        if (sending := dispatched(func, args, out)) is None:
            return
        key = sending.axis, sending.ranks, sending.kind
        if key not in self.groups:
            self.groups[key] = tiers.group_of(self.config, self.rank, *key)
        kind = tiers.on_links(self.config, sending.kind)
        us = self.known(lambda: self.clock.collective_us(kind, self.groups[key], sending.sent, self.cluster))
        number = number if self.on_gpu and number is not None and in_background(func, args) else 0
        self.streams.launch(self.now, sending.axis, number, sending.kind, us)
        if not number:
            self.streams.wait(self.now, number)

    def known(self, price: Callable[[], float]) -> float:
        """Nothing where the clock does not know it, which is remembered."""
        try:
            return price()
        except Invalid as fault:
            self.unknown = self.unknown or str(fault)
            return 0.0

    @property
    def cluster(self) -> str:
        return self.config.cluster.name if self.config.cluster else ""

    @property
    def now(self) -> str:
        """The stream on which the code is."""
        return self.named(torch.cpu.current_stream()) if self.on_gpu else MAIN

    def named(self, stream: Any) -> str:
        return self.names.setdefault(stream, f"FSDP2 {len(self.names)}")

    @contextmanager
    def one(self, part: str, us: float) -> Iterator[None]:
        """All that happens inside is one kernel, which takes so long."""
        if not self.inside:
            self.streams.take(self.now, part, us)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def moves(self, kind: str, out: Tensor) -> float:
        """How long a kernel takes that conf/series.py knows."""
        return self.clock.kernel_us(kind.split()[0], moved(kind, out.numel(), out.element_size()))

    # Where it listens.

    @contextmanager
    def watching(self) -> Iterator[None]:
        """To kernels that count as one, to whoever waits, and on a GPU to FSDP2's streams and to copies aside."""
        norm, gated, rotary = llama.Normalized, llama.Gated, llama.Rotary
        here = [
            replaced(self.options, "kernel", PricedKernel(self.options.kernel, self)),
            *(
                replaced(file, "merge", self.as_one("merge", file.merge, 2))
                for file in (ring_attention, grid_attention)
            ),
            replaced(llama.RMSNorm, "forward", self.as_one("norm", llama.RMSNorm.forward, 1)),
            replaced(llama.SwiGLU, "forward", self.as_one("swiglu", llama.SwiGLU.forward, 1)),
            replaced(norm, "backward", staticmethod(self.as_one("norm backward", norm.backward, 1))),
            replaced(gated, "backward", staticmethod(self.as_one("swiglu backward", gated.backward, 1))),
            replaced(rotary, "forward", self.both_ways("rotary", rotary.forward)),
            replaced(dist.Work, "wait", self.seen_to_wait(dist.Work.wait)),
            *(
                replaced(fsdp2, name, self.by_the_host(getattr(fsdp2, name)))
                for name in ("foreach_all_gather", "foreach_reduce")
            ),
        ]
        if self.on_gpu:
            here += [replaced(*each) for each in self.of_streams()]
        with ExitStack() as stack:
            for each in here:
                stack.enter_context(each)
            yield

    def as_one(self, kind: str, function: Callable, nth: int) -> Callable:
        """A function that is one kernel: its nth argument is as large as what it writes."""

        def priced(*args: Any) -> Any:
            with self.one("kernels", self.moves(kind, args[nth])):
                return function(*args)

        return priced

    def by_the_host(self, function: Callable) -> Callable:
        """FSDP2's Python around a message of weights or of their gradients."""

        def priced(*args: Any, **kwargs: Any) -> Any:
            self.streams.hosts(self.now, self.clock.group_us)
            return function(*args, **kwargs)

        return priced

    def both_ways(self, kind: str, forward: Callable) -> Callable:
        """A module's forward that is one kernel, and one in backward: between its output's gradient and its input's."""

        def priced(module: nn.Module, x: Tensor, *args: Any) -> Tensor:
            with self.one("kernels", self.moves(kind, x)):
                out = forward(module, x, *args)
            if out.requires_grad:
                out.register_hook(enter)
                x.register_hook(leave)
            return out

        def enter(grad: Tensor) -> None:
            self.streams.take(self.now, "kernels", self.moves(f"{kind} backward", grad))
            self.inside += 1

        def leave(grad: Tensor) -> None:
            self.inside -= 1

        return priced

    def seen_to_wait(self, wait: Callable) -> Callable:
        def waits(work: dist.Work, *args: Any) -> Any:
            self.streams.wait(self.now, number_of(work))
            return wait(work, *args)

        return waits

    def of_streams(self) -> list[tuple[Any, str, Callable]]:
        """torch.cpu's stand-ins for streams and events, which do nothing, are told the time."""
        stream, event = torch.cpu.Stream, torch.cpu.Event

        def record(event: Any, stream: Any = None) -> None:
            self.streams.mark(event, self.named(stream or torch.cpu.current_stream()))

        def record_event(stream: Any) -> Any:
            record(recorded := event(), stream)
            return recorded

        def wait_event(stream: Any, event: Any) -> None:
            self.streams.wait(self.named(stream), event)

        return [
            (event, "record", record),
            (stream, "record_event", record_event),
            (stream, "wait_event", wait_event),
            (stream, "wait_stream", lambda stream, other: wait_event(stream, record_event(other))),
            (offload, "arrived", lambda device: self.streams.wait(self.now, OFFLOAD)),
        ]


class PricedKernel:
    """Attention by the pairs that are computed: of a causal block, whole tiles along the diagonal."""

    def __init__(self, kernel: Kernel, replay: Replay) -> None:
        self.kernel, self.replay, self.name = kernel, replay, kernel.name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *mask: bool) -> tuple[Tensor, Tensor]:
        with self.priced("forward", q, k, *mask):
            return self.kernel.forward(q, k, v, *mask)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *mask: bool) -> Grads:
        with self.priced("backward", q, k, *mask):
            return self.kernel.backward(grad, q, k, v, out, lse, *mask)

    def priced(self, way: str, q: Tensor, k: Tensor, causal: bool, windowed: bool = False) -> Any:
        """Of each edge of the mask whole tiles, half of which lie beyond it."""
        batch, queries, heads, head_dim = q.shape
        clock = self.replay.clock
        beyond = computed(queries, clock.tile) - computed(queries, 1)
        through = pairs(queries, k.shape[1], causal, windowed) + (causal + windowed) * beyond
        return self.replay.one("attention", clock.attention_us(way, batch * heads * through, head_dim))


def in_background(func: Any, args: tuple) -> bool:
    """Does whoever launches it go on meanwhile?"""
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("async_op") if "async_op" in names else len(args)
    return args[place] if place < len(args) else True
