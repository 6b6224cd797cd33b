"""What of a message leaves a host, in closed form and by looking at every pair of ranks."""

from dataclasses import replace
from itertools import pairwise, product

import pytest

from bench.ranks.unlike import unlike_ranks
from bench.simulation.simulate import simulate
from conf.clock import COLLECTIVES
from conf.columns import between_hosts
from conf.keys import PLACEMENTS, LaunchConfig
from conf.measurement import Entry, Measured, Peak, Rank, Round
from conf.tiers import share_that_leaves
from tests.cases import Case, config_of
from tests.ranks import on_ranks, standing_for

SIZES = {"dim": 64, "n_layers": 1, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 96, "vocab_size": 64}
AXES = {"dp": 2, "tp": 4, "ulysses": 2, "ring": 3}


def config(ranks_per_host: int, placement: str, device: str = "cpu", **degrees: int):
    found = config_of(Case("usp", **(degrees or AXES), placement=placement), SIZES, 2, 64)
    found.launch, found.device = LaunchConfig(ranks_per_host=ranks_per_host), device
    return found


def line(kind: str, axis: str, size: int, sent: float = 1.0) -> Entry:
    return Entry("forward", kind, axis, size, "float32", "", False, 1, 1, sent)


def groups(placement: str, axis: str) -> list[list[int]]:
    """The ranks that differ in nothing but their place along the axis, or along all that it stands for."""
    order = PLACEMENTS[placement]
    places = list(product(*(range(AXES[name]) for name in order)))  # of rank 0, 1, ..
    along = {"zero": {"dp", "ulysses", "ring"}, "world": set(order), "tp_replicas": {"tp"}}.get(axis, {axis})
    found: dict[tuple, list[int]] = {}
    for rank, place in enumerate(places):
        same = tuple(at for name, at in zip(order, place, strict=True) if name not in along)
        if axis == "tp_replicas":  # two neighbours each
            same = (*same, place[order.index("tp")] // 2)
        found.setdefault(same, []).append(rank)
    return list(found.values())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("each", [1, 4, 5, 8, 12, 47, 48])
def test_closed_forms_are_what_every_pair_of_ranks_says(placement, each):
    on_cpu, on_cuda = (config(each, placement, device) for device in ("cpu", "cuda"))
    for axis in ("dp", "tp", "ulysses", "ring", "zero", "world", "tp_replicas", "mesh_tp"):
        for ranks in groups(placement, axis.removeprefix("mesh_")):
            hosts = {rank: rank // each for rank in ranks}
            ring = list(pairwise([*ranks, ranks[0]]))
            leaving = [hosts[one] for one, other in ring if hosts[one] != hosts[other]]
            for rank, after in ring:
                lines = {kind: line(kind, axis, len(ranks)) for kind in COLLECTIVES}
                gloo, nccl = (
                    {kind: share_that_leaves(chosen, rank, lines[kind]) for kind in COLLECTIVES}
                    for chosen in (on_cpu, on_cuda)
                )
                elsewhere = sum(host != hosts[rank] for host in hosts.values())
                assert gloo["p2p"] == nccl["p2p"] == (hosts[after] != hosts[rank])
                for pairs in (gloo["all_to_all"], gloo["reduce_scatter"], nccl["all_to_all"]):
                    assert pairs == elsewhere / (len(ranks) - 1)
                assert gloo["all_gather"] == gloo["all_reduce"] == nccl["reduce_scatter"]
            for host in set(hosts.values()):
                of_host = [rank for rank in ranks if hosts[rank] == host]
                sent = sum(share_that_leaves(on_cpu, rank, line("all_gather", axis, len(ranks))) for rank in of_host)
                assert sent == pytest.approx(leaving.count(host))


def test_hops_around_all_rings_at_once_leave_a_host_as_parts_for_every_peer_do():
    one = config(4, "ulysses_inner", "cuda")
    cycles = replace(one, ring=replace(one.ring, cycles="all"))
    for rank in range(one.world_size):
        hop, parts = (line(kind, "ring", one.mesh.ring) for kind in ("p2p", "all_to_all"))
        assert share_that_leaves(cycles, rank, hop) == share_that_leaves(one, rank, parts)


def rank_of(number: int, *comm: Entry) -> Rank:
    return Rank(list(comm), 0, Peak(), 0, None, "gloo", "", number)


def test_a_row_says_what_leaves_the_host_of_the_rank_that_sends_most_there():
    chosen = config(2, "ulysses_inner", dp=1, tp=1, ulysses=1, ring=4)
    ranks = [rank_of(number, line("p2p", "ring", 4, 100.0)) for number in range(4)]
    assert between_hosts(Measured(chosen, [Round(ranks)])) == 100
    assert between_hosts(Measured(chosen, [Round(ranks[2:3])])) == 0  # whose next one is beside it
    chosen.launch.ranks_per_host = None
    assert between_hosts(Measured(chosen, [Round(ranks)])) == 0


SPREAD = [
    Case("usp", ulysses=2, ring=2),
    Case("usp", ulysses=2, ring=2, placement="ring_inner"),
    Case("tp_usp", tp=2, ring=2, placement="tp_outer"),
    Case("odysseus", dp=2, tp=2),
    Case("ring", ring=4),
]


def simulated(process: int, case: Case) -> list[Rank]:
    """Every rank of it."""
    found = []
    for rank in range(case.world_size):
        with standing_for(rank, case.world_size):
            observed, _ = simulate(config_of(case, SIZES, 2, 64), lambda text: None)
            found.append(rank_of(rank, *observed.comm))
    return found


@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_the_ranks_that_are_simulated_tell_what_leaves_a_host_at_most(case: Case):
    (ranks,) = on_ranks(1, simulated, case, grouped=False)
    for each in (1, 2):
        chosen = config_of(case, SIZES, 2, 64)
        chosen.launch = LaunchConfig(ranks_per_host=each)
        all_of_them = between_hosts(Measured(chosen, [Round(ranks)]))
        assert all_of_them > 0
        assert between_hosts(Measured(chosen, [Round([ranks[n] for n in unlike_ranks(chosen)])])) == all_of_them


def test_a_million_ranks_are_as_quick_as_four():
    chosen = config(8, "ring_inner", dp=64, tp=2, ulysses=512, ring=16)
    comm = [line("all_gather", "zero", 2**19, 4.0), line("p2p", "ring", 16, 3.0), line("all_reduce", "tp", 2, 5.0)]
    assert between_hosts(Measured(chosen, [Round([rank_of(2**20 - 1, *10**4 * comm)])])) == 10**4 * (4 / 4 + 3)
