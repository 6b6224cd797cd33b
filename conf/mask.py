"""Which keys a token sees: those of its own document, at most a window of them, and none after itself.

That is all that a mask is here: from its first key on, every token sees all up to itself, and a later token's first
key is never before an earlier one's. Whatever ranks own which tokens, the keys of another rank that a rank's queries
see are therefore a staircase (strategies/ops/layouts.py).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Mask:
    """Of some sequences of S tokens.

    begins [R, S]: of each token, the first of its document; R = 1 where all sequences are alike, None where a sequence
    is one document. window: how many keys a token sees at most, itself among them; None: all of its document.
    """

    begins: Tokens | None = None
    window: int | None = None
    known: dict[Any, Any] = field(default_factory=dict, repr=False)  # what has been found out of it, once

    @property
    def plain(self) -> bool:
        """Does a token see all that come before it?"""
        return self.begins is None and self.window is None

    @property
    def alike(self) -> bool:
        """Does it let through the same in every sequence?"""
        return self.begins is None or len(self.begins) == 1

    def of(self, start: int, stop: int) -> "Mask":
        """Of these sequences alone."""
        if self.begins is None or self.alike:
            return self
        if (start, stop) not in self.known:
            self.known[start, stop] = Mask(self.begins[start:stop], self.window)
        return self.known[start, stop]

    def begin(self, positions: Tokens) -> Tokens:
        """[R, n]: where the documents of these tokens begin."""
        return np.zeros((1, len(positions)), np.int64) if self.begins is None else self.begins[:, positions]

    def first(self, positions: Tokens) -> Tokens:
        """[R, n]: the first key that each of these tokens sees."""
        begin = self.begin(positions)
        return begin if self.window is None else np.maximum(begin, positions - self.window + 1)

    def seen(self, positions: Tokens) -> Tokens:
        """[R, n]: how many keys each of these tokens sees, itself among them."""
        return positions - self.first(positions) + 1


PLAIN = Mask()


def begins(lengths: list[list[int]]) -> Tokens:
    """[R, S]: of documents of these lengths, which add up to S in each sequence."""
    return np.stack([np.repeat(np.cumsum(row) - row, row) for row in lengths]).astype(np.int64)
