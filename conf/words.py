"""How a mistake is answered: one sentence with the key, what is wrong, and the nearest values that would do."""

import difflib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from math import isqrt
from typing import Any

LONGEST = 400  # of a sentence, in characters
WRONG = "wrong: "  # so begins the reason of a row that ended well and did not compute what one process does


class Invalid(ValueError):
    """What is wrong with a configuration: the key, the fault and what would do, in one sentence."""

    def __init__(self, says: str) -> None:
        super().__init__(in_a_line(says))


def in_a_line(says: str) -> str:
    """Without what cannot be printed, and where a value in it is very long, without its middle."""
    if len(says) > LONGEST:
        says = f"{says[: LONGEST // 2]} ... {says[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in says)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(key: str, value: object, choices: Iterable[object]) -> str:
    """The sentence for a value that is none of the choices."""
    written = [str(choice) for choice in choices]
    return f"{key}={value} is not one of {', '.join(written)}{did_you_mean(str(value), written)}"


def around(value: Any, allowed: Sequence[Any]) -> str:
    """The nearest smaller and larger of the values that would do, which rise."""
    below, above = bisect_left(allowed, value), bisect_right(allowed, value)
    near = [*allowed[max(0, below - 1) : below], *allowed[above : above + 1]]
    return " or ".join(str(v) for v in near) or "nothing near"


def divisors(n: int) -> list[int]:
    """In rising order."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return [*small, *(n // d for d in reversed(small) if d * d != n)]
