"""Every strategy on every mesh is the same model: logits, loss and every gradient, against two judges.

Loss is not enough: averaged instead of summed gradients leave the first loss untouched.
"""

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import strategies
from bench.workloads.attention import AttentionAlone
from conf.mask import Mask
from strategies.base import Options
from strategies.ops.kernels import pick_kernel
from tests import instruments, reference
from tests.cases import CASES, HEADS, MASKED, MASKS, NEEDED, Case, cases, sized
from tests.ranks import on_ranks

CLOSE = 1e-5


def run_all_heads(rank: int, case: Case, folders: dict[str, str], batches: dict) -> dict:
    """On one rank: every checkpoint with every batch -> rank 0's results."""
    results = {}
    for heads, folder in folders.items():
        training = reference.build(case, folder)
        for key, batch in batches.items():
            results[heads, key] = reference.run_case(training, *batch)
            training.zero_grads()
    return results


@functools.cache
def judge(folder: str, batch_size: int, silent: tuple[int, ...] | None) -> reference.Result:
    return reference.hugging_face(folder, *batch_of(batch_size, silent))


def batch_of(batch_size: int, silent: tuple[int, ...] | None) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.make_batch(batch_size, 67, None if silent is None else torch.tensor(silent))


def packed_batch(mask: Mask) -> tuple[torch.Tensor, torch.Tensor, Mask]:
    """Three sequences of documents, whose last tokens have no label."""
    tokens, labels = reference.make_batch(3, 67, None)
    begin = torch.from_numpy(mask.begin(np.arange(reference.SEQ_LEN))).expand(len(tokens), -1)
    labels[:, :-1][begin[:, 1:] != begin[:, :-1]] = -100
    return tokens, labels, mask


@pytest.mark.parametrize("case", [*CASES, *NEEDED], ids=str)
def test_documents_and_windows_are_the_unsharded_model_under_their_mask(case: Case, checkpoints):
    folder = checkpoints["gqa"] if case.fits(HEADS["gqa"]) else checkpoints["mha"]
    masks = [replace(case, **mask).mask(3, reference.SEQ_LEN) for mask in MASKS]
    batches = {n: packed_batch(mask) for n, mask in enumerate(masks)}
    if case.world_size == 1:
        results = run_all_heads(0, case, {"": folder}, batches)
    else:
        results = on_ranks(case.world_size, run_all_heads, case, {"": folder}, batches)[0]
    for n, mask in enumerate(MASKS):
        for whose, truth in (("transformers", their_packed(folder, n)), ("one process", single_packed(folder, n))):
            ours, theirs = (but_for_what_is_zero(each, mask) for each in (results["", n], truth))
            reference.assert_equal(ours, theirs, CLOSE, f"{case}, {mask}, against {whose}")


def but_for_what_is_zero(result: reference.Result, mask: dict) -> reference.Result:
    """A token that sees itself alone does so whatever q and k are: their gradients are nothing beside v's."""
    if mask != {"window": 1}:
        return result
    zero = {name for name in result.grads if name.endswith((".q.weight", ".k.weight"))}
    for name in zero:
        of_v = result.grads[f"{name.rpartition('.attn.')[0]}.attn.v.weight"]
        assert result.grads[name].norm() < CLOSE * of_v.norm(), name
    return replace(result, grads={name: grad for name, grad in result.grads.items() if name not in zero})


@functools.cache
def their_packed(folder: str, n: int) -> reference.Result:
    tokens, labels, mask = packed_batch(Case("single", **MASKS[n]).mask(3, reference.SEQ_LEN))
    return reference.hugging_face(folder, tokens, labels, mask=mask)


@functools.cache
def single_packed(folder: str, n: int) -> reference.Result:
    return reference.run_case(
        reference.build(Case("single"), folder, kernel="math"),
        *packed_batch(Case("single", **MASKS[n]).mask(3, reference.SEQ_LEN)),
    )


@functools.cache
def single(folder: str, batch_size: int, silent: tuple[int, ...] | None) -> reference.Result:
    return reference.run_case(reference.build(Case("single"), folder), *batch_of(batch_size, silent))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_strategy_is_the_unsharded_model(case: Case, checkpoints):
    silent = tuple(reference.positions_of_first_rank(case).tolist())
    keys = [(1, None), (3, silent)]
    batches = {key: batch_of(*key) for key in keys}
    folders = {heads: checkpoints[heads] for heads, n_kv_heads in HEADS.items() if case.fits(n_kv_heads)}
    if case.world_size == 1:
        results = run_all_heads(0, case, folders, batches)
    else:
        results = on_ranks(case.world_size, run_all_heads, case, folders, batches)[0]
    for heads, folder in folders.items():
        for key in keys:
            what = f"{case}, {heads}, batch {key[0]}"
            reference.assert_equal(results[heads, key], judge(folder, *key), CLOSE, f"{what}, against transformers")
            reference.assert_equal(results[heads, key], single(folder, *key), CLOSE, f"{what}, against one process")


def attention_alone(rank: int, case: Case, n_kv_heads: int) -> dict[str, float]:
    """How far this rank's output and gradients of workload=attention are from its part of the whole ones."""
    sizes = sized(dim=64, n_layers=1, n_heads=8, n_kv_heads=n_kv_heads, ffn_dim=1, vocab_size=1)

    def alone(case: Case) -> AttentionAlone:
        options = Options(pick_kernel("auto", "cpu", torch.float32, sizes.head_dim), **case.options)
        strategy = strategies.build(case.strategy, case.degrees, options, placement=case.placement)
        return AttentionAlone(sizes, strategy, 2, 32, mask=case.mask(2, 32))

    ours, whole = alone(case), alone(Case("single", documents=case.documents, window=case.window))
    outs = [run.forward() for run in (ours, whole)]
    for run, out in zip((ours, whole), outs, strict=True):
        run.backward(out)
    pairs = {"out": outs} | {
        name: [q.grad, all_q.grad] for name, q, all_q in zip("qkv", ours.qkv, whole.qkv, strict=True)
    }
    if case.tp > n_kv_heads:  # ranks that share a kv head hold parts of its gradient's sum
        del pairs["k"], pairs["v"]
    return {name: reference.distance(mine, ours.part(theirs)) for name, (mine, theirs) in pairs.items()}


ALONE = [case for case in [*cases(4), *MASKED] if case.dp < 4 and case.zero_stage == 3 and case.model == Case("").model]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "n_kv_heads"), [(c, n) for c in ALONE for n in HEADS.values() if c.fits(n)], ids=str)
def test_attention_alone_is_its_part_of_the_whole(case: Case, n_kv_heads: int):
    for far in on_ranks(4, attention_alone, case, n_kv_heads):
        assert max(far.values()) < CLOSE, far


def trained(rank: int, case: Case, folder: str) -> tuple[reference.Result | None, list[tuple]]:
    """One step's result, and what was sent: (phase, kind, axis, bytes), whatever line sent it."""
    training = reference.build(case, folder)
    result = reference.run_case(training, *batch_of(3, None))
    training.zero_grads()
    training.update()
    sent: Counter = Counter()
    for entry in instruments.observed(training, [training.place(*batch_of(3, None))]).comm:
        sent[entry.phase, entry.kind, entry.axis, entry.weights] += entry.sent_bytes
    return result, sorted(sent.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hybrid", "plain"),
    [
        (Case("tp_usp", ulysses=2, ring=2), Case("usp", ulysses=2, ring=2)),
        (Case("tp_usp", ulysses=4), Case("ulysses", ulysses=4)),
        (Case("tp_usp", tp=4), Case("tp_sp", tp=4)),
    ],
    ids=str,
)
def test_tp_usp_is_usp_at_tp_1_and_tp_sp_at_ulysses_ring_1(hybrid: Case, plain: Case, checkpoints):
    (ours, we_sent), (theirs, they_sent) = (on_ranks(4, trained, c, checkpoints["gqa"])[0] for c in (hybrid, plain))
    reference.assert_equal(ours, theirs, 1e-6, f"{hybrid} against {plain}")
    assert we_sent == they_sent


def compiled_or_not(rank: int, case: Case, folder: str, compiled: bool) -> tuple[reference.Result | None, int]:
    """The result of a step, and how many graphs were compiled for it."""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    training = reference.build(case, folder, compiled=compiled)
    result = reference.run_case(training, *batch_of(1, None))
    return result, torch._dynamo.utils.counters["stats"]["unique_graphs"] - before


@pytest.mark.slow
def test_compiled_is_the_same_model(checkpoints):
    """compile=true: a norm, the rotation of q and of k, and the activation are a graph each; else there is none."""
    case, folder = Case("ulysses", ulysses=2, recompute="block"), checkpoints["gqa"]
    (ours, graphs), (plain, none) = (on_ranks(2, compiled_or_not, case, folder, yes)[0] for yes in (True, False))
    assert (graphs, none) == (4, 0)
    reference.assert_equal(ours, plain, CLOSE, "compiled against eager")
    reference.assert_equal(ours, judge(folder, 1, None), CLOSE, "compiled against transformers")
