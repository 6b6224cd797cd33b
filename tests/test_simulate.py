"""What simulate leaves out changes nothing: layers and hops that are alike, and what a fake operation answers again."""

from dataclasses import replace
from unittest.mock import patch

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.app import records
from bench.app import sweep as app
from bench.app.row import run
from bench.instruments.observe import Observed
from bench.ranks.launch import launch
from bench.ranks.task import Outcome, Task
from bench.simulation import simulate
from bench.simulation.fit import granule, longest
from conf.keys import Config
from conf.measurement import Peak, Rank
from tests.cases import LAYOUTS, Case, config_of
from tests.jobs import job
from tests.ranks import on_ranks, standing_for

MODEL = {"dim": 64, "n_layers": 9, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 96, "vocab_size": 640}
DEEP = [
    Case("single"),
    Case("tp", tp=4),
    Case("tp_sp", tp=4, recompute="block"),
    Case("ulysses", ulysses=4),
    Case("zero", dp=4, zero_stage=2),
    Case("zero", dp=4, zero_stage=1),
    Case("ring", ring=4, zero_stage=0),
    Case("usp", ulysses=2, ring=2, recompute="block", loss_chunks=3),
    Case("odysseus", tp=2, ring=2, mlp_chunks=2),
    Case("tp_usp", tp=2, ulysses=2, recompute="block"),
    Case("tsp", ring=4, kv="all_gather", recompute="block"),
    Case("upipe", ulysses=4, recompute="selective"),
]
LONG_RINGS = [
    *(Case("ring", ring=8, layout=layout, recompute="block") for layout in LAYOUTS),
    *(Case("usp", ulysses=2, ring=5, layout=layout) for layout in LAYOUTS),
    Case("tp_usp", tp=2, ring=6, layout="striped", recompute="block"),
    Case("odysseus", tp=2, ring=7),
    *(Case("ring", ring=12, layout=layout, inner=2) for layout in LAYOUTS),
    *(Case("ring", ring=12, layout=layout, inner=3, backward="q") for layout in ("contiguous", "zigzag")),
    Case("ring", ring=8, layout="striped", backward="q"),
    Case("tsp", ring=8, kv="all_gather"),
    Case("tsp", dp=2, ring=7, kv="all_gather", recompute="block"),
]


def short_or_full(process: int, case: Case, sizes: dict, seq_len: int, rank: int) -> Observed:
    """One process leaves out what is alike, and another leaves out nothing."""
    with standing_for(rank, case.world_size):
        config = config_of(case, sizes, 2, seq_len, "bf16_mixed", full_depth=process == 1)
        return simulate.simulate(config, lambda text: None)[0]


def check_equal(case: Case, short: Observed, full: Observed) -> None:
    assert simulate.in_order(short.comm) == simulate.in_order(full.comm)
    assert (short.flops, short.after_forward, short.peak) == (full.flops, full.after_forward, full.peak)


@pytest.mark.parametrize(("case", "seq_len"), [*((case, 2048) for case in DEEP), (DEEP[3], 64), (DEEP[7], 64)], ids=str)
def test_a_deep_model_is_what_shallow_ones_foretell(case: Case, seq_len: int):
    """Short sequences have their peak where weights are gathered, long ones where activations are most."""
    last = case.world_size - 1
    check_equal(case, *on_ranks(2, short_or_full, case, MODEL, seq_len, last, grouped=False))


@pytest.mark.parametrize("rank", ["first", "last"])
@pytest.mark.parametrize("case", LONG_RINGS, ids=str)
def test_hops_that_are_alike_count_as_often_as_they_are(case: Case, rank: str):
    sizes, seq_len = {**MODEL, "n_layers": 2}, 40 * 8 * case.world_size
    place = 0 if rank == "first" else case.world_size - 1
    check_equal(case, *on_ranks(2, short_or_full, case, sizes, seq_len, place, grouped=False))


def remembered_or_not(process: int, case: Case) -> Observed:
    """A step on the fake tensors of this project, or on torch's own."""
    ours, torchs = simulate.RememberingFakeMode, lambda: FakeTensorMode(allow_non_fake_inputs=True)
    with standing_for(0, case.world_size), patch.object(simulate, "RememberingFakeMode", (ours, torchs)[process]):
        return simulate.step_of(config_of(case, MODEL, 2, 64, "bf16_mixed"), 2)


@pytest.mark.parametrize("case", DEEP, ids=str)
def test_remembered_answers_are_torchs(case: Case):
    check_equal(case, *on_ranks(2, remembered_or_not, case, grouped=False))


def test_an_unforetold_depth_is_run(monkeypatch):
    """If the third depth is not what two foretell, no extrapolation is believed."""
    ran = []
    step_of = simulate.step_of

    def other_at_the_third(config: Config, n_layers: int) -> Observed:
        ran.append(n_layers)
        observed = step_of(config, n_layers)
        observed.flops += n_layers == simulate.DEPTHS[2]
        return observed

    monkeypatch.setattr(simulate, "step_of", other_at_the_third)
    config = config_of(Case("single"), MODEL, 2, 64)
    assert not simulate.simulate(config, lambda text: None)[1]
    assert ran == [*simulate.DEPTHS, MODEL["n_layers"]]


def test_a_sweep_runs_the_third_depth_once_for_lengths_that_differ():
    """Not again for another length or batch, but for whatever else is different, and as long as it is not foretold."""
    asked = []

    def ends(task: Task, progress) -> Outcome:
        asked.append(task.known)
        return Outcome("ok", "", [Rank([], 0, Peak(), 0, None, "", "", foretold=task.config.zero_stage == 3)])

    families = app.Families(ends)
    for change in (
        {},
        {"seq_len": 128},
        {"batch_size": 4},
        {"recompute": "block"},
        {"zero_stage": 2},
        {"zero_stage": 2},
    ):
        families(Task(replace(config_of(Case("zero", dp=4), MODEL, 2, 64), **change)), "")
    assert asked == [False, True, True, False, False, False]


@pytest.mark.parametrize("curve", [lambda s: 100 + 7 * s, lambda s: s * s, lambda s: max(5000, 3 * s), lambda s: 10**9])
def test_the_longest_sequence_is_found(curve):
    config = config_of(Case("ring", ring=4), MODEL, 1, 64)
    assert granule(config) == 8
    found = longest(config, 10_000, curve)
    assert found % 8 == 0
    assert found == 0 or curve(found) <= 10_000
    assert curve(found + 8) > 10_000


@pytest.mark.slow
def test_what_does_not_fit_says_so_and_what_would(tmp_path, monkeypatch):
    """llama3_8b's state alone is over 80 GB on 2 ranks; on 32 it depends on the sequence."""
    monkeypatch.setattr(records, "RUNS", tmp_path)

    def row_of(*overrides: str, rerun: str = "all") -> dict:
        return run(job(*overrides), rerun, app.Families(launch))

    big = [
        "mode=simulate",
        "device=cuda",
        "model=llama3_8b",
        "precision=bf16_mixed",
        "cluster=h100",
        "strategy=ulysses",
    ]
    never = row_of(*big, "world_size=1", "search=max_seq_len", "model.n_layers=64")
    assert (never["status"], never["max_seq_len"]) == ("oom", 0)
    row = row_of(*big, "world_size=32", "seq_len=4194304", "model.n_layers=5")
    assert row["status"] == "oom"
    assert f"{row['peak_bytes'] / 2**30:.1f} GiB and a H100-80G-SXM has 80.0 GiB, of which 1.5 GiB is" in row["reason"]
    asked = row_of(*big, "world_size=32", "seq_len=4194304", "search=max_seq_len", "model.n_layers=5")
    assert (asked["status"], asked["seq_len"]) == ("ok", asked["max_seq_len"])
    assert asked["reason"] == f"seq_len={asked['max_seq_len']} is the longest that fits"
    kept = row_of(*big, "world_size=32", "seq_len=4194304", "search=max_seq_len", "model.n_layers=5", rerun="none")
    assert kept["kept"]
    assert kept["seq_len"] == asked["seq_len"]
    at = row_of(*big, "world_size=32", f"seq_len={asked['max_seq_len']}", "model.n_layers=5")
    assert (at["status"], at["losses"]) == ("ok", [])
    assert at["peak_bytes"] <= at["capacity_bytes"] - at["context_bytes"] < row["peak_bytes"]
    assert (at["fits"], asked["fits"], row["fits"]) == ("tight", "tight", "oom")
    for column in ("peak_bytes", "activation_bytes", "comm_bytes", "analytic_comm_bytes", "flops_per_rank"):
        assert asked[column] == at[column], column
    assert row_of(*big, "world_size=32", "seq_len=65536", "model.n_layers=5")["fits"] == "ok"
    assert at["mode_seconds"] > 0
    assert at.get("step_ms_median") is None


def at_the_end_of_backward(process: int, case: Case) -> tuple[int, int]:
    """Bytes that are neither state nor kept activations, and parameters of this rank: of 2 layers, or of 6."""
    config = config_of(case, MODEL, 4, 64)
    with standing_for(0, case.world_size):
        peak = simulate.step_of(config, (2, 6)[process]).peaks["backward embed"]
    return peak.other, peak.params


@pytest.mark.parametrize("case", [*DEEP[3:4], Case("zero", dp=4), Case("odysseus", tp=4), *DEEP[7:]], ids=str)
def test_what_zero_gathers_does_not_pile_up(case: Case):
    """Gradients as large as the model's would, if every unit of FSDP2 were a root of its own."""
    (short, few), (deep, many) = on_ranks(2, at_the_end_of_backward, case, grouped=False)
    assert deep - short < 0.1 * (many - few) * case.world_size
