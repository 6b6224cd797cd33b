"""What advise prices is what simulate holds, and what it says is in the numbers."""

import re

import pytest
import yaml

from analysis import UserError, advise
from analysis.accounts import account_of
from analysis.accounts.letters import OF_AXES, Letters
from analysis.candidates import Scenario
from analysis.peak import Held
from analysis.predict import of_config
from bench.simulation import simulate
from conf.compose import configuration
from conf.files import read_yaml
from conf.groups import HERE
from conf.keys import Config
from conf.meshes import STRATEGIES
from conf.resolve import resolve
from tests.ranks import on_ranks, standing_for

WEIGHED = advise.WEIGHED  # what memory may be off
JOB = ["model=llama3_8b", "cluster=h100", "world_size=16", "seq_len=65536", "batch_size=2"]
HELD = [
    "strategy=zero recompute=block",
    "strategy=tp mesh.tp=8 recompute=block",
    "strategy=tp_sp mesh.tp=8 recompute=selective",
    "strategy=tp_sp mesh.tp=8 recompute=none mlp.chunks=4 batch_size=1",
    "strategy=ulysses mesh.ulysses=16 recompute=none zero_stage=2",
    "strategy=ulysses mesh.ulysses=8 mesh.dp=2 recompute=block zero_stage=1",
    "strategy=ulysses mesh.ulysses=16 recompute=block offload=activations grad_dtype=same",
    "strategy=upipe mesh.ulysses=16 recompute=none zero_stage=1",
    "strategy=upipe mesh.ulysses=8 mesh.dp=2 recompute=block mlp.chunks=8",
    "strategy=ring recompute=block ring.layout=contiguous",
    "strategy=ring recompute=block ring.kv=all_gather",
    "strategy=ring recompute=block ring.inner=8 ring.backward=q model.n_kv_heads=32",
    *(f"strategy=mesh_attention ring.inner={c} recompute=block" for c in (1, 4, 16)),
    "strategy=mesh_attention ring.inner=4 ring.layout=contiguous recompute=block ring.grad_dtype=same",
    "strategy=mesh_attention ring.inner=8 mesh.dp=2 recompute=selective",
    "strategy=usp mesh.ulysses=8 recompute=selective grad_dtype=same zero_stage=0",
    "strategy=tp_usp mesh.tp=4 mesh.ulysses=2 recompute=block",
    "strategy=tp_usp mesh.tp=2 mesh.ulysses=2 recompute=none loss.chunks=1",
    "strategy=odysseus mesh.tp=4 mesh.ring=4 recompute=block",
    "strategy=odysseus mesh.tp=8 mesh.ring=1 mesh.dp=2 recompute=none zero_stage=2",
    "strategy=tsp recompute=block",
    "strategy=tsp recompute=selective grad_dtype=same ring.layout=striped",
    "strategy=tsp mesh.dp=2 recompute=none zero_stage=2",
    "strategy=tsp recompute=block zero_stage=0 offload=activations",
]


def config_of(words: str) -> Config:
    return resolve(configuration(["mode=simulate", *advise.AS_TRAINED, *JOB, *words.split()])).config


def simulated(process: int, config: Config) -> int:
    with standing_for(config.world_size - 1, config.world_size, config.device):
        return simulate.simulate(config, lambda text: None)[0].peak.total


@pytest.mark.parametrize("words", HELD)
def test_a_rank_holds_what_its_account_says(words: str):
    config = config_of(words)
    (counted,) = on_ranks(1, simulated, config, grouped=False)
    account = account_of(config.strategy.name)
    held = Held(account, Letters.of(config), config.offload != "none").peak
    assert held == pytest.approx(counted, rel=WEIGHED)


@pytest.fixture(scope="module")
def found():
    return advise.advice(JOB)


def test_every_row_is_what_its_configuration_is_alone(found):
    """Priced and weighed together with all others, and by itself from the command that simulates it."""
    for _, row in found.asked.sample(40, random_state=0).iterrows():
        config = resolve(configuration(advise.command(found, JOB, row))).config
        assert row.step_ms == pytest.approx(float(of_config(config).step)), advise.label(row)
        held = Held(account_of(row.strategy), Letters.of(config)).peak
        assert row.peak_bytes == pytest.approx(float(held)), advise.label(row)
        assert {letter: row[letter] for letter in OF_AXES.values()} == {
            letter: getattr(config.mesh, axis) or 1 for axis, letter in OF_AXES.items()
        }


def test_no_configuration_stands_twice(found):
    keys = ["strategy", *OF_AXES.values(), "zero_stage", "recompute", "placement", "layout", "inner", "queries"]
    assert not found.asked.duplicated(keys).any()
    assert {*found.asked.strategy} == set(STRATEGIES) - {"single"}
    assert (found.asked.dp * found.asked.tp * found.asked.u * found.asked.r == 16).all()


def test_the_best_fit_and_nothing_that_fits_is_faster(found):
    fits = found.asked[found.asked.peak_bytes <= found.free]
    assert found.best.step_ms.iloc[0] == fits.step_ms.min()
    assert found.best.step_ms.is_monotonic_increasing
    assert len(found.best) == 10
    assert (found.best.peak_bytes <= 78.5 * 2**30).all()


def test_on_the_front_time_is_paid_for_memory(found):
    front = found.front
    assert front.step_ms.is_monotonic_increasing
    assert (front.peak_bytes.diff().dropna() < 0).all()
    for _, row in front.iterrows():
        better = found.asked[found.asked.fits & (found.asked.step_ms < row.step_ms)]
        assert (better.peak_bytes > row.peak_bytes).all()


def test_every_other_strategy_has_its_reason(found):
    said = dict(line.split(": ", 1) for line in found.others)
    for name in set(found.space.strategies) - set(found.best.strategy):
        assert re.search(r"GiB on a rank|slower|would do|no mesh", said[name]), said[name]
    assert said["single"] == "world_size=16 must be 1 for single; 1 would do"


def test_what_does_not_fit_is_told_in_gib():
    found = advise.advice(["model=llama3_70b", "cluster=h100", "world_size=8", "seq_len=131072"])
    assert found.best.empty
    assert any(re.match(r"ulysses: [\d,]+ GiB on a rank, at least \(ulysses=8 ", line) for line in found.others)


def test_copies_of_kv_heads_are_told(found):
    assert any("does not divide 8 kv heads, 2 copies, +" in line for line in found.others), found.others


def test_slower_links_are_slower(found):
    by_name = {scenario.name: scenario for scenario in found.scenarios}
    assert by_name["half the bandwidth"] == Scenario("half the bandwidth", 16, 65536, links=0.5)
    first = {name: rows.step_ms.min() for name, rows in found.rows.groupby("scenario")}
    assert first["half the bandwidth"] > first[advise.ASKED] > first["twice the bandwidth"]
    assert first["half the ranks"] > first[advise.ASKED] > first["half the length"]


def test_what_is_given_stays():
    found = advise.advice([*JOB, "strategy=usp", "mesh.ulysses=4", "recompute=block", "zero_stage=3"])
    assert {*found.asked.strategy} == {"usp"}
    assert {*found.asked.u} == {4}
    assert {*found.asked.recompute} == {"block"}
    assert {*found.asked.zero_stage} == {3}


def test_few_tokens_carry_a_note(tmp_path):
    text, problems = advise.printed(["model=llama3_8b", "cluster=h100", "world_size=8", "seq_len=4096"], tmp_path, 0)
    assert "512 tokens a GPU: launches decide" in text
    assert problems == []
    page = (tmp_path / "index.html").read_text()
    assert "<svg" in page
    assert "launches decide" in page
    assert len((tmp_path / "advise.csv").read_text().splitlines()) > 100


def test_more_ranks_than_links_are_known_for_are_left_out(tmp_path):
    """A clock of one node answers for that node."""
    file = tmp_path / "node.yaml"
    values = read_yaml(HERE / "cluster" / "h100.yaml")
    values["clock"].pop("inter")
    file.write_text(yaml.safe_dump(values))
    found = advise.advice(["model=llama3_8b", f"cluster={file}", "world_size=8", "seq_len=16384"])
    assert not found.best.empty
    assert not any("twice the ranks" in line for line in found.otherwise)
    with pytest.raises(UserError, match="across nodes was neither measured nor published"):
        advise.advice(["model=llama3_8b", f"cluster={file}", "world_size=16", "seq_len=16384"])


REFUSED = {
    "model=llama3_8b cluster=l20 world_size=8": "cluster=L20-48G: its speeds were neither measured nor published",
    "model=llama3_8b world_size=8": "cluster is missing: advice is for a machine; cluster=h100 would do",
    "cluster=h100 strategy=ddp": "ddp has no account",
    "cluster=h100 strategy=ulysses world_size=7": "mesh.ulysses=7 must divide model.n_heads",
    "cluster=h100 workload=attention": "workload=attention is no training",
    "cluster=h100 world_size=0": "world_size=0 must be at least 1",
    "cluster=h100 wrld_size=8": "there is no key wrld_size; did you mean world_size?",
    "cluster=h100 strategy=ring,usp": "is a sweep",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_a_sentence(words: str):
    with pytest.raises(UserError, match=re.escape(REFUSED[words])) as error:
        advise.advice(words.split())
    assert "\n" not in str(error.value)
