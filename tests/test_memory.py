"""Saved activations and state are 1/N where the card says so, and the log agrees with the allocator."""

import gc
import time
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.accounts import account_of
from analysis.accounts.letters import Letters
from bench.instruments.observe import Observed
from bench.instruments.step import run_step
from bench.simulation.simulate import simulate
from conf.compose import configuration
from conf.resolve import resolve
from tests import instruments
from tests.cases import Case, config_of
from tests.ranks import on_ranks, standing_for

SIZES = {"dim": 128, "n_layers": 3, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 256, "vocab_size": 256}
SEQ_LEN = 512
N = 4
SPLIT = [
    Case("tp_sp", tp=N),
    Case("ulysses", ulysses=N),
    Case("ring", ring=N),
    Case("usp", ulysses=2, ring=2),
    Case("odysseus", tp=N),
    Case("odysseus", tp=2, ring=2),
    Case("tp_usp", tp=2, ulysses=2),
    Case("tp_usp", tp=2, ring=2),
    Case("upipe", ulysses=N),
    Case("tsp", ring=N, kv="all_gather"),
]


@pytest.fixture(scope="module")
def single():
    return instruments.peak(0, Case("single"), SIZES, 1, SEQ_LEN)


def check_activations(peaks: list, single) -> None:
    """1/N, and 8 % for what does not shrink: rope's tables, labels, the lse."""
    worst = max(peak.activations for peak in peaks)
    assert worst < 1.08 * single.activations / N, f"{worst * N / single.activations:.2f} / N of single's"


@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_saved_activations_are_one_nth(case: Case, single):
    check_activations(on_ranks(N, instruments.peak, case, SIZES, 1, SEQ_LEN), single)


@pytest.mark.parametrize("case", [Case("zero", dp=N), Case("tp", tp=N), *SPLIT], ids=str)
def test_params_grads_and_optimizer_state_are_one_nth(case: Case, single):
    for peak in on_ranks(N, instruments.peak, case, SIZES, 1, SEQ_LEN):
        for part in ("params", "grads", "optimizer"):
            # tp keeps whole norms: 0.5 % of this model's weights
            assert getattr(peak, part) < 1.03 * getattr(single, part) / N, part


STAGES = {0: {}, 1: {"optimizer"}, 2: {"params", "grads", "optimizer"}, 3: {"params", "grads", "optimizer"}}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", [Case("zero", dp=N), Case("usp", ulysses=2, ring=2)], ids=str)
def test_zero_keeps_what_its_stage_promises(case: Case, stage: int, single):
    for peak in on_ranks(N, instruments.peak, replace(case, zero_stage=stage), SIZES, 1, SEQ_LEN):
        for part in ("params", "grads", "optimizer"):
            share = N if part in STAGES[stage] else 1
            assert getattr(peak, part) == pytest.approx(getattr(single, part) / share, rel=0.01), part
        letters = Letters.of(config_of(replace(case, zero_stage=stage), SIZES, 1, SEQ_LEN))
        kept = {part: getattr(peak, part) for part in ("params", "grads", "optimizer")}
        assert kept == account_of(case.strategy).state(letters)


def test_tp_keeps_whole_activations_between_the_matrices(single):
    """Megatron's section 4.1: 10 of 34 bytes per element do not shrink."""
    (peak, *_) = on_ranks(N, instruments.peak, Case("tp", tp=N), SIZES, 1, SEQ_LEN)
    assert peak.activations > 1.3 * single.activations / N


@pytest.mark.parametrize("case", [Case("single"), *SPLIT], ids=str)
def test_recompute_keeps_block_inputs_only(case: Case):
    plain, recomputed = first_peak(case), first_peak(replace(case, recompute="block"))
    assert recomputed.activations < 0.35 * plain.activations


def first_peak(case: Case, sizes: dict = SIZES) -> instruments.Peak:
    """The first rank's."""
    alone = case.world_size == 1
    return (
        instruments.peak(0, case, sizes, 1, SEQ_LEN)
        if alone
        else on_ranks(N, instruments.peak, case, sizes, 1, SEQ_LEN)[0]
    )


AWAY = [replace(case, recompute="block", offload="activations") for case in (Case("single"), Case("tp", tp=N), *SPLIT)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16_mixed"])
@pytest.mark.parametrize("case", AWAY, ids=str)
def test_with_offload_a_block_more_is_memory_of_the_host_alone(case: Case, dtype: str):
    """To the byte: its input there, and nothing but its weights' part of the state on the device."""
    sizes = {"dim": 64, "n_heads": 8, "n_kv_heads": 2, "ffn_dim": 96, "vocab_size": 128}
    found = []
    for n_layers in (5, 4):
        args = case, {**sizes, "n_layers": n_layers}, 4, 256, dtype
        found.append(seen(0, *args) if case.world_size == 1 else on_ranks(N, seen, *args)[0])
    letters = Letters.of(config_of(case, {**sizes, "n_layers": 5}, 4, 256, dtype))
    deep, shallow = found
    state = [sum(getattr(each.peak, part) for part in ("params", "grads", "optimizer")) for each in found]
    assert deep.peak.total - shallow.peak.total == state[0] - state[1]
    assert deep.host_bytes - shallow.host_bytes == account_of(case.strategy).saved_by_block(letters)
    assert deep.host_bytes == 5 * (deep.host_bytes - shallow.host_bytes)


def seen(rank: int, *args) -> Observed:
    return instruments.observed(*instruments.train(*args))


CHUNKED = [Case("single"), Case("zero", dp=N), Case("tp", tp=N), SPLIT[0], SPLIT[1], SPLIT[4], SPLIT[6]]


@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_logits_never_exist_whole_where_the_loss_runs_in_chunks(case: Case):
    """With a large vocabulary the peak is the loss's: logits, fp32 probabilities and their gradient."""
    sizes = {**SIZES, "dim": 32, "n_layers": 1, "vocab_size": 4096}
    tokens = SEQ_LEN / (case.ulysses * case.ring)
    logits = 4 * tokens * sizes["vocab_size"] / case.tp
    whole, chunked = first_peak(case, sizes), first_peak(replace(case, loss_chunks=8), sizes)
    assert whole.total - chunked.total > 1.5 * logits * 7 / 8


@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_the_mlp_never_exists_whole_where_it_runs_in_chunks(case: Case):
    """Kept for backward are gate, up and their product, F wide: in chunks, the input alone.

    At the peak, in the last block's backward, its product is gone already.
    """
    sizes = {**SIZES, "dim": 32, "ffn_dim": 2048}
    plain, chunked = first_peak(case, sizes), first_peak(replace(case, mlp_chunks=8), sizes)
    tokens = SEQ_LEN / (case.ulysses * case.ring * case.tp)
    wide = 4 * tokens * sizes["ffn_dim"]
    assert plain.activations - chunked.activations > 0.95 * (3 * sizes["n_layers"] - 1) * wide
    assert plain.total - chunked.total > 3 * (sizes["n_layers"] - 1) * wide


class Unhurried(TorchDispatchMode):
    """Waits a little before each op: gloo's threads let go of a buffer some time after its wait() returned."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        time.sleep(0.0005)
        return func(*args, **(kwargs or {}))


def by_the_allocator(rank: int, case: Case) -> tuple[int, int]:
    """The peak of a step above what was there before, by the profiler's allocation events and by the log."""
    training, batches = instruments.train(case, SIZES, 1, SEQ_LEN)
    gc.collect()  # what the first step left would be freed during this one, and counted as less than nothing
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with Unhurried(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run_step(training, batches)
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    log = instruments.observed(training, batches).peak
    return highest, log.total - log.params - log.grads - log.optimizer


def test_the_log_agrees_with_the_allocator():
    allocator, log = by_the_allocator(0, Case("single"))
    assert log == pytest.approx(allocator, rel=0.01)


@pytest.mark.parametrize("case", SPLIT[:5], ids=str)
def test_the_log_misses_only_what_gloo_stages_itself(case: Case):
    """gloo gathers through a buffer of its own, as large as the result, that no dispatcher sees."""
    d, f = SIZES["dim"], SIZES["ffn_dim"]
    gathered = 4 * max(4 * d * d + 3 * d * f + 2 * d, SEQ_LEN * d)  # a block's weights, or a whole activation
    for allocator, log in on_ranks(N, by_the_allocator, case):
        assert -0.01 * allocator < allocator - log < gathered


def test_the_parts_are_the_peak(single):
    assert single.total == sum(getattr(single, part) for part in vars(single) if part != "total")


MIXED = [(replace(case, zero_stage=stage), "fp32") for case in (Case("zero", dp=N), SPLIT[3]) for stage in range(4)]
MIXED += [(case, "fp32") for case in (Case("single"), Case("tp", tp=N), *SPLIT[:6], SPLIT[8])]
MIXED += [(Case("zero", dp=N, zero_stage=stage), "same") for stage in range(4)]
MIXED += [(Case("tp_sp", dp=2, tp=2, zero_stage=stage), grads) for stage in (1, 3) for grads in ("fp32", "same")]
MIXED += [(replace(case, zero_stage=n), "fp32") for case in SPLIT[-1:] for n in (0, 1)] + [(SPLIT[-1], "same")]
MIXED += [(Case("tsp", dp=2, ring=2, kv="all_gather", zero_stage=stage), "fp32") for stage in range(4)]
MIXED += [(Case("odysseus", tp=2, ring=2), "same"), (Case("tp_sp", tp=N), "same")]


@pytest.mark.parametrize(("case", "grad_dtype"), MIXED, ids=str)
def test_mixed_precision_keeps_masters_of_what_is_trained_here_alone(case: Case, grad_dtype: str):
    """To the byte: weights as they are used, gradients, masters and moments; and no copy of a weight in a block."""
    sizes = {"dim": 64, "n_heads": 8, "n_kv_heads": 2, "ffn_dim": 96, "vocab_size": 128}
    peaks = []
    for n_layers in (3, 2):
        args = grad_dtype, case, {**sizes, "n_layers": n_layers}, 4, 256
        ranks = [mixed_peak(0, *args)] if case.world_size == 1 else on_ranks(N, mixed_peak, *args)
        peaks.append(max(ranks, key=lambda peak: peak.total))
    letters = Letters.of(config_of(case, {**sizes, "n_layers": 3}, 4, 256, "bf16_mixed", grad_dtype=grad_dtype))
    account = account_of(case.strategy)
    assert {part: getattr(peaks[0], part) for part in ("params", "grads", "optimizer")} == account.state(letters)
    assert peaks[0].activations - peaks[1].activations == account.saved_by_block(letters)


def mixed_peak(rank: int, grad_dtype: str, *args) -> instruments.Peak:
    return instruments.observed(*instruments.train(*args, "bf16_mixed", grad_dtype=grad_dtype)).peak


SELECTIVE = [replace(case, recompute="selective") for case in (Case("single"), Case("tp", tp=N), *SPLIT)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [Case("single"), Case("zero", dp=N), Case("tp", tp=N), *SPLIT, *SELECTIVE], ids=str)
def test_a_block_keeps_what_the_cost_table_says(case: Case, dtype: str):
    """To the byte: what a third layer adds to the activations at the peak."""
    sizes = {"dim": 64, "n_heads": 8, "n_kv_heads": 2, "ffn_dim": 96, "vocab_size": 128}
    peaks = []
    for n_layers in (3, 2):
        args = case, {**sizes, "n_layers": n_layers}, 4, 256, dtype
        ranks = [instruments.peak(0, *args)] if case.world_size == 1 else on_ranks(N, instruments.peak, *args)
        peaks.append(max(ranks, key=lambda peak: peak.total))
    letters = Letters.of(config_of(case, {**sizes, "n_layers": 3}, 4, 256, dtype))
    assert peaks[0].activations - peaks[1].activations == account_of(case.strategy).saved_by_block(letters)
    for part, size in account_of(case.strategy).state(letters).items():
        assert getattr(peaks[0], part) == size, part


def alone(rank: int, words: str) -> int:
    """The peak of a strategy's attention alone."""
    config = resolve(configuration(["mode=simulate", "workload=attention", "batch_size=1", *words.split()])).config
    with standing_for(rank, config.world_size):
        return simulate(config, lambda text: None)[0].peak.total


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_of_what_ulysses_exchanges_a_stage_is_there_at_a_time(stages: int):
    """q, k, v, out and their gradients by heads; and by tokens the same but for a stage's part of three gradients."""
    words = "world_size=2 seq_len=4096 model.n_heads=8 model.n_kv_heads=8 strategy="
    plain, staged = (
        on_ranks(1, alone, f"{words}{each}", grouped=False)[0] for each in ("ulysses", f"upipe ulysses.stages={stages}")
    )
    heads = 4 * 2048 * 128  # bytes of a rank's q, or of as many heads of all tokens
    lse = 4 * 4096 * 4
    assert plain == 4 * heads + 9 * heads + lse
    assert staged == 4 * heads + heads + lse + 3 * (1 - 1 / stages) * heads + 8 / stages * heads
