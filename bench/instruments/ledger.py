"""The communication ledger: every collective that a step dispatches, with its bytes and the line that caused it.

It watches the dispatcher, so nothing that communicates can be missed: the strategies' verbs, FSDP2's own traffic,
forward, recomputation and backward. Bytes sent are those of the bandwidth-optimal algorithm over P ranks; S is the
payload: an all_gather's output, a reduce_scatter's input, the buffer otherwise.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.fx.traceback
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group as resolve_group
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

import strategies
from bench.instruments.instrument import Instrument, replaced
from conf.measurement import Entry
from strategies.base import Strategy
from strategies.ops.hooks import Meaning, hooked, hooks


@dataclass
class Kind:
    """A collective: its name here, the bytes that a rank sends of payload S among P ranks, and which argument is S."""

    name: str
    sent: Callable[[int, int], float]
    payload: int


def once(s: int, p: int) -> float:
    return s * (p - 1) / p


OUTPUT, INPUT = 0, 1  # the position of the tensors in the dispatched op's arguments
PARTS = 4  # and of an exchange: how much of it each rank is sent
KINDS = {
    "_allgather_base_": Kind("all_gather", once, OUTPUT),
    "allgather_": Kind("all_gather", once, OUTPUT),
    "_reduce_scatter_base_": Kind("reduce_scatter", once, INPUT),
    "reduce_scatter_": Kind("reduce_scatter", once, INPUT),
    "allreduce_": Kind("all_reduce", lambda s, p: 2 * once(s, p), OUTPUT),
    "alltoall_base_": Kind("all_to_all", once, INPUT),
    "alltoall_": Kind("all_to_all", once, INPUT),
    "send": Kind("p2p", lambda s, p: s, OUTPUT),
    "broadcast_": Kind("broadcast", once, OUTPUT),  # none of ours: DDP, when it first arranges its buckets
}
FUNCTIONAL = {  # the collectives of DTensor, whose arguments are an input and the group's name
    "all_gather_into_tensor": KINDS["_allgather_base_"],
    "reduce_scatter_tensor": KINDS["_reduce_scatter_base_"],
    "all_reduce": KINDS["allreduce_"],
    "all_reduce_": KINDS["allreduce_"],
    "all_to_all_single": KINDS["alltoall_base_"],
}
COMMUNICATING = ("c10d", "_c10d_functional")
# Of a receive the sender counts; the others carry nothing.
SILENT = {"recv_", "barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd"}


@dataclass
class Sending:
    """A collective as it was dispatched: bytes of its payload, and of these what a rank sends."""

    kind: str
    axis: str
    ranks: int
    dtype: torch.dtype
    payload: int
    sent: float


def dispatched(func: Any, args: tuple, out: Any) -> Sending | None:
    """What an operation of c10d, or DTensor's, sends; None if nothing."""
    op = func._schema.name.partition("::")[2]
    if op in SILENT:
        return None
    kinds = KINDS if func.namespace == "c10d" else FUNCTIONAL
    if op not in kinds:
        raise RuntimeError(f"nobody knows how many bytes {func._schema.name} sends")
    kind = kinds[op]
    if func.namespace == "c10d":
        group, holder = group_of(args), args[kind.payload]
    else:
        group = resolve_group(next(a for a in reversed(args) if isinstance(a, str)))  # type: ignore[arg-type]
        holder = out if kind.payload == OUTPUT else args[0]
    tensors = [t for t in tree_leaves(holder) if isinstance(t, Tensor)]
    payload = sum(t.numel() * t.element_size() for t in tensors)
    sent = kind.sent(payload, group.size())
    if op == "alltoall_base_" and (parts := args[PARTS]):  # uneven ones
        sent = payload * (1 - parts[group.rank()] / sum(parts)) if payload else 0.0
        if not sent:
            return None  # it only receives: the call is others'
    return Sending(kind.name, name_of(group), group.size(), tensors[0].dtype, payload, sent)


def work_of(returned: Any) -> Any:
    """The work among what a collective that was dispatched returns."""
    work = returned[-1] if isinstance(returned, tuple) else returned
    return dist.Work.unbox(work) if isinstance(work, torch.ScriptObject) else work


def group_of(args: tuple) -> dist.ProcessGroup:
    return next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and is_group(a))


def name_of(group: dist.ProcessGroup) -> str:
    """The axis of the mesh along which it is."""
    return "world" if group is dist.group.WORLD else group.group_desc


ROOT = Path(strategies.__file__).parents[1]
FSDP_FILE = inspect.getfile(FSDPParamGroup)
STRATEGY_FILE = re.compile(re.escape(f"{ROOT}/") + r"(strategies/(?!ops/)[\w/]+\.py)")


class Ledger(Instrument):
    """Counts what is sent in forward, recomputation, backward and by the optimizer."""

    def __init__(self, model: nn.Module, strategy: Strategy) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.strategy = type(strategy)
        self.phase = "forward"
        self.meaning = Meaning()
        self.entries: dict[tuple, Entry] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Anomaly mode, because it alone remembers in backward which forward line made a node: that line only."""
        with ExitStack() as here:
            here.enter_context(hooked(announce=self.announced))
            here.enter_context(replaced(torch.fx.traceback, "format_stack", strategy_line))
            here.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
            yield

    @contextmanager
    def announced(self, meaning: Meaning) -> Iterator[None]:
        """What is sent inside means this, and what was announced around it."""
        outer, said = self.meaning, {name: value for name, value in vars(meaning).items() if value}
        self.meaning = replace(outer, **said)
        try:
            yield
        finally:
            self.meaning = outer

    def reached(self, part: str) -> None:
        self.phase = part

    def saw(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if func.namespace in COMMUNICATING:
            self.count(func, args, out)

    def count(self, func: Any, args: tuple, out: Any) -> Entry | None:
        """The line of comm.csv that it was added to, if it sends anything."""
        if (sending := dispatched(func, args, out)) is None:
            return None
        source, from_zero = self.where()
        entry = Entry(
            phase="recompute" if recomputing() else self.phase,
            kind=self.meaning.kind or sending.kind,
            axis=sending.axis,
            group_size=sending.ranks,
            dtype=str(sending.dtype).removeprefix("torch."),
            source=source,
            weights=from_zero or self.meaning.weights or self.phase == "optimizer",
        )
        entry = self.entries.setdefault(astuple(entry), entry)
        entry.calls += self.times
        entry.payload_bytes += self.times * sending.payload
        entry.sent_bytes += self.times * sending.sent
        return entry

    def where(self) -> tuple[str, bool]:
        """The strategy line that this collective comes from; or the module whose weights ZeRO sends, and True."""
        if self.meaning.source or self.meaning.verb:
            return self.meaning.source or line_of_verb(*files_of(self.strategy), verb=self.meaning.verb or ""), True
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            # Only there: to ask a frame for its locals makes it hold them, and what they hold, as long as it runs.
            if frame.f_code.co_filename == FSDP_FILE and isinstance(
                group := frame.f_locals.get("self"), FSDPParamGroup
            ):
                return f"zero3 {self.names[id(group.modules[0])]}", True
            if match := STRATEGY_FILE.match(frame.f_code.co_filename):
                return f"{match[1]}:{frame.f_lineno}", False
            frame = frame.f_back
        node: Any = torch._C._current_autograd_node()  # in backward: the line whose forward made this node
        lines = node.metadata.get("traceback_") if node is not None else None
        return lines[0] if lines else "harness", False


def strategy_line() -> list[str]:
    """The innermost line of a strategy on the stack, if there is one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if match := STRATEGY_FILE.match(frame.f_code.co_filename):
            return [f"{match[1]}:{frame.f_lineno}"]
        frame = frame.f_back
    return []


@cache
def line_of_verb(*files: str, verb: str) -> str:
    """The first line of a strategy's files that calls this function."""
    for file in files:
        if match := STRATEGY_FILE.match(file):
            for number, line in enumerate(Path(file).read_text().splitlines(), 1):
                if f" {verb}(" in line:
                    return f"{match[1]}:{number}"
    return "harness"


def files_of(strategy: type[Strategy]) -> list[str]:
    """The strategy's, and those that it inherits from."""
    return [inspect.getfile(cls) for cls in strategy.__mro__ if cls is not object]


def is_group(argument: torch.ScriptObject) -> bool:
    return "ProcessGroup" in argument._type().name()  # type: ignore[attr-defined]


def recomputing() -> bool:
    """Is forward's work done again, inside backward: by a strategy, or by something checkpointed?"""
    if hooks.again:
        return True
    if torch._C._current_graph_task_id() == -1:
        return False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "unpack_hook" and frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False
