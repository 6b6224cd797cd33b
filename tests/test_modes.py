"""real, emulate and simulate agree: the same code runs in all three, so it sends, computes and holds the same."""

import pytest
import torch

from bench.instruments.observe import Observed
from bench.ranks.unlike import unlike_ranks
from bench.simulation.simulate import simulate
from tests import instruments
from tests.cases import MASKED, MICRO, Case, cases, config_of
from tests.ranks import on_ranks, standing_for

MODEL = {"dim": 64, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 96, "vocab_size": 64}
BATCH, SEQ_LEN = 3, 64


def sizes(case: Case) -> dict:
    """Two layers, so that one may prefetch for the other; one where there are twice as many ranks to look at."""
    return {**MODEL, "n_layers": 2 if case.world_size == 4 else 1}


def batch_of(case: Case) -> int:
    return BATCH if case.micro_batches == 1 else 8  # every dp rank has a sequence at a time


def real(rank: int, case: Case) -> Observed:
    return instruments.observed(*instruments.train(case, sizes(case), batch_of(case), SEQ_LEN))


def emulated(case: Case) -> Observed:
    training, batch = instruments.train(case, sizes(case), batch_of(case), SEQ_LEN)
    assert all(torch.isfinite(parameter).all() for parameter in training.model.parameters())
    return instruments.observed(training, batch)


def simulated(case: Case) -> Observed:
    observed, _ = simulate(config_of(case, sizes(case), batch_of(case), SEQ_LEN), lambda text: None)
    return observed


def in_turn(process: int, case: Case, ranks: list[int]) -> dict[int, Observed]:
    """One process emulates each of the ranks, and another simulates them."""
    found = {}
    for rank in ranks:
        with standing_for(rank, case.world_size):
            found[rank] = (emulated, simulated)[process](case)
    return found


def lines(observed: Observed) -> list[str]:
    return sorted(str(entry) for entry in observed.comm)


@pytest.mark.parametrize(
    "case", [*cases(4), *MICRO, *MASKED, *(case for case in cases(8) if case.layout == "zigzag")], ids=str
)
def test_the_three_modes_agree(case: Case):
    """Line by line of comm.csv and to the FLOP, on every rank; peaks within 1 %."""
    truth = on_ranks(case.world_size, real, case)
    ranks = list(range(case.world_size))
    emulate, simulate = on_ranks(2, in_turn, case, ranks, grouped=False)
    for mode, found in (("emulate", emulate), ("simulate", simulate)):
        for rank in ranks:
            ours, theirs = found[rank], truth[rank]
            assert lines(ours) == lines(theirs), f"{mode}, rank {rank}"
            assert ours.flops == theirs.flops, f"{mode}, rank {rank}"
            assert ours.peak.total == pytest.approx(theirs.peak.total, rel=0.01), f"{mode}, rank {rank}"
            assert ours.host_bytes == theirs.host_bytes, f"{mode}, rank {rank}"
            for part in ("params", "grads", "optimizer"):
                assert getattr(ours.peak, part) == getattr(theirs.peak, part), f"{mode}, rank {rank}"
    assert [emulate[rank].peak for rank in ranks] == [observed.peak for observed in truth]  # to the byte
    launched = unlike_ranks(config_of(case, sizes(case), batch_of(case), SEQ_LEN))
    for size in (lambda o: o.peak.total, lambda o: o.flops, lambda o: sum(entry.sent_bytes for entry in o.comm)):
        everywhere = [size(simulate[rank]) for rank in ranks]
        assert max(everywhere[rank] for rank in launched) == max(everywhere), f"{launched} of {everywhere}"
