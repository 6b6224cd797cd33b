"""Peers are the same model as ours, as far as they are right; where they are not, their row says so."""

import csv
import importlib.util
import json
import statistics
from dataclasses import replace

import pytest
import torch

import strategies
from analysis.report import write
from bench.app import judge, records
from bench.app import sweep as app
from bench.workloads.attention import AttentionAlone
from conf.compose import configuration
from conf.keys import keys
from conf.meshes import PEERS, STRATEGIES, footing_of
from conf.resolve import resolve
from strategies.base import Options
from strategies.ops.kernels import pick_kernel
from tests import instruments, reference
from tests.cases import HEADS, Case, sized
from tests.jobs import job
from tests.ranks import on_ranks
from tests.test_parity import CLOSE, run_all_heads

MODELS = [Case("ddp", dp=4), Case("fsdp2", dp=4), Case("torch_tp", tp=2), Case("torch_tp", dp=2, tp=2)]
MODELS += [Case("torch_tp", dp=2, tp=2, placement="tp_outer")]
ATTENTION = [
    Case("torch_cp", ring=4),
    Case("torch_cp", ring=2, dp=2, layout="contiguous"),
    Case("deepspeed_ulysses", ulysses=4),
    Case("yunchang", ulysses=4),
    Case("yunchang", ulysses=2, ring=2),
    Case("yunchang", ring=4, layout="striped"),
]


def needs(case: Case) -> None:
    package = PEERS[case.strategy].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: ./run.sh peers")


def test_a_peer_answers_to_strategies_of_ours():
    for name, peer in PEERS.items():
        assert {peer.ours, *peer.also} <= set(STRATEGIES)
        assert issubclass(strategies.load(name), strategies.load(peer.ours))


ONE_VALUE = {
    "strategy=tsp": [],
    "strategy=tsp ring.kv=all_gather": [],
    "strategy=tsp ring.kv=needed mlp.chunks=2": ["tsp has ring.kv=all_gather alone", "tsp has mlp.chunks=1 alone"],
    "strategy=torch_tp zero_stage=1": ["torch_tp has zero_stage=3 alone"],
}


@pytest.mark.parametrize("words", ONE_VALUE)
def test_another_value_than_the_one_that_there_is_gets_a_note(words: str):
    resolved = resolve(configuration([*words.split(), "world_size=4", "model.n_kv_heads=4"]))
    assert resolved.notes == ONE_VALUE[words]
    for path, value in footing_of(resolved.config.strategy.name).fixed.items():
        assert keys()[path].of(resolved.config) == value


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_a_peers_model_is_the_unsharded_model(case: Case, tmp_path):
    """Loss and every gradient, on sizes that its sharding divides."""
    sizes = {"vocab_size": 64, "intermediate_size": 96}
    folders = {
        heads: reference.make_checkpoint(str(tmp_path / heads), num_key_value_heads=n, **sizes)
        for heads, n in HEADS.items()
    }
    batch = reference.make_batch(3, 64, None)
    results = on_ranks(case.world_size, run_all_heads, case, folders, {3: batch})[0]
    for heads, folder in folders.items():
        judge = reference.hugging_face(folder, *batch)
        reference.assert_equal(results[heads, 3], judge, CLOSE, f"{case}, {heads}")


def train_some(rank: int, case: Case, folder: str) -> list[float]:
    """The losses of four steps of AdamW with clipping."""
    training = reference.build(case, folder)
    losses = []
    for step in range(4):
        batch = training.place(*reference.make_batch(3, 64, None, seed=step))
        loss = training.forward(batch)
        training.backward(loss)
        training.update()
        losses += training.global_loss(loss.detach()[None])
    return losses


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_a_peer_trains_as_ours_does(case: Case, tmp_path):
    folder = reference.make_checkpoint(str(tmp_path), vocab_size=64, intermediate_size=96)
    theirs = on_ranks(case.world_size, train_some, case, folder)[0]
    ours = on_ranks(case.world_size, train_some, replace(case, strategy=PEERS[case.strategy].ours), folder)[0]
    assert theirs == pytest.approx(ours, rel=1e-5)


def errors(rank: int, case: Case, n_kv_heads: int, dtype: torch.dtype) -> dict[str, float]:
    sizes = sized(dim=64, n_layers=1, n_heads=8, n_kv_heads=n_kv_heads, ffn_dim=1, vocab_size=1)
    options = Options(pick_kernel("auto", "cpu", dtype, sizes.head_dim), dtype, **case.options)
    alone = AttentionAlone(sizes, strategies.build(case.strategy, case.degrees, options), 2, 64)
    alone.time_the_whole()
    return alone.errors()


@pytest.mark.parametrize("n_kv_heads", [8, 4])
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_a_peers_attention_is_the_whole_attention(case: Case, n_kv_heads: int):
    needs(case)
    found = on_ranks(4, errors, case, n_kv_heads, torch.bfloat16)
    assert all(errors.keys() == {"output", "grad of q", "grad of k", "grad of v"} for errors in found)
    assert judge.inaccurate(found, "bf16") is None


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_what_a_peer_gets_wrong_is_said(case: Case):
    """yunchang's ring accumulates into an alias where tensors are fp32 already."""
    needs(case)
    said = judge.inaccurate(on_ranks(4, errors, case, 8, torch.float32), "fp32")
    if case == Case("yunchang", ring=4, layout="striped"):
        assert said.startswith("wrong: grad of q, grad of k, grad of v are up to ")
    elif case.strategy != "yunchang":
        assert said is None


def sent(rank: int, *args) -> float:
    return sum(line.sent_bytes for line in instruments.observed(*instruments.train(*args)).comm)


@pytest.mark.parametrize("case", [*MODELS, ATTENTION[0]], ids=str)
def test_a_peers_traffic_is_counted(case: Case):
    """DTensor's functional collectives too. torch_tp keeps what it gathered, where tp_sp gathers it again."""
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 96, "vocab_size": 64}
    stage = 0 if case.strategy == "ddp" else 3
    ours = replace(case, strategy=PEERS[case.strategy].ours, zero_stage=stage)

    they_sent, we_sent = (on_ranks(case.world_size, sent, each, sizes, 4, 64)[0] for each in (case, ours))
    assert 0.75 * we_sent < they_sent < 2 * we_sent, f"{they_sent / we_sent:.2f} times as much"


@pytest.mark.slow
def test_a_race_pairs_rows_that_differ_in_the_strategy_alone(tmp_path, monkeypatch):
    """The ratio is the median of the rounds' ratios; DDP is stage 0 whatever is asked, and so is its pair."""
    monkeypatch.setattr(records, "RUNS", tmp_path)
    choices = ["strategy=zero", "strategy=fsdp2", "strategy=zero zero_stage=0", "strategy=ddp", "strategy=tp_sp"]
    rows = app.run_all([job(*choice.split(), "rounds=3", "data=random", "name=race") for choice in choices])
    write(tmp_path / "race")
    with open(tmp_path / "race" / "report" / "race.csv", newline="") as file:
        lines = {line["theirs"]: line for line in csv.DictReader(file)}
    rounds = [json.loads((tmp_path / "race" / row["run_id"] / "record.json").read_text())["round_ms"] for row in rows]
    assert lines.keys() == {"fsdp2", "ddp"}
    for peer, ours, theirs in (("fsdp2", 0, 1), ("ddp", 2, 3)):
        ratios = [their_ms / our_ms for their_ms, our_ms in zip(rounds[theirs], rounds[ours], strict=True)]
        assert float(lines[peer]["ratio"]) == statistics.median(ratios)
        assert (float(lines[peer]["least"]), float(lines[peer]["most"])) == (min(ratios), max(ratios))
    page = (tmp_path / "race" / "report" / "index.html").read_text()
    assert "Ours and theirs" in page
    assert "fsdp2 takes " in page
