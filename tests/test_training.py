"""Five steps of AdamW with clipping: the same loss curve on every strategy and in transformers; and bf16 honestly."""

from dataclasses import replace

import pytest
import torch

from bench.workloads.training import PRECISIONS
from strategies.ops.weights import trained
from tests import reference
from tests.cases import CASES, MICRO, Case
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


def in_parts(rank: int, case: Case, folder: str) -> dict[str, torch.Tensor] | None:
    """The whole gradients of a batch that was run in parts, and its loss."""
    training = reference.build(case, folder)
    losses = []
    for part in training.micro_batches(*reference.make_batch(8, 67, torch.arange(5)), case.micro_batches):
        losses.append(training.forward(part))
        training.backward(losses[-1], last=False)
    training.finish()
    grads = reference.together(reference.gradients(training))
    return {"loss": torch.tensor(training.global_loss(torch.stack(losses).sum().detach()[None])), **grads}


@pytest.mark.parametrize("case", MICRO, ids=str)
def test_micro_batches_are_one_batch(case: Case, checkpoints):
    """The same loss and gradients, whatever ZeRO does in between."""
    whole = reference.hugging_face(checkpoints["gqa"], *reference.make_batch(8, 67, torch.arange(5)))
    ours = on_ranks(4, in_parts, case, checkpoints["gqa"])[0]
    assert ours.pop("loss").item() == pytest.approx(whole.loss, rel=1e-5)
    for name, grad in ours.items():
        assert reference.distance(grad, whole.grads[name]) < 1e-5, name


@pytest.mark.parametrize("grad_dtype", ["fp32", "same"])
def test_gradients_of_micro_batches_add_up_in_their_dtype(grad_dtype: str, checkpoints):
    """64 parts that are alike: in fp32 no addition is lost, in bf16 the later ones are."""
    tokens, labels = (t.repeat(64, 1) for t in reference.make_batch(1, 67, None))
    training = reference.build(Case("single"), checkpoints["gqa"], PRECISIONS["bf16_mixed"], grad_dtype=grad_dtype)
    first, *others = training.micro_batches(tokens, labels, 64)
    training.backward(training.forward(first))
    one = {name: grad.double() for name, grad in reference.gradients(training).items()}
    for part in others:
        training.backward(training.forward(part))
    off = [reference.distance(grad, 64 * one[name]) for name, grad in reference.gradients(training).items()]
    assert max(off) < 1e-6 if grad_dtype == "fp32" else min(off) > 1e-2


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


LONG = 20


def long_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [reference.make_batch(2, 67, torch.arange(5), seed=step) for step in range(LONG)]


def long_curve(rank: int, case: Case, folder: str, dtypes, **options) -> list[float]:
    training = reference.build(case, folder, dtypes, "math" if dtypes[1] == torch.float64 else "auto", **options)
    shares = []
    for tokens, labels in long_batches():
        loss = training.forward(training.place(tokens, labels))
        training.backward(loss)
        for weights, grad, _, _ in trained(training.model):
            assert weights.dtype == dtypes[0]
            assert grad.dtype in (dtypes[0], training.strategy.options.gradients_in)
        training.update()
        shares.append(loss.detach())
    return training.global_loss(torch.stack(shares))


@pytest.fixture(scope="module")
def exact_curve(checkpoints) -> list[float]:
    return long_curve(0, Case("single"), checkpoints["gqa"], (torch.float64, torch.float64))


@pytest.fixture(scope="module")
def mixed_curve(checkpoints) -> list[float]:
    """transformers' model in bf16, whose fp32 masters are torch's AdamW's, with fp32 gradients."""
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(checkpoints["gqa"], dtype=torch.float32, attn_implementation="eager")
    masters = [parameter.detach().clone().requires_grad_() for parameter in theirs.parameters()]
    theirs = theirs.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = []
    for tokens, labels in long_batches():
        loss = torch.nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1).float(), labels.flatten())
        theirs.zero_grad()
        loss.backward()
        for master, weight in zip(masters, theirs.parameters(), strict=True):
            master.grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 0.5)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, theirs.parameters(), strict=True):
                weight.copy_(master)
        losses.append(loss.item())
    return losses


def off(curve: list[float], exact: list[float]) -> float:
    """How far a curve is from another, in the root of its mean square."""
    return (torch.tensor(curve).double() - torch.tensor(exact).double()).square().mean().sqrt().item()


MIXED = [(case, "fp32") for case in (Case("single"), *FOUR) if case.layout == "zigzag"]
MIXED += [(replace(case, zero_stage=stage), "same") for case in FOUR[:1] for stage in range(4)]
MIXED += [(Case("tp_sp", dp=2, tp=2, zero_stage=1), "same"), (Case("odysseus", tp=4), "same")]


@pytest.mark.parametrize(("case", "grad_dtype"), MIXED, ids=str)
def test_mixed_precision_is_no_further_from_fp64_than_twice_one_process(
    case: Case, grad_dtype: str, checkpoints, exact_curve, mixed_curve
):
    """20 steps with bf16 weights and fp32 masters, against transformers trained alike."""
    arguments = case, checkpoints["gqa"], PRECISIONS["bf16_mixed"]
    if case.world_size == 1:
        ours = long_curve(0, *arguments, grad_dtype=grad_dtype)
    else:
        ours = on_ranks(4, with_gradients_in, grad_dtype, *arguments)[0]
    assert off(ours, exact_curve) < 2 * off(mixed_curve, exact_curve)


def with_gradients_in(rank: int, grad_dtype: str, *arguments) -> list[float]:
    return long_curve(rank, *arguments, grad_dtype=grad_dtype)
