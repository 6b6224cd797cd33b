"""mode=simulate: one rank of any cluster, in seconds, on fake tensors: they have a shape and no memory.

Everything but the clock works on them: the ledger, the FLOP counter and the memory log are those of a real step, and so
is the code that they watch. A deep model need not run in full: two shallow ones tell what a layer adds, and a third
must come out as these two foretell, or the full depth is run after all.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, replace
from itertools import groupby
from math import isclose
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.instruments.memory import MemoryLog
from bench.instruments.observe import Instruments, Observed, all_hops, observe
from bench.instruments.step import Workload
from bench.simulation.fake import RememberingFakeMode
from bench.simulation.replay import Replay
from bench.workloads import data
from bench.workloads.build import build_attention, build_strategy, build_training, global_batch
from bench.workloads.training import Batch, Training
from conf.clock import Clock
from conf.documents import mask_of
from conf.keys import Config
from conf.measurement import Entry, Peak, Predicted
from strategies.ops.layouts import Tile, tiles_of
from strategies.ops.mesh import Axis
from strategies.ops.options import Options

DEPTHS = 4, 5, 6  # of the two that are extrapolated and the one that they must foretell
LATER = 12  # layers after which a step takes for one more what it took for the one before, if it does not at DEPTHS
STEADY = 1e-3  # of a layer's time
EDGE = 2  # blocks at either end of the model that may differ from those between, because FSDP2 prefetches
SHORT = 8  # tokens of a rank, with which it sees the same as with more, where it sees all that come before
BLOCK = re.compile(r"blocks\.(-?\d+)")
SIZES = "flops", "after_forward", "host_bytes"  # of all that was observed
NOTHING: dict[str, Any] = {"calls": 0, "payload_bytes": 0, "sent_bytes": 0.0}


def simulate(config: Config, progress: Callable[[str], None], known: bool = False) -> tuple[Observed, bool]:
    """One rank's step, in its steady state, and whether it was foretold. Raises what the model raises on fake tensors.

    known: the third depth came out as the other two foretell when nothing but the lengths was different, so it need not
    be run again.
    """
    n_layers = config.model.n_layers

    def of_depth(depth: int) -> Observed:
        progress(f"{depth} of {n_layers} layers")
        return step_of(config, depth)

    if config.workload == "step" and not config.full_depth and n_layers > DEPTHS[-1] and not padded(config):
        *base, third = DEPTHS
        short, longer = (of_depth(depth) for depth in base)
        seen = None if known and hides_gathers(short, longer) else of_depth(third)
        if seen is None or foretold(extrapolated(short, longer, third), seen):
            found = extrapolated(short, longer, n_layers)
            if seen is not None and not steady(short, longer, seen) and n_layers > LATER:
                few, more = of_depth(LATER - 1), of_depth(LATER)
                found = replace(found, predicted=in_time(few.predicted, more.predicted, LATER, n_layers))
            return found, True
    return of_depth(n_layers), False


def padded(config: Config) -> bool:
    """Below stage 2 ZeRO pads the whole model's weights to equal parts: every layer may add another remainder."""
    return config.zero_stage < 2 and config.model.dim % config.world_size != 0


def alike_once(
    seen: Instruments, axis: Axis, options: Options, like: Callable[[int], Any] | None = None
) -> Iterator[int]:
    """Hops around a ring: those that are alike run a few times only, one of them counted for the others.

    A hop is like the one before if it sees the same tile of the visiting block, or if `like` says the same of both. The
    first two and the last of those that are alike always run, because what is in flight beside them differs.
    """

    def sees(hop: int) -> list[Tile]:
        return tiles_of(axis.rank, (axis.rank - hop) % axis.size, axis.size, SHORT, options)

    if like is None and (not options.mask.plain or options.ring.layout == "balanced"):
        yield from range(axis.size)
        return
    for _, group in groupby(range(axis.size), like or sees):
        alike = list(group)
        yield from alike[:2]
        if between := alike[2:-1]:
            with seen.counting(len(between)):
                yield between[0]
        yield from alike[2:][-1:]


def step_of(config: Config, n_layers: int) -> Observed:
    """A step of the model cut to n_layers."""
    config = replace(config, model=replace(config.model, n_layers=n_layers))
    strategy = build_strategy(config)
    fake = RememberingFakeMode()
    workload: Workload
    batches: list[Any]
    if config.workload == "attention":
        with fake:
            workload, batches, alike = build_attention(config, strategy), [None], 1
    else:
        workload = training = build_training(config, strategy)  # on the meta device
        batches, alike = batches_of(config, training, fake)
        with fake:
            training.load(lambda name, shape: torch.empty(shape)).warm()
    with fake:
        log = MemoryLog("cpu", workload.state(), fake)
    hops = all_hops if config.full_depth else alike_once
    if config.cluster is None or config.cluster.clock is None:
        tell_places(workload.model, log.reach)
        return observe(workload, batches, log, hops, alike)
    clock = Clock.of(config.cluster.clock, config.cluster.name)
    replay = Replay(config, dist.get_rank() if dist.is_initialized() else 0, clock, strategy.options)

    def reach(place: str) -> None:
        log.reach(place)
        replay.streams.enter(place)

    tell_places(workload.model, reach)
    observed = observe(workload, batches, log, hops, alike, others=[replay])
    return replace(observed, predicted=replay.predicted(), spans=replay.drawn())


def batches_of(config: Config, training: Training, fake: RememberingFakeMode) -> tuple[list[Batch], int]:
    """This rank's micro-batches on fake tensors, and how many are like each: all, where all see the same."""
    if config.documents.name == "eos":
        whole, labels, mask = global_batch(data.load(config), data.last_step(config), config)
    else:
        whole = labels = torch.zeros((), dtype=torch.int64).expand(config.batch_size, config.seq_len)
        mask = mask_of(config)
    n = 1 if mask.alike else config.micro_batches
    size = config.micro_batch_size * n
    batches = []
    for placed in training.micro_batches(whole[:size], labels[:size], n, mask):
        parts: dict[str, Any] = {p: fake.from_tensor(getattr(placed, p)) for p in ("tokens", "labels", "positions")}
        batches.append(replace(placed, **parts))
    return batches, config.micro_batches // n


def tell_places(model: nn.Module, reach: Callable[[str], object]) -> None:
    """Say which module's forward or backward goes on."""
    for name, module in model.named_modules():
        if name in ("embed", "head") or (name.startswith("blocks.") and name.count(".") == 1):

            def enter(module: nn.Module, args: tuple, name: str = name) -> None:
                reach(f"forward {name}")

            def leave(module: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
                out.register_hook(lambda grad: reach(f"backward {name}"))

            module.register_forward_pre_hook(enter, prepend=True)
            module.register_forward_hook(leave)


def extrapolated(short: Observed, longer: Observed, n_layers: int) -> Observed:
    """What two steps, of DEPTHS[0] layers and of one more, say of n_layers: each layer more adds the same.

    Peaks are followed place by place, and the peak is the highest of them: where it is may depend on the depth.
    """

    def further(at_short: float, at_longer: float) -> float:
        return at_longer + (n_layers - DEPTHS[1]) * (at_longer - at_short)

    def grown(short: Peak | Entry, longer: Peak | Entry, names: Iterable[str]) -> Any:
        sizes: dict[str, Any] = {name: further(getattr(short, name), getattr(longer, name)) for name in names}
        return replace(longer, **sizes)

    before, after = edges(short.peaks, DEPTHS[0]), edges(longer.peaks, DEPTHS[1])
    peaks = {place: grown(before[place], after[place], vars(Peak())) for place in after}
    known = {subject(entry): entry for entry in short.comm}
    comm = []
    for entry in longer.comm:
        if (block := BLOCK.search(entry.source)) is None:
            comm.append(grown(known[subject(entry)], entry, NOTHING))
        else:  # weights of one block: the same for every block in between
            for i in stands_for(int(block[1]), n_layers):
                comm.append(replace(entry, source=BLOCK.sub(f"blocks.{i}", entry.source)))
    sizes: dict[str, Any] = {name: int(further(getattr(short, name), getattr(longer, name))) for name in SIZES}
    predicted = in_time(short.predicted, longer.predicted, DEPTHS[1], n_layers)
    return Observed(comm=comm, peaks=peaks, predicted=predicted, spans=longer.spans, **sizes)


Timed = Predicted | str | None


def in_time(short: Timed, longer: Timed, depth: int, n_layers: int) -> Timed:
    """What a step of `depth` layers and one of a layer less say of n_layers."""
    if not isinstance(short, Predicted) or not isinstance(longer, Predicted):
        return longer
    laps = zip(vars(short).values(), vars(longer).values(), strict=True)
    more = n_layers - depth
    return Predicted(
        *({name: ms + more * (ms - few.get(name, 0.0)) for name, ms in many.items()} for few, many in laps)
    )


def steady(short: Observed, longer: Observed, third: Observed) -> bool:
    """Does one layer more take what the one before it took? Where FSDP2's gathers are nearly as long as what they run
    beside, that is so after a few layers only.
    """
    times = [seen.predicted.step_ms for seen in (short, longer, third) if isinstance(seen.predicted, Predicted)]
    return len(times) < 3 or isclose(times[2] - times[1], times[1] - times[0], rel_tol=STEADY)


def hides_gathers(short: Observed, longer: Observed) -> bool:
    """Is there nothing of FSDP2's that a layer more waits for?"""
    if not any(entry.weights and entry.phase == "forward" for entry in longer.comm):
        return True
    one = in_time(short.predicted, longer.predicted, 0, 1)
    few = in_time(short.predicted, longer.predicted, 0, 0)
    if not isinstance(one, Predicted) or not isinstance(few, Predicted):
        return True
    waited = sum(one.exposed.get(kind, 0.0) - few.exposed.get(kind, 0.0) for kind in ("all_gather", "reduce_scatter"))
    return waited <= STEADY * (one.step_ms - few.step_ms)


def edges(peaks: dict[str, Peak], depth: int) -> dict[str, Peak]:
    """The peaks at the ends of the model and in the blocks near them, these counted from the end that they are near.

    What a block holds grows or falls evenly from one to the next, so none between holds more than all of these.
    """
    found = {place: peak for place, peak in peaks.items() if not BLOCK.search(place)}
    for phase in ("forward", "backward"):
        for i in range(-EDGE, EDGE):
            found[f"{phase} blocks.{i}"] = peaks[f"{phase} blocks.{i % depth}"]
    return found


def stands_for(i: int, n_layers: int) -> list[int]:
    """The blocks of a deeper model that are as block i of DEPTHS[1] layers, of which one is no block near an end."""
    if i == EDGE:
        return list(range(EDGE, n_layers - EDGE))
    return [i if i < EDGE else n_layers - (DEPTHS[1] - i)]


def subject(entry: Entry) -> tuple:
    """What a line of comm.csv is about: the line without its sizes."""
    return astuple(replace(entry, **NOTHING))


def foretold(guess: Observed, seen: Observed) -> bool:
    """Is what was extrapolated to DEPTHS[2] what a step of that depth shows?"""
    same_peaks = guess.peaks == edges(seen.peaks, DEPTHS[2])
    same_sizes = all(getattr(guess, name) == getattr(seen, name) for name in SIZES)
    return same_peaks and same_sizes and in_order(guess.comm) == in_order(seen.comm)


def in_order(comm: list[Entry]) -> list[tuple]:
    return sorted(astuple(entry) for entry in comm)
