"""No wrong number ends as ok: each is broken on one rank, for every strategy, and the row says so."""

import math
import os
import re
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.nn.functional import cross_entropy

from bench.app import judge, records
from bench.app.row import believed, run
from bench.instruments import ledger
from bench.instruments.flops import FlopCounter
from bench.ranks.task import Outcome, Task
from bench.workloads.attention import AttentionAlone
from bench.workloads.training import Training
from conf.columns import MEASURED, measured
from conf.measurement import Entry, Measured, Peak, Rank, Round, Step
from conf.resolve import resolve
from tests.cases import sized
from tests.jobs import job
from tests.ranks import on_ranks

SMALL = ["model.dim=32", "model.n_layers=1", "model.n_heads=4", "model.n_kv_heads=2", "model.ffn_dim=48"]
SMALL += ["model.vocab_size=64", "data=random", "seq_len=32", "batch_size=2", "steps=1", "warmup=0"]
CASES = [
    "strategy=single world_size=1",
    "strategy=tp",
    "strategy=tp_sp",
    "strategy=tp_sp world_size=4 mesh.dp=2 mesh.tp=2",
    "strategy=ulysses",
    "strategy=ring",
    "strategy=ring ring.layout=contiguous",
    "strategy=usp world_size=4 mesh.ulysses=2 mesh.ring=2",
    "strategy=tp_usp world_size=4 mesh.tp=2 mesh.ulysses=2",
    "strategy=odysseus mesh.tp=2",
    "strategy=odysseus world_size=4 mesh.tp=2 mesh.ring=2",
    "strategy=zero",
]
SHARES_TOKENS = ("strategy=tp", "strategy=odysseus")  # over tp: two ranks make the same loss


def scaled(of: type, method: str, factor: float):
    """The method, with this many times its result."""
    right = getattr(of, method)
    return patch.object(of, method, lambda *args: factor * right(*args))


def twice_the_flops():
    add = FlopCounter.add
    return patch.object(FlopCounter, "add", lambda counter, flops: add(counter, 2 * flops))


def half_of_the_bytes():
    halves = {
        name: replace(kind, sent=lambda s, p, kind=kind: kind.sent(s, p) / 2) for name, kind in ledger.KINDS.items()
    }
    return patch.dict(ledger.KINDS, halves)


def a_call_missing():
    count, seen = ledger.Ledger.count, []

    def all_but_the_first(self: ledger.Ledger, func, args: tuple, out) -> None:
        if func._schema.name.partition("::")[2] not in ledger.SILENT:
            seen.append(func)
        if len(seen) != 1:
            count(self, func, args, out)

    return patch.object(ledger.Ledger, "count", all_but_the_first)


BROKEN = {
    "loss times 3": lambda: scaled(Training, "forward", 3.0),
    "loss 0": lambda: scaled(Training, "forward", 0.0),
    "loss NaN": lambda: scaled(Training, "forward", float("nan")),
    "flops": twice_the_flops,
    "bytes": half_of_the_bytes,
    "call": a_call_missing,
    "attention": lambda: scaled(AttentionAlone, "forward", 1.01),
}


def measure(rank: int, task: Task, how: str | None, broken: int) -> Rank:
    """What a rank measures, one of them with something broken."""
    from bench.ranks.worker import run_steps

    torch.manual_seed(0)
    if how is None or rank != broken:
        return run_steps(task, lambda text: None)
    with BROKEN[how]():
        return run_steps(task, lambda text: None)


@pytest.fixture
def row_of(tmp_path, monkeypatch):
    """The row of a configuration, with something broken on rank 1 (or on the only one)."""
    monkeypatch.setattr(records, "RUNS", tmp_path)

    def row(case: str, how: str | None = None, *more: str) -> dict:
        def ranks(task: Task, what: str) -> Outcome:
            size = task.config.world_size
            return Outcome("ok", "", on_ranks(size, measure, task, how, min(1, size - 1), grouped=size > 1))

        return run(job(*SMALL, *case.split(), *more), "all", ranks)

    return row


@pytest.mark.parametrize("case", CASES)
def test_what_is_right_is_ok(case: str, row_of):
    row = row_of(case)
    assert (row["status"], row["reason"]) == ("ok", "")
    assert row["flops_per_rank"] == row["analytic_flops_per_rank"] > 0


def broken_rank(case: str) -> int:
    return 0 if "single" in case else 1


@pytest.mark.parametrize("how", ["loss times 3", "loss 0", "loss NaN"])
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_loss_of_one_rank_is_found(case: str, how: str, row_of):
    row = row_of(case, how)
    assert row["status"] == "error"
    if how == "loss NaN":
        assert row["reason"] == f"the loss of rank {broken_rank(case)} is not finite at step 1"
    elif case.startswith(SHARES_TOKENS):  # sooner found by the rank that has the same tokens
        assert row["reason"].startswith("rank 1 and rank 0 have the same tokens, and at step 1 they make ")
    else:
        assert row["reason"].startswith(f"rank {broken_rank(case)} begins with a mean loss of ")


@pytest.mark.parametrize("how", ["flops", "bytes", "call"])
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_count_of_one_rank_is_found(case: str, how: str, row_of):
    if "single" in case and how != "flops":
        pytest.skip("one process sends nothing")
    row = row_of(case, how)
    assert row["status"] == "error"
    assert row["reason"].startswith(f"rank {broken_rank(case)}: ")
    if how == "flops":
        derived, counted = (int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{3,}", row["reason"]))
        assert counted == 2 * derived == row["flops_per_rank"]
    else:
        assert re.search(
            r"(forward|backward) \w+ was derived as \d+ calls of [\d,]+ bytes in all and counted as", row["reason"]
        )


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_attention_of_one_rank_is_found(case: str, direction: str, row_of):
    asked = ["workload=attention", f"direction={direction}"]
    if direction == "forward":
        assert row_of(case, None, *asked)["status"] == "ok"
    row = row_of(case, "attention", *asked)
    assert row["status"] == "error"
    assert 1e-3 < row["relative_error"] < 0.02
    assert row["reason"].startswith("wrong: output")
    assert row["reason"].endswith(f"farthest on rank {broken_rank(case)}")


def test_the_reference_of_any_kernel_is_right_on_every_rank(row_of):
    """Where every query head has a kv head of its own, math's output lies in memory heads first."""
    row = row_of("strategy=zero", None, "workload=attention", "attention.kernel=math", "model.n_kv_heads=4")
    assert (row["status"], row["reason"]) == ("ok", "")


def ranks_of(*measured: dict) -> list[Rank]:
    """Ranks that counted nothing, whose first step had 100 labels."""
    nothing = {"comm": [], "flops": 0, "peak": Peak(), "after_forward": 0, "device_name": None, "backend": ""}
    return [Rank(**nothing, torch_version="", rank=rank, labels=100.0, **each) for rank, each in enumerate(measured)]


def of_losses(*measured: tuple[float, float, float], strategy: str = "ring") -> list[str]:
    """What is said of two ranks' loss, share of it, and share of the tokens."""
    ranks = ranks_of(*({"losses": [a], "loss_shares": [b], "token_shares": [c]} for a, b, c in measured))
    return list(judge.of_losses(resolve(job(*SMALL, f"strategy={strategy}").config).config, ranks))


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ((4.2, 2.1, 0.5), []),
        ((4.3, 2.1, 0.5), ["rank 1 has 4.3 as the loss of step 1, and the ranks' parts of it add up to 4.2"]),
        ((4.2, 2.1, 0.4), ["at step 1 the ranks have 0.9 of the tokens that count", "rank 1 begins with a mean loss"]),
        ((4.2, 2.1, 0.0), ["at step 1 the ranks have 0.5 of the tokens that count"]),
    ],
)
def test_what_ranks_have_parts_of_adds_up(second: tuple, said: list[str]):
    found = of_losses((4.2, 2.1, 0.5), second)
    assert len(found) == len(said)
    assert all(one.startswith(start) for one, start in zip(found, said, strict=True))


def test_later_steps_are_compared_too_and_a_checkpoints_first_loss_is_its_own():
    ranks = ranks_of(*({"losses": [1, 2], "loss_shares": [1, each], "token_shares": [1, 1]} for each in (2, 2.1)))
    config = resolve(job(*SMALL, "strategy=tp").config).config
    config.model.name = "hf"
    said = list(judge.of_losses(config, ranks))
    assert said == [
        "rank 1 and rank 0 have the same tokens, and at step 2 they make 2.1 and 2 of the loss",
    ]


@pytest.mark.parametrize(
    ("dim", "vocab_size", "tied"), [(64, 257, False), (64, 257, True), (256, 64, False), (512, 4096, True)]
)
def test_a_first_loss_lies_where_random_weights_put_it(dim: int, vocab_size: int, tied: bool):
    """Of many draws of head and labels none is refused; three times as much, and nothing, are."""
    model = sized(
        dim=dim, n_layers=4, n_heads=4, n_kv_heads=4, ffn_dim=4 * dim, vocab_size=vocab_size, tie_embeddings=tied
    )
    generator = torch.Generator().manual_seed(0)
    for labels in (16, 256):
        low, high = judge.first_loss(model, labels)
        assert 0 < low < math.log(vocab_size) < high < 3 * math.log(vocab_size)
        head = 0.02 * torch.randn(vocab_size, dim, generator=generator)
        for _ in range(5):
            targets = torch.randint(vocab_size, (labels,), generator=generator)
            x = torch.randn(labels, dim, generator=generator)
            if tied:  # every token follows itself, and 4 MLPs have added something to its embedding
                x = head[targets] / 0.02 + (4 * 4 * dim * (0.02 * dim**0.5) ** 4 / 4) ** 0.5 * x
            logits = dim**0.5 * x / x.norm(dim=1, keepdim=True) @ head.T
            loss = cross_entropy(logits, targets)
            assert low < loss < high


def timed(*ms: float, flops: int = 10**6) -> Measured:
    """One process whose steps took so long, in rounds of one step."""
    config = resolve(job(*SMALL, "strategy=single", "world_size=1").config).config
    rounds = [Round(ranks_of({"steps": [Step(*[each] * 5)]})) for each in ms]
    for each in rounds:
        each.ranks[0].flops = flops
    return Measured(config, rounds)


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"steps": [Step(1, 1, 1, 0, 1)]}, "the clock of rank 1 stood, or went back: "),
        ({"steps": [Step(1, -1, 1, 3, 1)]}, "the clock of rank 1 stood, or went back: "),
        ({"steps": [Step(1, 1, 1, math.inf, 1)]}, "the clock of rank 1 stood, or went back: "),
        ({"steps": []}, "rank 1 has timed 0 of 1 steps and has losses of 1"),
        ({"losses": [], "loss_shares": []}, "rank 1 has timed 1 of 1 steps and has losses of 0"),
        ({"token_shares": [0.5, 0.5]}, "rank 1 has timed 1 of 1 steps and has losses of 1"),
        ({"labels": 0}, "rank 1 has 0 labels"),
        ({"comm": [Entry("forward", "p2p", "ring", 2, "", "", False, 1, 1, math.nan)]}, "rank 1 has sent bytes that"),
        ({"rank": 0}, "2 ranks have measured, and they are not those of world_size=2"),
        ({"peak": Peak()}, "rank 1 held 0 bytes at most, and its parts of that add up to 0"),
        ({"peak": Peak(-3, other=-3)}, "rank 1 held -3 bytes at most, and its parts of that add up to -3"),
        ({"peak": Peak(7, params=5)}, "rank 1 held 7 bytes at most, and its parts of that add up to 5"),
    ],
)
def test_what_is_no_measurement_is_an_error_of_the_rank(measured: dict, said: str):
    task = Task(resolve(job(*SMALL, "strategy=ring", "world_size=2", "steps=1", "warmup=0").config).config)
    right = {"steps": [Step(1, 1, 0, 3, 0)], "peak": Peak(7, params=5, other=2), "labels": 1.0}
    right |= {"losses": [5.5], "loss_shares": [2.7], "token_shares": [0.5]}
    good, bad = ranks_of({}, {})
    good, bad = replace(good, rank=0, **right), replace(bad, rank=1, **right)
    assert believed(task, Outcome("ok", "", [good, bad])).status == "ok"
    outcome = believed(task, Outcome("ok", "", [good, replace(bad, **measured)]))
    assert outcome.status == "error"
    assert outcome.reason.startswith(said)


def test_more_flops_than_the_device_can_do_are_an_error():
    assert list(judge.of_speed(timed(1.0))) == []
    (said,) = judge.of_speed(timed(1.0, flops=12 * 10**18))
    assert said.startswith("1.2e+10 TFLOP/s is more than the device can do, which is ")


@pytest.mark.parametrize(
    ("flags", "precision", "flop"),
    [
        ("fma avx2", "fp32", 32),
        ("avx2 avx512f", "fp32", 64),
        ("avx2 avx512f amx_bf16", "bf16", 2048),
        ("asimd", "bf16", 2048),
    ],
)
def test_a_cpus_peak_is_what_its_widest_units_can_do(tmp_path, flags: str, precision: str, flop: int):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : fpu {flags} ssse3\n")
    most = judge.most_tflops_of_cpu(precision, cpuinfo)
    assert most == pytest.approx(os.cpu_count() * judge.GHZ * flop / 1000)


def test_a_spread_is_noisy_and_seen():
    steady, noisy = measured(timed(10.0, 10.5, 11.0)), measured(timed(10.0, 10.5, 13.0))
    assert (steady["noisy"], noisy["noisy"]) == (False, True)
    (column,) = (column for column in MEASURED if column.name == "step_ms_median")
    assert (column.text(steady), column.text(noisy)) == ("10.5", "~10.5")
