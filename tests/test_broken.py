"""The tests can fail: strategies broken on purpose, each in a way that leaves the forward pass right."""

from unittest.mock import patch

import pytest
import torch.nn.functional as F

import strategies
from strategies.ops.collectives import all_gather, reduce_scatter, start_all_to_all
from strategies.ops.linear import SEQUENCE
from strategies.ops.ring_attention import ring_attention
from strategies.tp_sp import TPSP
from strategies.ulysses import HEADS, Ulysses
from strategies.usp import USP
from tests import instruments, reference, test_ledger, test_memory
from tests.cases import Case
from tests.ranks import on_ranks


class AveragedGradients(Ulysses):
    """FSDP2's default: the mean of the ranks' gradients instead of their sum."""

    def shard(self, model):
        super().shard(model)
        for module in [*model.blocks, model.embed, model.head]:
            module.set_gradient_divide_factor(float(self.mesh.zero.size))


class WrongAxis(USP):
    """The output goes home along another axis than it came."""

    def attention(self, attn, x, rope):
        q, k, v = attn.heads(attn.project(x), rope)
        q, k, v = (start_all_to_all(t, HEADS, SEQUENCE, self.ulysses).wait() for t in (q, k, v))
        out = ring_attention(q, k, v, self.ring, self.options)
        return attn.output(start_all_to_all(out, SEQUENCE, HEADS, self.ring).wait())


class ForgottenNorms(TPSP):
    """Each rank keeps the norms' gradients of its own tokens."""

    def shard(self, model):
        super(TPSP, self).shard(model)


class KeptGather(TPSP):
    """The gathered input is kept for backward instead of gathered again: all numbers are right."""

    def attention(self, attn, x, rope):
        x = all_gather(x, SEQUENCE, self.tp)
        q, k, v = attn.heads(attn.project(x), rope)
        out = self.core_attention(q, k, v)
        return reduce_scatter(attn.output(out), SEQUENCE, self.tp)

    def mlp(self, mlp, x):
        x = all_gather(x, SEQUENCE, self.tp)
        return reduce_scatter(mlp.down(F.silu(mlp.gate(x)) * mlp.up(x)), SEQUENCE, self.tp)


MUTANTS = {
    "averaged": (AveragedGradients, Case("ulysses", ulysses=4)),
    "wrong_axis": (WrongAxis, Case("usp", ulysses=2, ring=2)),
    "forgotten_norms": (ForgottenNorms, Case("tp_sp", tp=4)),
    "kept_gather": (KeptGather, Case("tp_sp", tp=4)),
}


def mutated(rank: int, name: str, function, *args):
    """function(rank, *args) with the mutant in the place of the strategy that it breaks."""
    mutant, _ = MUTANTS[name]
    with patch.object(strategies, "load", lambda name: mutant):
        return function(rank, *args)


def result(rank: int, case: Case, folder: str):
    return reference.run_case(reference.build(case, folder), *reference.make_batch(2, 67, None))


def distances(name: str, folder: str) -> dict[str, float]:
    theirs = reference.hugging_face(folder, *reference.make_batch(2, 67, None))
    ours = on_ranks(4, mutated, name, result, MUTANTS[name][1], folder)[0]
    return reference.worst_distance(ours, theirs)


@pytest.mark.parametrize("name", ["averaged", "forgotten_norms"])
def test_wrong_gradients_with_the_right_loss_are_found(name, checkpoints):
    far = distances(name, checkpoints["mha"])
    assert far["loss"] < 1e-5
    assert far["logits"] < 1e-5
    assert max(far.values()) > 0.1


def test_a_wrong_axis_is_found(checkpoints):
    assert distances("wrong_axis", checkpoints["mha"])["logits"] > 0.1


@pytest.mark.slow
def test_a_kept_gather_has_right_gradients_and_is_found_by_counts_and_memory(checkpoints):
    case = MUTANTS["kept_gather"][1]
    assert max(distances("kept_gather", checkpoints["mha"]).values()) < 1e-5

    counted = on_ranks(4, mutated, "kept_gather", test_ledger.counted_block, case, 8, 1, 32, "fp32")[0]
    expected = test_ledger.block_form(case, 8, 1, 32, 4)
    gathers = "backward", "all_gather", False
    assert expected[gathers][0] - counted[gathers][0] == 2

    single = instruments.peak(0, Case("single"), test_memory.SIZES, 1, test_memory.SEQ_LEN)
    peaks = on_ranks(4, mutated, "kept_gather", instruments.peak, case, test_memory.SIZES, 1, test_memory.SEQ_LEN)
    with pytest.raises(AssertionError, match="of single's"):
        test_memory.check_activations(peaks, single)
