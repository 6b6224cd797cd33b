"""A step in closed form and its replay, of the same clock: within 5 %. Both on arrays and on numbers alike."""

from dataclasses import replace

import numpy as np
import pytest

from analysis import predict
from analysis.prices import Places
from bench.ranks.unlike import unlike_ranks
from bench.simulation import simulate
from conf import tiers
from conf.compose import HERE, configuration
from conf.keys import Config
from conf.measurement import Predicted
from conf.resolve import resolve
from conf.words import Invalid
from tests.ranks import on_ranks, standing_for

BOTH = 0.05  # what one predictor may be from the other
LARGE = "mode=simulate device=cuda cluster=h100 precision=bf16_mixed model=llama3_8b model.n_layers=4 world_size=64"
LARGE += " seq_len=131072 batch_size=4 loss.chunks=8"
CASES = [
    "strategy=zero recompute=block",
    "strategy=zero zero_stage=1 micro_batches=1 recompute=selective",
    "strategy=tp mesh.tp=8",
    "strategy=tp_sp mesh.tp=8 recompute=block",
    "strategy=tp_sp mesh.tp=8 mlp.chunks=4 placement=tp_outer",
    "strategy=ulysses mesh.ulysses=16 recompute=selective zero_stage=2",
    "strategy=ulysses mesh.ulysses=32 ulysses.packed=true recompute=block batch_size=8 micro_batches=4",
    "strategy=ulysses mesh.ulysses=4 mesh.dp=4 world_size=16 ulysses.chunks=2",
    "strategy=upipe mesh.ulysses=32 recompute=block",
    "strategy=upipe mesh.ulysses=4 mesh.dp=4 world_size=16 ulysses.stages=4 recompute=selective zero_stage=1",
    "strategy=ring recompute=block",
    "strategy=ring ring.layout=contiguous ring.grad_dtype=same zero_stage=0",
    "strategy=ring ring.layout=striped ring.kv=all_gather",
    "strategy=ring ring.inner=8 recompute=block",
    "strategy=ring ring.backward=q",
    "strategy=ring ring.backward=q ring.inner=8 ring.grad_dtype=same",
    "strategy=usp mesh.ulysses=8 ring.inner=2 placement=ring_inner",
    "strategy=ring ring.cycles=all model.n_kv_heads=32",
    "strategy=mesh_attention recompute=block",
    "strategy=mesh_attention ring.inner=8 model.n_kv_heads=32",
    "strategy=mesh_attention ring.inner=4 mesh.dp=4 ring.layout=contiguous",
    "workload=attention strategy=mesh_attention ring.inner=2",
    "strategy=usp mesh.ulysses=8 recompute=block offload=activations",
    "strategy=usp mesh.ulysses=4 placement=ring_inner grad_dtype=same",
    "strategy=tp_usp mesh.tp=4 mesh.ulysses=4 recompute=block",
    "strategy=odysseus mesh.tp=8 mesh.ring=8 recompute=selective",
    "strategy=odysseus mesh.tp=16 mesh.ring=1 mesh.dp=4",
    "strategy=tsp recompute=block seq_len=524288",
    "strategy=tsp mesh.ring=16 mesh.dp=4 recompute=selective",
    "strategy=tsp world_size=16 zero_stage=1 batch_size=2 micro_batches=2 grad_dtype=same",
    "workload=attention strategy=usp mesh.ulysses=8 ring.layout=striped",
    "workload=attention strategy=upipe mesh.ulysses=8 mesh.dp=4 world_size=32",
    "workload=attention strategy=ulysses mesh.ulysses=16 mesh.dp=4 direction=forward",
]


def config_of(words: str) -> Config:
    return resolve(configuration([*LARGE.split(), *words.split()])).config


def replayed(process: int, configs: list[Config]) -> list:
    """Of the rank that takes longest."""
    return [
        max((replay(config, rank) for rank in unlike_ranks(config)), key=lambda of: of.step_ms) for config in configs
    ]


def replay(config: Config, rank: int) -> Predicted:
    with standing_for(rank, config.world_size, config.device):
        return simulate.simulate(config, lambda text: None)[0].predicted


@pytest.fixture(scope="module")
def found():
    """Of every case, what the replay and what the closed form says."""
    configs = {words: config_of(words) for words in CASES}
    replays = {words: on_ranks(1, replayed, [config], grouped=False)[0][0] for words, config in configs.items()}
    return {words: (replays[words], predict.of_config(config)) for words, config in configs.items()}


@pytest.mark.parametrize("words", CASES)
def test_both_predictors_agree(words: str, found):
    replay, times = found[words]
    assert times.step == pytest.approx(replay.step_ms, rel=BOTH)
    for lap in ("forward", "backward", "optimizer"):
        assert getattr(times, lap) == pytest.approx(replay.laps.get(lap, 0.0), rel=BOTH), lap
    for part in ("products", "attention"):
        assert times.parts[part] == pytest.approx(replay.work.get(part, 0.0), rel=0.001), part


def test_parts_and_what_is_exposed_make_up_the_step(found):
    for _, times in found.values():
        whole = sum(times.parts.values()) + sum(times.exposed.values())
        assert whole == pytest.approx(times.forward + times.backward + times.optimizer)
        assert times.step == pytest.approx(whole)


def test_an_array_of_configurations_is_each_of_them():
    """Degrees that differ, of one strategy: one element each, as if alone."""
    words = [f"strategy=usp mesh.dp=2 mesh.ulysses={u} mesh.ring={32 // u} recompute=block" for u in (2, 4, 8, 16)]
    steps = [predict.step_of(config_of(each)) for each in words]
    letters = {name: np.array([getattr(step.s, name) for step in steps]) for name in ("u", "r", "rho")}
    lines = {axis: [line for step in steps for line in step.places[axis].kinds] for axis in steps[0].places}
    places = {axis: Places(*np.array(of).T) for axis, of in lines.items()}
    together = replace(steps[0], s=replace(steps[0].s, **letters), places=places, known={}).times()
    for i, step in enumerate(steps):
        alone = step.times()
        for lap in ("forward", "backward", "optimizer"):
            assert np.broadcast_to(getattr(together, lap), 4)[i] == pytest.approx(float(getattr(alone, lap))), lap


@pytest.mark.parametrize("placement", ["ulysses_inner", "ring_inner", "tp_outer"])
@pytest.mark.parametrize("kind", ["all_gather", "all_to_all", "p2p"])
def test_groups_lie_on_nodes_as_the_tiers_say(placement: str, kind: str):
    config = config_of(f"strategy=tp_usp mesh.tp=4 mesh.ulysses=4 mesh.ring=2 mesh.dp=2 placement={placement}")
    step = predict.step_of(config)
    for axis in ("dp", "tp", "ulysses", "ring", "zero", "world"):
        ((ranks, stride),) = step.places[axis].kinds
        assert step.on.group(kind, ranks, stride) == tiers.group_of(config, 0, axis, ranks, kind), axis


def test_a_time_needs_a_machine_whose_speed_is_known():
    with pytest.raises(Invalid, match="cluster is null"):
        predict.of_config(resolve(configuration(["strategy=ring"])).config)
    with pytest.raises(Invalid, match="cluster=L20-48G: its speeds were neither measured nor published"):
        predict.of_config(resolve(configuration(["strategy=ring", "cluster=l20"])).config)


@pytest.mark.parametrize(("words", "messages"), [("", 3 * 4), ("zero_stage=2", 2 * 4), ("zero_stage=1", 0)])
def test_the_hosts_time_around_messages_of_weights_is_in_both(tmp_path, words, messages):
    """Of two blocks and both ends, gathered in forward, in backward again, and their gradients reduced."""
    clock = (HERE / "cluster" / "h100.yaml").read_text()
    configs = []
    for group_us in (0, 500):
        file = tmp_path / f"{group_us}.yaml"
        file.write_text(f"{clock.rstrip()}\n  group_us: {group_us}\n")
        small = f"mode=simulate device=cpu world_size=2 batch_size=2 strategy=zero cluster={file} {words}"
        configs.append(resolve(configuration(small.split())).config)
    (replays,) = on_ranks(1, replayed, configs, grouped=False)
    for without, with_it in (replays, [predict.of_config(config) for config in configs]):
        took = [getattr(each, "step_ms", None) or float(each.step) for each in (without, with_it)]
        assert took[1] - took[0] == pytest.approx(0.5 * messages)
