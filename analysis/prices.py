"""What a clock says of many configurations at once: of a device's work, and of collectives along the axes of a mesh.

Everything takes numbers, or arrays of numpy with one element a configuration, and answers in microseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from analysis.accounts.letters import Amount
from analysis.accounts.sent import Sent
from conf.clock import Clock, Group, Rate
from conf.keys import PLACEMENTS
from conf.series import moved
from conf.tiers import BY_PAIRS

Mesh = Mapping[str, tuple[Amount, Amount]]  # axis -> ranks along it, and how far it is from one to the next


@dataclass(frozen=True)
class Work:
    """What a device computes, by what it is, and in how many operations."""

    products: Amount = 0.0
    attention: Amount = 0.0
    kernels: Amount = 0.0
    calls: Amount = 0
    host: Amount = 0.0  # what its host does of its own

    @property
    def us(self) -> Amount:
        return self.products + self.attention + self.kernels

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.kernels + other.kernels,
            self.calls + other.calls,
            self.host + other.host,
        )

    def __mul__(self, n: Amount) -> "Work":
        return Work(self.products * n, self.attention * n, self.kernels * n, self.calls * n, self.host * n)


NOTHING = Work()


@dataclass(frozen=True)
class Machine:
    """A cluster's clock, and what else decides how long something takes."""

    clock: Clock
    cluster: str
    ranks_per_node: int
    device: str = "cuda"

    @property
    def on_gpu(self) -> bool:
        """Is there a host that launches what a device computes, and goes on?"""
        return self.device == "cuda"

    def launches(self, work: Work) -> Amount:
        """How long the host takes to launch it, and for what else it does. A CPU is its own host."""
        return work.host + work.calls * self.clock.call_us * self.on_gpu

    def works(self, part: str, us: Amount, calls: Amount) -> Work:
        """So many operations of so many microseconds. On a CPU what the host does for each comes to that."""
        us = us if self.on_gpu else us + self.clock.call_us
        return Work(**{part: us * calls, "calls": calls})

    def aside(self, work: Work) -> Work:
        """On another stream of a GPU, which takes its host's time alone."""
        return Work(calls=work.calls) if self.on_gpu else work

    def groups(self, n: Amount) -> Work:
        """FSDP2's Python around so many messages of weights or of their gradients."""
        return Work(host=n * self.clock.group_us)

    def product(self, rows: Amount, inner: Amount, columns: Amount, calls: Amount = 1) -> Work:
        """[rows, inner] by [inner, columns]"""
        us = self.clock.product_us(2 * rows * inner * columns, rows, columns, np.maximum)
        return self.works("products", us, calls)

    def attention(self, way: str, pairs: Amount, head_dim: Amount, calls: Amount = 1) -> Work:
        """forward or backward over so many query-key pairs of one head."""
        return self.works("attention", self.clock.attention_us(way, pairs, head_dim, np.maximum), calls)

    def moves(self, size: Amount, calls: Amount = 1, kind: str = "other") -> Work:
        """Kernels that read and write so many bytes each."""
        return self.works("kernels", self.clock.kernel_us(kind, size, np.maximum), calls)

    def kernel(self, kernel: str, elements: Amount, element_size: Amount, calls: Amount = 1) -> Work:
        """Those whose bytes conf/series.py knows, by the elements of their output."""
        return self.moves(moved(kernel, elements, element_size), calls, kernel.split()[0])

    def group(self, kind: str, ranks: int, stride: int) -> Group:
        """Ranks so far from each other, on nodes that have equally many: conf/tiers.py's rule, for a regular mesh."""
        here = min(ranks, max(1, self.ranks_per_node // stride))
        if here == ranks:
            return Group(ranks)
        by_pairs = kind in BY_PAIRS[self.device]
        leaves = 1.0 if kind == "p2p" else (ranks - here) / (ranks - 1) if by_pairs else 1 / here
        return Group(ranks, -(-ranks // here), leaves, 1 - leaves if by_pairs else 1.0)

    def links(self, kind: str, ranks: int, stride: int) -> list[tuple[Rate, float]]:
        if ranks == 1:
            return [(Rate(1.0), 0.0)]
        return self.clock.links(kind, self.group(kind, ranks, stride), self.cluster)

    def collective(self, line: Sent, places: "Places") -> Amount:
        """One call of a line; no time where there is nobody to send to. Raises Invalid for links of unknown speed."""
        sent = line.bytes / np.maximum(line.calls, 1)
        if not np.any(sent):
            return 0.0
        took = [rate.us(part * sent, np.maximum) for rate, part in places.links(line.kind, self)]
        return np.where(sent > 0, np.maximum(*took), 0.0)


class Places:
    """An axis of many configurations: which kinds of groups there are, ranks and stride, and which one each has."""

    def __init__(self, ranks: Amount, stride: Amount) -> None:
        lines = list(zip(*(np.ravel(each).tolist() for each in np.broadcast_arrays(ranks, stride)), strict=True))
        self.kinds = {line: number for number, line in enumerate(dict.fromkeys(lines))}
        self.which = np.array([self.kinds[line] for line in lines]) if np.ndim(ranks) else 0
        self.known: dict[str, list[tuple[Rate, Amount]]] = {}

    def links(self, kind: str, on: Machine) -> list[tuple[Rate, Amount]]:
        """As of the clock, two for each, which may be the same."""
        if kind not in self.known:
            passed = [on.links(kind, *line) for line in self.kinds]
            self.known[kind] = [self.of_each([links[at] for links in passed]) for at in (0, -1)]
        return self.known[kind]

    def of_each(self, links: list[tuple[Rate, float]]) -> tuple[Rate, Amount]:
        figures = np.array([(rate.rate, rate.half, rate.power, rate.floor_us, part) for rate, part in links])
        *rate, part = figures[self.which].T
        return Rate(*rate), part


def mesh_of(degrees: Mapping[str, Amount], placement: str, kv_shared: Amount = 1, inner: Amount = None) -> Mesh:
    """The axes of a mesh, and the groups that conf/tiers.py makes of them."""
    order = PLACEMENTS[placement]
    found = {axis: (degrees[axis], prod(degrees[after] for after in order[order.index(axis) + 1 :])) for axis in order}
    ranks, (tp, nearest) = prod(degrees.values()), found["tp"]
    if inner is not None:
        ring, stride = found["ring"]
        found |= {"inner": (inner, stride), "outer": (ring // inner, stride * inner)}
    others = ranks // tp, tp if order[-1] == "tp" else 1
    return {**found, "zero": others, "world": (ranks, 1), "tp_replicas": (kv_shared, nearest)}
