"""What peers need that the strategies of ours do not."""

from strategies.base import Rule, Shape


def at_least_two(axis: str, shape: Shape) -> Rule:
    """Alone on its axis a peer would send to itself."""
    return Rule(f"mesh.{axis}", shape.degrees[axis], "must be at least 2 for a peer", lambda degree: degree > 1)
