"""What a rank sends: lines of an account, and the collectives of which they are made.

f(P) = (P-1)/P of a group of P ranks. AG an all_gather of S bytes (its output), RS a reduce_scatter of S (its input):
each rank sends f S. AR an all_reduce: 2 f S. A2A, an all_to_all of a local buffer S: f S. A hop sends what it carries.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.accounts.letters import Amount, alone

GRADIENTS = "dk, dv", "dq"  # what comes home around a ring behind what they are gradients of
SHORT = {"all_gather": "AG", "reduce_scatter": "RS", "all_reduce": "AR", "all_to_all": "A2A", "p2p": "hop"}


@dataclass(frozen=True)
class Sent:
    """What a rank sends in one phase by one kind of collective: so many calls with a payload `of`, so many bytes.

    axis: along which of the mesh. beside: what the paper computes meanwhile, so that it costs time only where it takes
    longer: `attention` of the block that is here, the other `products` of a matrix's gradients, the `blocks` before and
    behind. Nothing: whoever needs it waits.
    """

    phase: str  # forward | recompute | backward | optimizer
    kind: str
    of: str
    calls: Amount
    bytes: Amount
    weights: bool = False  # weights or their gradients, not activations
    axis: str = "tp"
    beside: str = ""

    def times(self, n: Amount) -> "Sent":
        return replace(self, calls=n * self.calls, bytes=n * self.bytes)


def f(p: Amount) -> Amount:
    """The part of a group's data that is not a rank's own."""
    return 0 if alone(p) else (p - 1) / p


def all_gather(phase: str, p: Amount, size: Amount, of: str, calls: Amount = 1, **fields: Any) -> Sent:
    return Sent(phase, "all_gather", of, calls, f(p) * size, **fields)


def reduce_scatter(phase: str, p: Amount, size: Amount, of: str, calls: Amount = 1, **fields: Any) -> Sent:
    return Sent(phase, "reduce_scatter", of, calls, f(p) * size, **fields)


def all_reduce(phase: str, p: Amount, size: Amount, of: str, calls: Amount = 1, **fields: Any) -> Sent:
    return Sent(phase, "all_reduce", of, calls, 2 * f(p) * size, **fields)


def all_to_all(phase: str, p: Amount, size: Amount, of: str, calls: Amount, axis: str = "ulysses") -> Sent:
    return Sent(phase, "all_to_all", of, calls, f(p) * size, axis=axis)


def something(lines: Iterable[Sent]) -> list[Sent]:
    """The lines that send any bytes at all: a group of one rank has nobody to send to."""
    return [line for line in lines if np.any(line.bytes != 0)]


def total(lines: Iterable[Sent], **wanted: object) -> Amount:
    """The bytes of the lines whose fields are as wanted, e.g. phase="forward", weights=True."""
    return sum(line.bytes for line in lines if all(getattr(line, key) == value for key, value in wanted.items()))
