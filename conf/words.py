"""How a mistake is answered: one sentence with the key, what is wrong, and the nearest values that would do."""

import difflib
from collections.abc import Callable, Iterable


class Invalid(ValueError):
    """What is wrong with a configuration: the key, the fault and what would do, in one sentence."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(key: str, value: object, choices: Iterable[object]) -> str:
    """The sentence for a value that is none of the choices."""
    written = [str(choice) for choice in choices]
    return f"{key}={value} is not one of {', '.join(written)}{did_you_mean(str(value), written)}"


def around(value: int, fits: Callable[[int], bool]) -> str:
    """The nearest smaller and larger values that fit, where there are any within reach."""
    below = next((v for v in range(value - 1, 0, -1) if fits(v)), None)
    above = next((v for v in range(value + 1, 2 * value + 4096) if fits(v)), None)
    return " or ".join(str(v) for v in (below, above) if v is not None) or "nothing near"
