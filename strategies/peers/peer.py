"""What a peer says of itself, and what peers need that the strategies of ours do not."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from strategies.base import Rule, Shape


class Peer:
    """Stands in front of the strategy of ours whose part a library takes over."""

    ours: ClassVar[str]  # the strategy that it answers to
    package: ClassVar[str] = "torch"
    adapted: ClassVar[bool] = False  # it runs on our kernel, where its own is CUDA's
    fixed: ClassVar[Mapping[str, object]] = MappingProxyType({})  # configuration keys that it has one value of


def at_least_two(axis: str, shape: Shape) -> Rule:
    """Alone on its axis a peer would send to itself."""
    return Rule(f"mesh.{axis}", shape.degrees[axis], "must be at least 2 for a peer", lambda degree: degree > 1)


def kv_heads_divide(axis: str, shape: Shape, library: str) -> Rule:
    """Kv heads in equal parts: a library that does not copy them has none for a rank too many."""
    why = f"must divide model.n_kv_heads = {shape.n_kv_heads}, which {library} does not copy"
    return Rule(f"mesh.{axis}", shape.degrees[axis], why, lambda degree: shape.n_kv_heads % degree == 0)
