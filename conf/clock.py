"""How fast a cluster does what a step consists of: the values of its file's section `clock`, measured or published.

One thing at a time: how long a product takes, a block of attention, a collective. What runs when, and so how long a
step takes, is for whoever predicts from them: by replaying a schedule (bench/simulation/replay.py), or in closed form
(analysis/predict.py). Arguments are numbers, or arrays of numpy with larger=np.maximum.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from math import inf, log
from typing import Any

from conf.keys import beyond, not_of
from conf.words import Invalid, one_of

COLLECTIVES = "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "p2p"
LAUNCH_BOUND = 1024  # tokens of a rank below which launches and messages' starts decide, and no published time is known
KERNELS = "other", "norm", "rotary", "swiglu", "merge", "optimizer", "copy"


@dataclass(frozen=True)
class Rate:
    """How long work takes: max(floor_us, work / rate * (1 + (half / work) ** power)).

    work is bytes or FLOPs. Of `half` of them the rate is half of what it is at most: with power 1 that is a start-up
    time and a constant rate (Hockney 1994), with less a rate that grows more slowly with size, as NCCL's does. With
    more the curve would rise again towards no work at all: there, less work takes as long.
    """

    rate: float  # at most, GB/s or GFLOP/s
    half: float = 0.0  # bytes or FLOPs
    power: float = 1.0
    floor_us: float = 0.0

    def us(self, work: Any, larger: Callable = max) -> Any:
        if type(self.half) is float and self.half == 0:  # most rates: without powers of large arrays
            return larger(self.floor_us, work / (self.rate * 1000))
        work = larger(work, self.half * larger(self.power - 1, 0.0) ** (1 / self.power))
        return larger(self.floor_us, (work + self.half**self.power * work ** (1 - self.power)) / (self.rate * 1000))


@dataclass(frozen=True)
class Clock:
    """Rates of one GPU, or of one rank on a CPU, and of its links."""

    sources: str  # who measured, and how
    products: Rate  # matrix products, by FLOPs
    attention_forward: Rate  # its two products, by FLOPs of the scores that it computes: 4 head_dim each
    attention_backward: Rate  # its five: 10 head_dim each
    kernels: dict[str, Rate]  # by bytes read and written: `other`, and of KERNELS those that differ from it
    intra: dict[str, dict[int, Rate]]  # inside a node: collective -> ranks -> by bytes that a rank sends
    inter: dict[str, dict[int, Rate]] = field(default_factory=dict)  # collective -> nodes -> by bytes of it that leave
    host: Rate | None = None  # to the host's memory or from it, by bytes
    tile: int = 1  # keys: of a causal block, whole tiles of so many are computed along the diagonal
    exponentials: float | None = None  # of scores, billions a second, beside forward's products; None: within them
    wave: int | None = None  # tiles of 128 x 256 that run at once: products take whole waves; None: no waves
    call_us: float = 0.0  # the host's time for one operation: a GPU that is done earlier waits; on a CPU it comes to it
    group_us: float = 0.0  # and for FSDP2's own Python around a message of weights or of their gradients

    @classmethod
    def of(cls, values: Mapping[str, Any] | None, cluster: str) -> "Clock":
        """Of a cluster's file. Raises Invalid for one that has none, or not all that is needed."""
        if values is None:
            raise Invalid(
                f"cluster={cluster}: its speeds were neither measured nor published, so no time can be told; "
                "python -m bench -m sweep=calibrate on it, or cluster=h100 would do"
            )
        where = f"cluster={cluster}: clock"
        found = dict(values)
        for name in ("sources", "products", "attention_forward", "attention_backward", "kernels", "intra"):
            if name not in found:
                raise Invalid(f"{where}.{name} is missing")
        for name in ("products", "attention_forward", "attention_backward", "host"):
            if name != "host" or found.get(name) is not None:
                found[name] = rate(found[name], f"{where}.{name}")
        found["kernels"] = rates(found["kernels"], KERNELS, f"{where}.kernels")
        if "other" not in found["kernels"]:
            raise Invalid(f"{where}.kernels.other is missing")
        for tier in ("intra", "inter"):
            links = found.get(tier) or {}
            if not isinstance(links, Mapping):
                raise Invalid(f"{where}.{tier} is no object")
            found[tier] = {
                named(kind, COLLECTIVES, f"{where}.{tier}"): by_size(of_kind, f"{where}.{tier}.{kind}")
                for kind, of_kind in links.items()
            }
        if not_of(int, tile := found.get("tile", 1)) or tile < 1:
            raise Invalid(f"{where}.tile={tile} is no number of keys; 128 would do")
        for name in ("exponentials", "wave", "call_us", "group_us"):
            if (value := found.get(name)) is not None:
                number(value, f"{where}.{name}", least=0)
        unknown = [name for name in found if name not in cls.__dataclass_fields__]
        if unknown:
            raise Invalid(one_of(where, unknown[0], cls.__dataclass_fields__))
        return cls(**found)

    def product_us(self, flops: Any, rows: Any, columns: Any, larger: Callable = max) -> Any:
        """A product whose output is [rows, columns]: what its last wave leaves idle takes as long as the rest."""
        if self.wave is not None:
            tiles = -(-rows // 128) * -(-columns // 256)
            flops = flops * (-(-tiles // self.wave) * self.wave) / tiles
        return self.products.us(flops, larger)

    def attention_us(self, way: str, scores: Any, head_dim: Any, larger: Callable = max) -> Any:
        """forward or backward over so many query-key pairs of one head, those that are computed."""
        if way == "backward":
            return self.attention_backward.us(10 * head_dim * scores, larger)
        exponentials = scores / (self.exponentials * 1000) if self.exponentials else 0.0
        return self.attention_forward.us(4 * head_dim * scores, larger) + exponentials

    def kernel_us(self, kind: str, size: Any, larger: Callable = max) -> Any:
        """One of KERNELS that reads and writes so many bytes."""
        return self.kernels.get(kind, self.kernels["other"]).us(size, larger)

    def collective_us(self, kind: str, group: "Group", sent: Any, cluster: str, larger: Callable = max) -> Any:
        """Until the last rank of the group is done. sent: bytes that a rank sends. Raises Invalid."""
        links = self.links(kind, group, cluster)
        return reduce(larger, (rate.us(part * sent, larger) for rate, part in links))

    def links(self, kind: str, group: "Group", cluster: str) -> list[tuple[Rate, float]]:
        """Those that it passes at once: how fast, and with which part of what a rank sends. Raises Invalid."""
        found = []
        if group.nodes < group.ranks:
            here = round(group.ranks / group.nodes)
            found.append((self.curve("intra", kind, here, cluster), group.stays))
        if group.nodes > 1:
            found.append((self.curve("inter", kind, group.nodes, cluster), group.leaves))
        return found

    def host_us(self, size: Any, cluster: str, larger: Callable = max) -> Any:
        """A copy to the host's memory, or from it. Raises Invalid."""
        if self.host is None:
            raise Invalid(
                f"cluster={cluster}: how fast it copies to the host's memory was neither measured nor published"
            )
        return self.host.us(size, larger)

    def curve(self, tier: str, kind: str, size: int, cluster: str) -> Rate:
        """Of so many ranks in a node, or nodes: as measured for the nearest number. Raises Invalid."""
        sizes = getattr(self, tier).get(kind)
        if not sizes:
            across = "across nodes" if tier == "inter" else "inside a node"
            raise Invalid(f"cluster={cluster}: how fast {kind} is {across} was neither measured nor published")
        return sizes[min(sizes, key=lambda known: abs(log(known / size)))]


@dataclass(frozen=True)
class Group:
    """Ranks of a collective: how many, in how many nodes; of what one sends, which part leaves its node, at most.

    And which part passes the links within a node: in a ring everything, where parts are exchanged what does not leave.
    """

    ranks: int
    nodes: int = 1
    leaves: float = 0.0
    stays: float = 1.0


def computed(tokens: int, tile: int) -> int:
    """Query-key pairs of a causal block, query i's keys 0..i rounded up to a whole tile, where there are as many."""
    whole, rest = divmod(tokens, tile)
    return tile * tile * whole * (whole + 1) // 2 + rest * tokens


def rate(values: Any, where: str) -> Rate:
    if not isinstance(values, Mapping) or "rate" not in values:
        raise Invalid(f"{where} is no rate; {{rate: 100}} would do")
    for name, value in values.items():
        named(name, Rate.__dataclass_fields__, where)
        number(value, f"{where}.{name}", **{"above" if name in ("rate", "power") else "least": 0})
    return Rate(**values)


def rates(values: Any, names: tuple[str, ...], where: str) -> dict[str, Rate]:
    if not isinstance(values, Mapping):
        raise Invalid(f"{where} is no object")
    return {named(name, names, where): rate(each, f"{where}.{name}") for name, each in values.items()}


def by_size(values: Any, where: str) -> dict[int, Rate]:
    if not isinstance(values, Mapping) or not values:
        raise Invalid(f"{where} names no sizes of groups")
    found = {}
    for size, each in values.items():
        if not str(size).isdecimal() or int(size) < 1:
            raise Invalid(f"{where}.{size}: {size} is no number of ranks")
        found[int(size)] = rate(each, f"{where}.{size}")
    return found


def named(name: Any, names: Any, where: str) -> str:
    if name not in names:
        raise Invalid(one_of(where, name, names))
    return str(name)


def number(value: Any, where: str, least: float | None = None, above: float | None = None) -> None:
    fault = not_of(float, value) or beyond({"least": least, "above": above, "most": inf}, value)
    if fault:
        raise Invalid(f"{where}={value} {fault}")
