"""What a rank computes: its matrix products, and the pairs of a query and a key that a causal mask lets through.

A weight and a token cost 2 FLOP forward and 4 backward. A pair costs a head 4 K forward (its score, its part of the
output) and 10 K backward (Dao 2023, section 3.1).
"""

from collections.abc import Iterable

import numpy as np

from analysis.accounts.letters import Amount, Letters
from analysis.accounts.weights import Group
from conf.seen import PAIR, PAIR_BACKWARD

WEIGHT = 2 + 4


def of_matrices(groups: Iterable[Group], s: Letters) -> Amount:
    """Matrices that are whole on all ranks see 1/tp of the tokens that slices of them see. A norm is no matrix."""
    return sum(
        WEIGHT * group.times * weight.rows * weight.columns * (s.tokens / s.tp if group.axis == "world" else s.tokens)
        for group in groups
        for weight in group.weights
        if weight.cut != "not"
    )


def where_queries_travel(s: Letters) -> Amount:
    """Of a block, forward and backward: there a rank does what others see of its keys."""
    if s.seen is not None:
        return s.K * s.h / (s.tp * s.u) * (PAIR * s.seen["pairs"] + PAIR_BACKWARD * s.seen["pairs_backward"])
    places = (0, s.r - 1) if s.at is None else (s.at["ring"],)  # the most has one at an end
    found = [s.K * (PAIR * pairs(s, at) + PAIR_BACKWARD * pairs(s, s.r - 1 - at)) for at in places]
    return np.maximum(found[0], found[-1])


def pairs(s: Letters, before: Amount = None) -> Amount:
    """Of a block, over a rank's heads: among its 1/r of the tokens, and with what these see of the others'.

    before: of how many ranks the first token is before this one's; if it is not said, of as many as there are.
    """
    if s.seen is not None:
        return s.h / (s.tp * s.u) * s.seen["pairs"]
    n = s.L / s.r
    if before is None:
        before = s.r - 1 if s.at is None else s.at["ring"]
    return s.B * s.h / (s.tp * s.u) * (n * (n + 1) / 2 + visiting(s, n, before))


def visiting(s: Letters, n: Amount, before: Amount) -> Amount:
    """Pairs with the keys of the other ranks of the ring, n of each (strategies/ops/layouts.py)."""
    after = s.r - 1 - before
    if s.layout == "contiguous":
        return before * n * n
    if s.layout == "striped":
        return before * n * (n + 1) / 2 + after * n * (n - 1) / 2
    return (before + after) * n * n / 2
