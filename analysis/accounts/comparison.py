"""What an account says that a rank sends, beside what was counted: by phase and kind of collective."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from analysis.accounts.sent import SHORT, Sent

PHASES = {"forward": ("forward",), "backward": ("recompute", "backward"), "optimizer": ("optimizer",)}


@dataclass(frozen=True)
class Compared:
    """Calls and bytes of one phase and kind, derived and counted."""

    phase: str
    kind: str
    calls: tuple[int, int]
    bytes: tuple[float, int]
    exact: bool

    def __str__(self) -> str:
        return (
            f"{self.phase} {self.kind} was derived as {self.calls[0]} calls of {self.bytes[0]:,.0f} bytes in all and "
            f"counted as {self.calls[1]} calls of {self.bytes[1]:,} bytes"
        )


def compared(lines: Iterable[Sent], comm: Iterable[Mapping]) -> list[Compared]:
    """comm: lines of comm.csv. One that carries nothing, of a rank whose shard is empty, is none of an account."""
    lines, comm, found = list(lines), [entry for entry in comm if entry["sent_bytes"]], []
    for phase, phases in PHASES.items():
        for kind in SHORT:
            derived = [line for line in lines if line.phase in phases and line.kind == kind]
            counted = [entry for entry in comm if entry["phase"] in phases and entry["kind"] == kind]
            if derived or counted:
                calls = sum(line.calls for line in derived), sum(entry["calls"] for entry in counted)
                sizes = sum(line.bytes for line in derived), sum(round(entry["sent_bytes"]) for entry in counted)
                exact = calls[0] == calls[1] and abs(sizes[0] - sizes[1]) <= len(counted)  # each is a rounded number
                found.append(Compared(phase, kind, calls, sizes, exact))
    return found
