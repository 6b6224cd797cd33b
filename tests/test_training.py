"""Five steps of AdamW with clipping: the same loss curve on every strategy and in transformers; and bf16 honestly."""

import pytest
import torch

from bench.workloads.training import PRECISIONS
from tests import reference
from tests.cases import CASES, Case
from tests.ranks import on_ranks

STEPS = 5
FOUR = [case for case in CASES if case.world_size == 4 and (case.strategy not in ("usp", "tp_usp") or case.ring == 2)]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [reference.make_batch(2, 67, torch.arange(5), seed=step) for step in range(STEPS)]


def curve(rank: int, case: Case, folder: str) -> list[float]:
    training = reference.build(case, folder)
    shares = []
    for tokens, labels in batches():
        loss = training.forward(training.place(tokens, labels))
        training.backward(loss)
        training.update()
        shares.append(loss.detach())
    return training.global_loss(torch.stack(shares))


@pytest.fixture(scope="module")
def their_curve(checkpoints) -> list[float]:
    """transformers' model under torch's own AdamW and clipping, with the settings of reference.build."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoints["gqa"], dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = []
    for tokens, labels in batches():
        logits = model(tokens).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("case", [Case("single"), *FOUR], ids=str)
def test_five_steps_have_the_same_losses(case: Case, checkpoints, their_curve):
    folder = checkpoints["gqa"]
    ours = curve(0, case, folder) if case.world_size == 1 else on_ranks(4, curve, case, folder)[0]
    assert ours == pytest.approx(their_curve, rel=1e-5)
    assert their_curve[-1] < their_curve[0]


def result_in(rank: int, case: Case, folder: str, dtype: torch.dtype) -> reference.Result | None:
    kernel = "math" if dtype == torch.float64 else "auto"
    training = reference.build(case, folder, (dtype, dtype), kernel)
    return reference.run_case(training, *batches()[0])


@pytest.mark.parametrize("case", [case for case in FOUR if case.zero_stage == 3 and case.dp in (1, 4)], ids=str)
def test_bf16_is_no_more_than_twice_as_far_from_fp64_as_one_process(case: Case, checkpoints):
    folder = checkpoints["gqa"]
    oracle = result_in(0, Case("single"), folder, torch.float64)
    alone = reference.worst_distance(result_in(0, Case("single"), folder, torch.bfloat16), oracle)
    ours = reference.worst_distance(on_ranks(4, result_in, case, folder, torch.bfloat16)[0], oracle)
    for name in alone.keys() - {"loss"}:  # one scalar's rounding is luck; it follows from the logits
        assert ours[name] < 2 * alone[name], f"{name}: {ours[name]:.1e}, one process {alone[name]:.1e}"


def mixed(rank: int, case: Case, folder: str) -> list[float]:
    training = reference.build(case, folder, PRECISIONS["bf16_mixed"])
    assert all(p.dtype == torch.float32 for p in training.model.parameters())
    return training.global_loss(one_loss(training)[None])


def one_loss(training) -> torch.Tensor:
    loss = training.forward(training.place(*batches()[0]))
    training.backward(loss)
    assert all(p.grad.dtype == torch.float32 for p in training.model.parameters())
    training.update()
    return loss.detach()


@pytest.mark.parametrize(
    "case", [case for case in FOUR if case.layout == "zigzag" and case.zero_stage in (1, 3)], ids=str
)
def test_bf16_mixed_keeps_fp32_weights_and_the_loss(case: Case, checkpoints, their_curve):
    (ours,) = on_ranks(4, mixed, case, checkpoints["gqa"])[0]
    assert ours == pytest.approx(their_curve[0], rel=2e-2)
