"""A simulated step on a cluster's clock: where everything but one thing is free, its time is known by hand."""

from dataclasses import replace

import pytest

from analysis.accounts import account_of
from analysis.accounts.letters import Letters
from bench.instruments.observe import Observed
from bench.simulation import simulate
from bench.simulation.streams import Streams
from conf import tiers
from conf.clock import COLLECTIVES, Clock, Group, computed
from conf.clusters import described
from conf.compose import configuration
from conf.groups import HERE
from conf.keys import ClusterConfig, Config
from conf.measurement import Entry, Predicted
from conf.resolve import resolve
from tests.cases import LAYOUTS, Case, config_of
from tests.ranks import on_ranks, standing_for
from tests.test_simulate import MODEL

FREE = {"rate": 1e18}
NOTHING = {
    "sources": "none: everything is free",
    **dict.fromkeys(("products", "attention_forward", "attention_backward", "host"), FREE),
    "kernels": {"other": FREE},
    "intra": {kind: {"8": FREE} for kind in COLLECTIVES},
}
LINKS = {kind: {"8": {"rate": 1 + n, "half": 1000}} for n, kind in enumerate(COLLECTIVES)}  # each another
SEQ_LEN = 512
ONE_AXIS = [
    Case("tp", tp=4),
    Case("tp_sp", tp=4, recompute="block"),
    Case("ulysses", ulysses=4, zero_stage=1),
    Case("ring", ring=4, zero_stage=1, kv="all_gather"),
    Case("zero", dp=4, zero_stage=0),
]
CASES = [
    *ONE_AXIS,
    Case("zero", dp=4, zero_stage=3),
    Case("ring", ring=4, zero_stage=1, recompute="block"),
    Case("usp", ulysses=2, ring=2, recompute="block", micro_batches=2),
    Case("odysseus", tp=2, ring=2),
    Case("ring", ring=4, backward="q", zero_stage=1),
    Case("ring", ring=4, inner=2, zero_stage=1),
    Case("mesh_attention", ring=4, inner=2, kv="all_gather"),
    Case("upipe", ulysses=4),
    Case("tsp", ring=4, kv="all_gather"),
]


def timed(clock: dict, case: Case, device: str = "cuda", layers: int = 2, **changes) -> tuple[Config, Observed]:
    """A step of a rank on a cluster with this clock."""
    config = config_of(case, {**MODEL, "n_layers": layers}, 2, changes.pop("seq_len", SEQ_LEN), "bf16_mixed")
    cluster = ClusterConfig(**{**described(str(HERE / "cluster" / "h100.yaml")), "clock": {**NOTHING, **clock}})
    config = replace(config, **{"device": device, "cluster": cluster, **changes})
    return config, simulate.simulate(config, lambda text: None)[0]


def of_process(process: int, clock: dict, case: Case, each: list[dict]) -> tuple[Config, Observed]:
    device = each[process].get("device", "cuda")
    with standing_for(case.world_size - 1, case.world_size, device):
        return timed(clock, case, **each[process])


def steps(clock: dict, case: Case, *each: dict) -> list[tuple[Config, Observed]]:
    """One for each of these changes."""
    return on_ranks(len(each), of_process, clock, case, list(each), grouped=False)


def step(clock: dict, case: Case, **changes) -> tuple[Config, Observed, Predicted]:
    ((config, observed),) = steps(clock, case, changes)
    assert isinstance(observed.predicted, Predicted)
    return config, observed, observed.predicted


def sending_us(config: Config, clock: Clock, entry: Entry) -> float:
    """All calls of one line of comm.csv, which are of the same size."""
    group = tiers.group_of(config, config.world_size - 1, entry.axis, entry.group_size, entry.kind)
    return entry.calls * clock.collective_us(entry.kind, group, entry.sent_bytes / entry.calls, "x")


@pytest.mark.parametrize("case", ONE_AXIS, ids=str)
def test_where_only_links_cost_a_step_is_what_it_sends(case: Case):
    """One axis sends one thing after the other, and there is nothing to hide it."""
    config, observed, predicted = step({"intra": LINKS}, case)
    clock = Clock.of({**NOTHING, "intra": LINKS}, "x")
    each = {entry.kind: 0.0 for entry in observed.comm}
    for entry in observed.comm:
        each[entry.kind] += sending_us(config, clock, entry) / 1000
    assert predicted.exposed == pytest.approx(each, rel=1e-9)
    assert predicted.step_ms == pytest.approx(sum(each.values()), rel=1e-6)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_where_only_products_cost_a_step_is_its_flops(case: Case, device: str):
    """Those of attention are apart; what is run again is computed again."""
    config, observed, predicted = step({"products": {"rate": 100}}, case, device=device)
    pairs = account_of(case.strategy).flops_of_attention(Letters.of(config, case.world_size - 1), backward=True)
    expected = (observed.flops - config.micro_batches * config.model.n_layers * pairs) / 100e9 * 1000
    again = predicted.step_ms / expected
    once = case.recompute == "none" and case.strategy != "upipe"  # which projects again in backward
    assert again == pytest.approx(1, rel=1e-3) if once else 1 < again < 4 / 3
    assert predicted.work["products"] == pytest.approx(predicted.step_ms, rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_where_only_attention_costs_a_step_is_its_pairs(case: Case):
    config, _, predicted = step({"attention_forward": {"rate": 1}, "attention_backward": {"rate": 1}}, case)
    letters, layers = Letters.of(config, case.world_size - 1), config.model.n_layers * config.micro_batches
    forward = account_of(case.strategy).flops_of_attention(letters, backward=False)
    both = account_of(case.strategy).flops_of_attention(letters, backward=True)
    again = forward if case.recompute == "block" else 0
    assert predicted.work["attention"] == pytest.approx(layers * (both + again) / 1e6, rel=1e-9)
    assert predicted.laps["forward"] == pytest.approx(layers * forward / 1e6, rel=1e-6)


def test_whole_tiles_on_the_diagonal_are_computed():
    case = Case("single")
    clock = {"attention_forward": {"rate": 1}}
    of_tile = {tile: step({**clock, "tile": tile}, case)[2].work["attention"] for tile in (1, 256)}
    assert of_tile[256] / of_tile[1] == pytest.approx(computed(SEQ_LEN, 256) / computed(SEQ_LEN, 1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cpu_waits_for_what_a_gpu_has_beside_its_work(case: Case):
    """The same work. On a CPU nothing is beside it: as much is waited for, however long it computes."""
    clock = {"products": {"rate": 50}, "intra": {kind: {"8": {"rate": 5}} for kind in COLLECTIVES}}
    on_gpu, on_cpu = (step(clock, case, device=device, layers=4)[2] for device in ("cuda", "cpu"))
    slower = step({**clock, "products": {"rate": 5}}, case, device="cpu", layers=4)[2]
    assert on_gpu.work == pytest.approx(on_cpu.work)
    waited = [sum(each.exposed.values()) for each in (on_gpu, on_cpu, slower)]
    assert waited[1] == pytest.approx(waited[2])
    by_fsdp2 = case.zero_stage >= 2 and case.strategy not in ("tp", "tp_sp")
    assert waited[0] < 0.8 * waited[1] if by_fsdp2 else waited[0] <= waited[1] * (1 + 1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hop_is_hidden_behind_the_block_before_it(layout: str):
    """As long as that takes longer: but for a gradient's last hop home, one of seven. With no attention nothing is."""
    case = Case("ring", ring=8, layout=layout, zero_stage=1)

    def waits(gflops: float) -> tuple[float, float, float]:
        attention = {f"attention_{way}": {"rate": gflops} for way in ("forward", "backward")}
        config, observed, predicted = step({**attention, "intra": {**NOTHING["intra"], "p2p": LINKS["p2p"]}}, case)
        clock = Clock.of({**NOTHING, "intra": LINKS}, "x")
        hops = [entry for entry in observed.comm if entry.kind == "p2p"]
        ms = {hop.dtype: 0.0 for hop in hops}
        for hop in hops:
            ms[hop.dtype] += sending_us(config, clock, hop) / 1000
        return predicted.exposed["p2p"], ms["float32"], sum(ms.values())

    hidden, gradients, _ = waits(0.01)
    assert hidden == pytest.approx(gradients / 7)
    exposed, _, all_hops = waits(1e9)
    assert exposed == pytest.approx(all_hops)


@pytest.mark.parametrize(
    "case",
    [
        Case("ring", ring=8),
        Case("ring", ring=16, inner=4, backward="q"),
        Case("usp", ulysses=2, ring=4, recompute="block"),
        Case("tp_sp", tp=4),
    ],
    ids=str,
)
def test_what_is_alike_takes_as_often_as_long(case: Case):
    """Layers and hops that are counted and not run, on a clock on which everything costs."""
    clock = described(str(HERE / "cluster" / "h100.yaml"))["clock"]
    how = {"layers": 9, "seq_len": 4096}
    (_, short), (_, full) = steps(clock, case, how, {**how, "full_depth": True})
    for part in ("laps", "work", "exposed"):
        assert getattr(short.predicted, part) == pytest.approx(getattr(full.predicted, part), rel=0.005, abs=0.005)


def test_micro_batches_take_one_after_the_other():
    clock = described(str(HERE / "cluster" / "h100.yaml"))["clock"]
    once, twice = (step(clock, Case("ring", ring=4, micro_batches=n))[2] for n in (1, 2))
    assert twice.laps["optimizer"] == pytest.approx(once.laps["optimizer"], rel=0.1)
    assert twice.work["products"] == pytest.approx(once.work["products"], rel=1e-6)  # half as much, twice


def test_repeated_is_as_if_it_were_written_out():
    """What is in flight from one time to the next included."""

    def hop(streams: Streams, n: int, before: int) -> None:
        streams.launch("compute", "ring", 2 * n, "p2p", 5)
        streams.take("compute", "attention", 3)
        streams.wait("compute", before)
        streams.launch("compute", "ring", 2 * n + 1, "p2p", 7)
        streams.wait("compute", 2 * n)

    written, counted = Streams(1, ahead=True), Streams(1, ahead=True)
    for streams in (written, counted):
        streams.launch("compute", "ring", 1, "p2p", 9)
    for n in range(1, 6):
        hop(written, n, 2 * n - 1)
    with counted.repeated(5):
        hop(counted, 1, 1)
    assert counted.main == written.main
    assert counted.exposed == written.exposed
    assert counted.moments["ring"] == written.moments["ring"]


def test_what_the_clock_does_not_know_is_said_and_nothing_is_predicted():
    intra = {kind: rate for kind, rate in NOTHING["intra"].items() if kind != "p2p"}
    ((_, observed),) = steps({"intra": intra}, Case("ring", ring=4), {})
    assert (
        observed.predicted == "cluster=H100-80G-SXM: how fast p2p is inside a node was neither measured nor published"
    )
    config, _, _ = step({}, Case("ring", ring=4))
    across = replace(config, cluster=replace(config.cluster, gpus_per_node=2))
    assert tiers.group_of(across, 3, "ring", 4, "p2p") == Group(4, 2, leaves=1.0)
    assert tiers.group_of(across, 3, "ring", 4, "all_gather") == Group(4, 2, leaves=0.5)
    assert tiers.group_of(across, 3, "ring", 4, "all_to_all") == Group(4, 2, leaves=2 / 3, stays=1 - 2 / 3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_clock_changes_nothing_else(case: Case):
    """Memory, bytes and FLOPs are those of a step that nobody times."""
    config, with_clock, _ = step({}, case)
    untimed = {"cluster": replace(config.cluster, clock=None)}
    ((_, without),) = steps({}, case, untimed)
    assert without.predicted is None
    assert (without.peaks, without.comm, without.flops) == (with_clock.peaks, with_clock.comm, with_clock.flops)


GATHERS_AS_LONG = "strategy=ulysses world_size=32 seq_len=16384 model=llama3_8b model.n_layers=20 precision=bf16_mixed"


def asked_or_full(process: int) -> Observed:
    words = [*GATHERS_AS_LONG.split(), "cluster=a100", "device=cuda", "mode=simulate", f"full_depth={process == 1}"]
    config = resolve(configuration(words)).config
    config.attention.kernel = "sdpa"
    with standing_for(0, 32, "cuda"):
        return simulate.simulate(config, lambda text: None)[0]


def test_gathers_as_long_as_what_hides_them_are_followed_until_a_layer_takes_what_the_last_one_took():
    """Here the sixth layer takes 6 % longer than the fifth, and those after it as long."""
    asked, full = on_ranks(2, asked_or_full, grouped=False)
    assert asked.predicted.step_ms == pytest.approx(full.predicted.step_ms, rel=1e-3)
    assert simulate.in_order(asked.comm) == simulate.in_order(full.comm)
