"""mode=simulate: one rank of any cluster, in seconds, on fake tensors: they have a shape and no memory.

Everything but the clock works on them: the ledger, the FLOP counter and the memory log are those of a real step, and so
is the code that they watch. A deep model need not run in full: two shallow ones tell what a layer adds, and a third
must come out as these two foretell, or the full depth is run after all.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import groupby
from unittest.mock import patch

import torch
from torch import nn

from bench.build import build_attention, build_strategy, build_training
from bench.fake import RememberingFakeMode
from bench.memory import MemoryLog, Peak
from bench.observe import Observed, observe
from strategies.ops.collectives import labelled
from strategies.ops.layouts import visible
from strategies.ops.ring_attention import TRAVELS, Rotate

DEPTHS = 4, 5, 6  # of the two that are extrapolated and the one that they must foretell
EDGE = 2  # blocks at either end of the model that may differ from those between, because FSDP2 prefetches
BLOCK = re.compile(r"blocks\.(-?\d+)")
SIZES = ("calls", "payload_bytes", "sent_bytes")


def simulate(config: dict, progress: Callable[[str], None]) -> tuple[Observed, bool]:
    """One rank's step, in its steady state, and whether it was foretold. Raises what the model raises on fake tensors.

    A sweep adds "foretold" where the third depth came out as the other two foretell when nothing but the lengths was
    different: then it need not be run again.
    """
    n_layers = config["model"]["n_layers"]

    def of_depth(depth: int) -> Observed:
        progress(f"{depth} of {n_layers} layers")
        return step_of(config, depth)

    if config["workload"] == "step" and not config["full_depth"] and n_layers > DEPTHS[-1]:
        *base, third = DEPTHS
        steps = [of_depth(depth) for depth in base]
        if config.get("foretold") or foretold(extrapolated(*steps, third), of_depth(third)):
            return extrapolated(*steps, n_layers), True
    return of_depth(n_layers), False


class AlikeOnce(Rotate):
    """A ring whose hops that are alike run a few times only, one of them counted for the others.

    A hop is like the one before if it sees the same tile of the visiting block. The first two and the last of those
    that are alike always run, because what is in flight beside them differs.
    """

    def hops(self) -> Iterator[int]:
        size, rank = self.axis.size, self.axis.rank
        for _, group in groupby(range(size), lambda hop: visible(self.layout, rank, (rank - hop) % size, 4)):
            alike = list(group)
            yield from alike[:2]
            if between := alike[2:-1]:
                with labelled(times=len(between)):
                    yield between[0]
            yield from alike[2:][-1:]


def step_of(config: dict, n_layers: int) -> Observed:
    """A step of the model cut to n_layers."""
    config = {**config, "model": {**config["model"], "n_layers": n_layers}}
    strategy = build_strategy(config)
    fake = RememberingFakeMode()
    if config["workload"] == "attention":
        with fake:
            training, batch = build_attention(config, strategy), None
    else:
        training = build_training(config, strategy)  # on the meta device
        tokens = torch.zeros((), dtype=torch.int64).expand(config["batch_size"], config["seq_len"])
        batch = training.place(tokens, tokens)
        parts = {name: fake.from_tensor(getattr(batch, name)) for name in ("tokens", "labels", "positions")}
        batch = replace(batch, **parts)
        with fake:
            training.load(lambda name, shape: torch.empty(shape)).warm()
    with fake:
        log = MemoryLog("cpu", training.state(), fake)
    tell_places(training.model, log)
    with patch.dict(TRAVELS, rotate=Rotate if config["full_depth"] else AlikeOnce):
        return observe(training, batch, log)


def tell_places(model: nn.Module, log: MemoryLog) -> None:
    """Have the log know which module's forward or backward goes on."""
    for name, module in model.named_modules():
        if name in ("embed", "head") or (name.startswith("blocks.") and name.count(".") == 1):

            def enter(module, args, name=name) -> None:
                log.reach(f"forward {name}")

            def leave(module, args, out, name=name) -> None:
                out.register_hook(lambda grad: log.reach(f"backward {name}"))

            module.register_forward_pre_hook(enter, prepend=True)
            module.register_forward_hook(leave)


def extrapolated(short: Observed, longer: Observed, n_layers: int) -> Observed:
    """What two steps, of DEPTHS[0] layers and of one more, say of n_layers: each layer more adds the same.

    Peaks are followed place by place, and the peak is the highest of them: where it is may depend on the depth.
    """

    def line(at_short: float, at_longer: float) -> float:
        return at_longer + (n_layers - DEPTHS[1]) * (at_longer - at_short)

    def lines(before: dict, after: dict) -> dict:
        return {key: line(before[key], after[key]) for key in after}

    before, after = edges(short.peaks, DEPTHS[0]), edges(longer.peaks, DEPTHS[1])
    peaks = {place: Peak(**lines(asdict(before[place]), asdict(after[place]))) for place in after}
    known = {line_of(entry): sizes(entry) for entry in short.comm}
    comm = []
    for entry in longer.comm:
        if (block := BLOCK.search(entry["source"])) is None:
            comm.append({**entry, **lines(known[line_of(entry)], sizes(entry))})
        else:  # weights of one block: the same for every block in between
            for i in stands_for(int(block[1]), n_layers):
                comm.append({**entry, "source": BLOCK.sub(f"blocks.{i}", entry["source"])})
    flops, after_forward = line(short.flops, longer.flops), line(short.after_forward, longer.after_forward)
    return Observed(comm, flops, peaks, after_forward)


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


def line_of(entry: dict) -> tuple:
    """What a line of comm.csv is about."""
    return tuple(value for key, value in entry.items() if key not in SIZES)


def sizes(entry: dict) -> dict:
    return {key: entry[key] for key in SIZES}


def foretold(guess: Observed, seen: Observed) -> bool:
    """Is what was extrapolated to DEPTHS[2] what a step of that depth shows?"""
    same_peaks = guess.peaks == edges(seen.peaks, DEPTHS[2])
    same_sizes = (guess.flops, guess.after_forward) == (seen.flops, seen.after_forward)
    return same_peaks and same_sizes and in_order(guess.comm) == in_order(seen.comm)


def in_order(comm: list[dict]) -> list[tuple]:
    return sorted((line_of(entry), *sizes(entry).values()) for entry in comm)
