"""One process that stands for a rank sends what a real rank sends, line by line, and its values are sane."""

import multiprocessing

import pytest
import torch

from bench.emulated import stand_down, stand_for
from tests import instruments
from tests.cases import Case
from tests.ranks import on_ranks
from tests.test_ledger import SIZES

MODEL = {**SIZES, "n_kv_heads": 4, "n_layers": 2}
CASES = [
    Case("zero", dp=4),
    Case("tp_sp", tp=4),
    Case("ulysses", ulysses=4),
    Case("ring", ring=4),
    Case("ring", ring=4, kv="all_gather", zero_stage=1),
    Case("usp", ulysses=2, ring=2, recompute=True),
    Case("tp_usp", tp=2, ulysses=2),
    Case("odysseus", tp=2, ring=2),
]


def sent(rank: int, case: Case) -> list[dict]:
    return sorted(instruments.ledger(case, MODEL, 4, 32), key=str)


def emulated(case: Case, rank: int, pipe) -> None:
    torch.set_num_threads(1)
    stand_for(rank, case.world_size, "cpu")
    training, batch = instruments.build(case, MODEL, 4, 32)
    loss = training.forward(batch)
    training.backward(loss)
    finite = all(torch.isfinite(tensor).all() for tensor in training.model.parameters() if tensor.grad is not None)
    stand_down()
    stand_for(rank, case.world_size, "cpu")
    pipe.send((sent(rank, case), finite and bool(torch.isfinite(loss))))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_emulated_rank_sends_what_a_real_one_does(case: Case):
    real = on_ranks(4, sent, case)
    context = multiprocessing.get_context("forkserver")
    for rank in (0, 3):
        ours, theirs = context.Pipe()
        process = context.Process(target=emulated, args=(case, rank, theirs))
        process.start()
        counted, finite = ours.recv() if ours.poll(60) else (None, False)
        process.join(10)
        assert counted == real[rank]
        assert finite
