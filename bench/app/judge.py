"""Why a measurement cannot be right, where it cannot: such a row must not look like a result.

Every rank's numbers count. What ranks hold alike is compared, what they hold parts of is added up, and what a
strategy's account foretells of a rank is held against what that rank has counted.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import product
from math import exp, isclose, isfinite, log, log1p, sqrt
from pathlib import Path

from analysis.accounts import differences
from conf.clusters import of_device
from conf.keys import INITIAL_STD, OF_A_MACHINE, Config, ModelConfig
from conf.measurement import Measured, Rank, worst
from conf.meshes import place
from conf.series import lines
from conf.words import WRONG

CLOSE = {"fp32": 1e-4, "bf16": 0.03, "bf16_mixed": 0.03}  # of two ways to compute the same
SAME = 1e-4  # of two sums of the same numbers, which are fp32 in every precision
SIGMAS = 6  # how far a random number goes from its mean: further once in 10^9 times


def broken(config: Config, silent: bool, ranks: Sequence[Rank]) -> str | None:
    """What is no measurement at all, before anything is computed from it. silent: what others sent was made up."""
    if config.mode == "real" and sorted(rank.rank for rank in ranks) != list(range(config.world_size)):
        return f"{len(ranks)} ranks have measured, and they are not those of world_size={config.world_size}"
    if config.workload in OF_A_MACHINE:
        return broken_series(ranks)
    timed = config.steps if config.mode != "simulate" else 0
    has_loss = config.mode == "real" and config.workload == "step" and not silent
    trained = config.warmup + config.steps if has_loss else 0
    for rank in ranks:
        series = rank.losses, rank.loss_shares, rank.token_shares
        if len(rank.steps) != timed or any(len(each) != trained for each in series):
            return f"rank {rank.rank} has timed {len(rank.steps)} of {timed} steps and has losses of {len(rank.losses)}"
        if not all(isfinite(entry.sent_bytes) and entry.sent_bytes >= 0 for entry in rank.comm):
            return f"rank {rank.rank} has sent bytes that are no number"
        if any(rank.token_shares[:1]) and not (isfinite(rank.labels) and rank.labels > 0):
            return f"rank {rank.rank} has {rank.labels} labels"
        for step in rank.steps:
            if not (step.step > 0 and all(isfinite(ms) and ms >= 0 for ms in vars(step).values())):
                return f"the clock of rank {rank.rank} stood, or went back: {step}"
        total, parts = rank.peak.total, sum(vars(rank.peak).values()) - rank.peak.total
        if not total == parts > 0:
            return f"rank {rank.rank} held {total:,} bytes at most, and its parts of that add up to {parts:,}"
    return None


def broken_series(ranks: Sequence[Rank]) -> str | None:
    """Of what measures a machine: ranks time the same, and time passes meanwhile."""
    for rank in ranks:
        if [each.work for each in rank.series] != [each.work for each in ranks[0].series] or not rank.series:
            return f"rank {rank.rank} has timed {len(rank.series)} things, and rank {ranks[0].rank} others"
        for timed in rank.series:
            if not timed.us or not all(isfinite(us) and us > 0 for us in timed.us):
                return f"the clock of rank {rank.rank} stood, or went back: {timed}"
    return None


def faults(found: Measured) -> Iterator[str]:
    """What cannot be right, a sentence each, what tells most first."""
    if found.config.workload in OF_A_MACHINE:
        yield from of_speed(found)
        return
    for each in found.rounds:
        yield from of_losses(found.config, each.ranks)
    if found.derived_bytes is not None:
        yield from of_counts(found)
    elif found.config.world_size > 1 and found.sent() == 0:
        yield f"{found.config.world_size} ranks ran and sent nothing"
    if found.timed:
        yield from of_speed(found)


# Losses.


def of_losses(config: Config, ranks: Sequence[Rank]) -> Iterator[str]:
    """Of ranks that trained together: what each made of its tokens, and what they have as the loss of all."""
    trained = [rank for rank in ranks if rank.losses]
    steps = range(len(trained[0].losses)) if trained else ()
    for step, rank in product(steps, trained):
        if not isfinite(rank.loss_shares[step]):
            yield f"the loss of rank {rank.rank} is not finite at step {step + 1}"
    places = {rank.rank: place(config, rank.rank) for rank in trained}
    firsts = {places[rank.rank]["zero"]: rank for rank in trained if places[rank.rank]["tp"] == 0}
    for step in steps:
        for rank in trained:
            first = firsts[places[rank.rank]["zero"]]  # which has the same tokens
            ours, theirs = ((r.loss_shares[step], r.token_shares[step]) for r in (rank, first))
            if not all(map(same, ours, theirs)):
                yield (
                    f"rank {rank.rank} and rank {first.rank} have the same tokens, and at step {step + 1} they make "
                    f"{ours[0]:.6g} and {theirs[0]:.6g} of the loss"
                )
        loss = sum(rank.loss_shares[step] for rank in firsts.values())
        tokens = sum(rank.token_shares[step] for rank in firsts.values())
        if tokens and not same(tokens, 1):
            yield f"at step {step + 1} the ranks have {tokens:.6g} of the tokens that count"
        for rank in trained:
            if not same(rank.losses[step], loss):
                yield (
                    f"rank {rank.rank} has {rank.losses[step]:.6g} as the loss of step {step + 1}, and the ranks' "
                    f"parts of it add up to {loss:.6g}"
                )
    if config.model.name != "hf":  # whose weights are no random ones
        yield from of_first_losses(config.model, trained)


def same(one: float, other: float) -> bool:
    return isclose(one, other, rel_tol=SAME)


def of_first_losses(model: ModelConfig, ranks: Sequence[Rank]) -> Iterator[str]:
    for rank in ranks:
        if rank.token_shares[0] == 0:
            continue
        mean = rank.loss_shares[0] / rank.token_shares[0]
        low, high = first_loss(model, rank.labels)
        if not low <= mean <= high:
            yield (
                f"rank {rank.rank} begins with a mean loss of {mean:.6g}, and random weights make {max(0, low):.3g} to "
                f"{high:.3g} of model.vocab_size={model.vocab_size}"
            )


def first_loss(model: ModelConfig, labels: float) -> tuple[float, float]:
    """Between which values the mean loss of a model with random weights lies.

    A token's logits are products of its last norm's output x, |x|^2 <= dim, with the head's rows, N(0, 0.02): each is
    N(0, s^2), s = 0.02 sqrt(dim). The loss is log sum exp(logits) - the label's logit. The mean of the first is between
    log V and log V + s^2 / 2 (Jensen), that of the second is 0. As a function of the head, the mean over tokens is
    Lipschitz, and so as far from its own mean as a normal variable of deviation s |p - y| may be: p are the tokens'
    softmaxes, with squares that sum to exp(s^2) / V (at most 1), y the frequencies of the labels, with squares that
    sum to 1 / labels. Tied embeddings add a logit that knows the token: s sqrt(dim) times the cosine of x and the
    token's embedding, in a residual stream to which every MLP adds ffn_dim s^4 / 4 times as much.
    """
    s = INITIAL_STD * sqrt(model.dim)
    even = log(model.vocab_size)
    slack = SIGMAS * s * (sqrt(min(1, exp(s**2) / model.vocab_size)) + 1 / sqrt(labels))
    low, high = even - slack, even + s**2 / 2 + slack
    if model.tie_embeddings:
        own = 1.5 * s * sqrt(model.dim / (1 + model.n_layers * model.ffn_dim * s**4 / 4))
        low, high = low - own, high + max(0, own - even) + log1p(exp(-abs(own - even)))
    return low, high


# Counts.


def of_counts(found: Measured) -> Iterator[str]:
    """What each rank sent and computed, against its strategy's account."""
    for rank in found.ranks:
        for each in differences(found.config, rank.rank, map(vars, rank.comm), rank.flops, found.mask):
            yield f"rank {rank.rank}: {each}"


# Attention.


def inaccurate(errors: Sequence[dict[str, float]], precision: str) -> str | None:
    """What of attention alone is not what one process computes, beyond its precision: of each rank."""
    far = [(worst(error), rank, name) for rank, of in enumerate(errors) for name, error in of.items()]
    wrong = [each for each in far if not each[0] < CLOSE[precision]]
    if not wrong:
        return None
    names = [name for name in errors[0] if any(name == of for *_, of in wrong)]
    most, rank, _ = max(wrong)
    verb = "is" if len(names) == 1 else "are"
    return f"{WRONG}{', '.join(names)} {verb} up to {most:.2%} away from one process', farthest on rank {rank}"


# Speed.


def of_speed(found: Measured) -> Iterator[str]:
    if (limit := most_tflops(found.config, found.first.device_name)) is None:
        return
    for what, tflops in speeds(found):
        if tflops > limit:
            yield f"{what}{tflops:,.3g} TFLOP/s is more than the device can do, which is {limit:,.3g} at most"


def speeds(found: Measured) -> Iterator[tuple[str, float]]:
    """TFLOP/s of a step, or of each thing that was timed of a machine, after what they are of."""
    if found.config.workload not in OF_A_MACHINE:
        yield "", found.tflops
    for line in lines(found.ranks):
        yield f"{line.work.kind} ({line.work.shape}): ", line.giga(line.work.flops) / 1000


def most_tflops(config: Config, device_name: str | None) -> float | None:
    """What a rank cannot exceed; None for an unknown GPU. A GPU's fp32 is slower than its 16 bits."""
    if config.device == "cuda":
        return peak_tflops_of(device_name or "", "bf16")
    return most_tflops_of_cpu(config.precision)


GHZ = 7  # no core's clock is faster
FLOP_A_CYCLE = {  # of a core, by what /proc/cpuinfo says that it has: two units for products and sums, lanes, 2 FLOP
    "amx_bf16": {"fp32": 64, "bf16": 2048},
    "avx512f": {"fp32": 64, "bf16": 256},
    "avx2": {"fp32": 32, "bf16": 128},
    "": {"fp32": 128, "bf16": 2048},  # another architecture
}


def most_tflops_of_cpu(precision: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> float:
    """Of all cores together. Generous: it is what is wrong by orders of magnitude that it finds."""
    has = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    flop = next(flop for flag, flop in FLOP_A_CYCLE.items() if flag in has or not flag)
    return (os.cpu_count() or 1) * GHZ * flop["fp32" if precision == "fp32" else "bf16"] / 1000


def peak_tflops_of(device_name: str, precision: str) -> float | None:
    """The dense 16-bit peak of a known GPU, from conf/cluster/; None for other devices and for fp32."""
    if precision == "fp32":
        return None
    known = of_device(device_name)
    return float(known["bf16_dense_tflops"]) if known else None
