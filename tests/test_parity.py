"""Every strategy on every mesh is the same model: logits, loss and every gradient, against two judges.

Loss is not enough: averaged instead of summed gradients leave the first loss untouched.
"""

import functools

import pytest
import torch

from tests import reference
from tests.cases import CASES, HEADS, Case
from tests.ranks import on_ranks

CLOSE = 1e-5


def run_all_heads(rank: int, case: Case, folders: dict[str, str], batches: dict) -> dict:
    """On one rank: every checkpoint with every batch -> rank 0's results."""
    results = {}
    for heads, folder in folders.items():
        training = reference.build(case, folder)
        for key, (tokens, labels) in batches.items():
            results[heads, key] = reference.run_case(training, tokens, labels)
            training.zero_grads()
    return results


@functools.cache
def judge(folder: str, batch_size: int, silent: tuple[int, ...] | None) -> reference.Result:
    return reference.hugging_face(folder, *batch_of(batch_size, silent))


def batch_of(batch_size: int, silent: tuple[int, ...] | None) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.make_batch(batch_size, 67, None if silent is None else torch.tensor(silent))


@functools.cache
def single(folder: str, batch_size: int, silent: tuple[int, ...] | None) -> reference.Result:
    return reference.run_case(reference.build(Case("single"), folder), *batch_of(batch_size, silent))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_strategy_is_the_unsharded_model(case: Case, checkpoints):
    silent = tuple(reference.positions_of_first_rank(case).tolist())
    keys = [(1, None), (3, silent)]
    batches = {key: batch_of(*key) for key in keys}
    if case.world_size == 1:
        results = run_all_heads(0, case, checkpoints, batches)
    else:
        results = on_ranks(case.world_size, run_all_heads, case, checkpoints, batches)[0]
    for heads in HEADS:
        for key in keys:
            folder = checkpoints[heads]
            what = f"{case}, {heads}, batch {key[0]}"
            reference.assert_equal(results[heads, key], judge(folder, *key), CLOSE, f"{what}, against transformers")
            reference.assert_equal(results[heads, key], single(folder, *key), CLOSE, f"{what}, against one process")
