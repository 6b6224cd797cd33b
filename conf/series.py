"""What is measured of a machine: the columns of collectives.csv and kernels.csv, and the bytes that a kernel moves.

A line is one collective of one size, or one kernel of one shape. Its time is the median over ranks, which run at the
same time and share a memory and the cores' caches: of a kernel's medians, and of a collective's means, as nccl-tests
has them. Where threads must be woken the same collective takes 0.3 ms or 4 ms, and a step has its share of both.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any

from conf.clock import COLLECTIVES
from conf.columns import Column
from conf.files import FileFault, size_of
from conf.measurement import Rank, Timed, Work, percentile

# What a kernel reads and writes, in elements of its output: (as the activations are, in fp32). The clock's rates are of
# these bytes, whatever an implementation moves beside them.
MOVED = {
    "other": (3, 0),  # x + y, a residual addition: both read, the sum written
    "copy": (2, 0),  # x read and written
    "norm": (2, 0),  # x read, y written
    "norm backward": (3, 0),  # x and y's gradient read, x's written
    "rotary": (2, 0),
    "rotary backward": (2, 0),
    "swiglu": (3, 0),  # gate and up read, their product written
    "swiglu backward": (5, 0),  # gate, up and the product's gradient read, both gradients written
    "merge": (1, 2),  # of ring attention: a block's output read; the accumulator read and written
    "optimizer": (7, 0),  # AdamW: weight, gradient and two moments read, all but the gradient written
}


def moved(kernel: str, elements: int, element_size: int) -> int:
    """Bytes."""
    narrow, wide = MOVED[kernel]
    return elements * (narrow * element_size + wide * 4)


def sent(kind: str, size: int, ranks: int) -> float:
    """Bytes that a rank sends of a collective, by the bandwidth-optimal algorithm, as the ledger counts them."""
    if kind == "p2p":
        return size
    return (2 if kind == "all_reduce" else 1) * size * (ranks - 1) / ranks


@dataclass
class Line:
    """One line: what was timed, the middle of each rank's times, and all times of all ranks, in microseconds."""

    work: Work
    middles: list[float]
    us: list[float]

    @property
    def time_us(self) -> float:
        return median(self.middles)

    @property
    def sent_bytes(self) -> float:
        return sent(self.work.kind, self.work.bytes, self.work.ranks)

    def giga(self, amount: float) -> float:
        """So much in that time, in billions a second."""
        return amount / self.time_us / 1000


def of_line(name: str, unit: str, says: str, of: Callable[[Line], Any], holds: Any = float) -> Column:
    return Column(name, unit, says, of, holds=holds)


TIMES = [
    of_line("repeated", "", "times, on all ranks together", lambda line: len(line.us), int),
    of_line(
        "time_us",
        "us",
        "the median over ranks: of medians; of a collective, of means",
        lambda line: round(line.time_us, 3),
    ),
    of_line("time_us_p10", "us", "of all times, the 10th percentile", lambda line: round(percentile(line.us, 0.1), 3)),
    of_line("time_us_p90", "us", "of all times, the 90th percentile", lambda line: round(percentile(line.us, 0.9), 3)),
]
SERIES: dict[str, list[Column]] = {  # workload -> the columns of its csv
    "collectives": [
        of_line("kind", "", "of collective", lambda line: line.work.kind, str),
        of_line("axis", "", "of the mesh", lambda line: line.work.axis, str),
        of_line("ranks", "", "of the group", lambda line: line.work.ranks, int),
        of_line("hosts", "", "on which they are", lambda line: line.work.hosts, int),
        of_line("dtype", "", "of what is sent", lambda line: line.work.dtype, str),
        of_line("bytes", "B", "the size, as nccl-tests counts it", lambda line: line.work.bytes, int),
        of_line("sent_bytes", "B", "that a rank sends of it", lambda line: round(line.sent_bytes), int),
        *TIMES,
        of_line("algbw_gbps", "GB/s", "bytes over time", lambda line: round(line.giga(line.work.bytes), 5)),
        of_line("busbw_gbps", "GB/s", "sent_bytes over time", lambda line: round(line.giga(line.sent_bytes), 5)),
    ],
    "kernels": [
        of_line("kind", "", "of kernel: one of the clock's rates", lambda line: line.work.kind, str),
        of_line("shape", "", "of what was computed", lambda line: line.work.shape, str),
        of_line("tokens", "", "of them", lambda line: line.work.tokens, int),
        of_line("causal", "", "of attention: sees a token but those before it", lambda line: line.work.causal, bool),
        of_line("dtype", "", "in which", lambda line: line.work.dtype, str),
        of_line("flops", "FLOP", "of products, and of the scores that are visible", lambda line: line.work.flops, int),
        of_line("bytes", "B", "read and written", lambda line: line.work.bytes, int),
        *TIMES,
        of_line("gflops", "GFLOP/s", "flops over time", lambda line: round(line.giga(line.work.flops), 4)),
        of_line("gbps", "GB/s", "bytes over time", lambda line: round(line.giga(line.work.bytes), 5)),
    ],
}


def lines(ranks: Sequence[Rank]) -> list[Line]:
    """One for each thing that was timed, in the order in which it was; axes' groups are told together."""
    found: dict[Work, list[Timed]] = {}
    for timed in (each for rank in ranks for each in rank.series):
        found.setdefault(timed.work, []).append(timed)
    return [
        Line(
            work,
            [(fmean if work.kind in COLLECTIVES else median)(each.us) for each in of_ranks],
            [us for each in of_ranks for us in each.us],
        )
        for work, of_ranks in found.items()
    ]


def written(workload: str, ranks: Sequence[Rank]) -> list[dict[str, Any]]:
    """The lines as a csv has them."""
    return [{c.name: c.of(line) for c in SERIES[workload] if c.of is not None} for line in lines(ranks)]


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of such a csv, of the workload that its name says. Raises FileFault."""
    size_of(file)
    kinds = {column.name: column.holds for column in SERIES[file.stem]}
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            found = [{name: value(line[name], kind) for name, kind in kinds.items()} for line in csv.DictReader(lines)]
    except OSError as error:
        raise FileFault(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise FileFault(f"{file}: cannot be read ({type(error).__name__}: {error})") from None
    if not found:
        raise FileFault(f"{file}: has no line")
    return found


def value(text: str, kind: type) -> Any:
    if kind is bool:
        return text == "True"
    number = kind(text)
    if kind is float and not isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


# In short, for the terminal and for a page: what is measured stands in the csv.


def summary(workload: str, table: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Lines of a table, with the same headings each."""
    return list((of_collectives if workload == "collectives" else of_kernels)(table))


def of_collectives(table: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Of each group and size: every kind's time and bus bandwidth."""
    groups: dict[tuple, dict[str, Mapping]] = {}
    for line in table:
        groups.setdefault((line["axis"], line["ranks"], line["bytes"]), {})[line["kind"]] = line
    for (axis, ranks, size), here in groups.items():
        cells = {kind: f"{here[kind]['time_us']:,.0f} us {here[kind]['busbw_gbps']:.3g} GB/s" for kind in COLLECTIVES}
        yield {"axis": f"{axis}={ranks}", "size": binary(size), **cells}


def of_kernels(table: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Of each kernel: the smallest and the largest that were timed, and the best rate."""
    for kind in dict.fromkeys(line["kind"] for line in table):
        here = sorted((line for line in table if line["kind"] == kind), key=amount)
        rate, unit = ("gflops", "GFLOP/s") if here[0]["flops"] else ("gbps", "GB/s")
        best = max(here, key=lambda line: line[rate])
        yield {
            "kernel": kind,
            "timed": str(len(here)),
            "smallest": f"{here[0]['shape']}: {here[0]['time_us']:,.1f} us",
            "largest": f"{here[-1]['shape']}: {here[-1]['time_us']:,.1f} us",
            "best": f"{best[rate]:,.4g} {unit} at {best['shape']}" if best[rate] else "",
        }


def amount(line: Mapping[str, Any]) -> float:
    """What a line's time is a function of: FLOPs, where there are any; else bytes, of a collective those sent."""
    return line.get("flops") or line.get("sent_bytes") or line["bytes"]


def binary(size: int) -> str:
    """512 B, 1 KiB, 64 MiB"""
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"
