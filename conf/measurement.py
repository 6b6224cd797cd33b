"""What is measured of a configuration, as plain data: it crosses from the ranks to the parent, and becomes a row."""

import operator
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median

from conf.clock import COLLECTIVES
from conf.keys import Config
from conf.mask import PLAIN, Mask

NOISY = 0.2  # a spread from the 10th to the 90th percentile, over the median
LAPS = ("forward", "backward", "optimizer", "step")


@dataclass
class Entry:
    """One line of comm.csv: what a step sent from one line of the source, by one kind of collective."""

    phase: str  # forward | recompute | backward | optimizer
    kind: str
    axis: str
    group_size: int
    dtype: str
    source: str  # file:line of the strategy, or the module whose weights ZeRO sends
    weights: bool  # carries weights or their gradients
    calls: int = 0
    payload_bytes: int = 0
    sent_bytes: float = 0.0


@dataclass
class Peak:
    """Bytes held at the moment when a step held most, and what they were.

    params, grads, optimizer: this rank's share of the state, always there. activations: made in forward and kept for
    backward. other: the rest of the moment: gathered weights, communication buffers, gradients in passing, the batch.
    """

    total: int = 0
    params: int = 0
    grads: int = 0
    optimizer: int = 0
    activations: int = 0
    other: int = 0


@dataclass
class Step:
    """One timed step of one rank, in milliseconds."""

    forward: float
    backward: float
    optimizer: float
    step: float
    cpu: float
    offload: float = 0.0  # of these, waited for copies to and from the host's memory


@dataclass
class Predicted:
    """A step of one rank by a cluster's clock, in milliseconds. Nothing of it is measured."""

    laps: dict[str, float]  # forward, backward, optimizer
    work: dict[str, float]  # what it computes: products, attention, kernels, optimizer; launches, for which a GPU waits
    exposed: dict[str, float]  # and what it waits for: a kind of collective, offload, copies

    @property
    def step_ms(self) -> float:
        return sum(self.laps.values())

    @property
    def exposed_comm_ms(self) -> float:
        return sum(ms for name, ms in self.exposed.items() if name in COLLECTIVES)


@dataclass(frozen=True)
class Span:
    """What a lane of a predicted step did from when to when, in us, or what the main one waited for."""

    lane: str  # a stream, the axis of collectives, offload, or model: which part of it the main stream is in
    name: str
    begun: float
    done: float
    waited: bool = False


@dataclass
class Host:
    """A machine on which ranks ran; None of what it does not tell."""

    name: str
    cpu: str
    cores: int  # that ranks may use
    memory_bytes: int
    kernel: str
    governor: str | None = None  # of the CPU's clock
    gpus: list[str] = field(default_factory=list)
    power_limits_w: list[float] = field(default_factory=list)  # of the GPUs
    links: dict[str, dict[str, str]] = field(default_factory=dict)  # of each GPU, to GPUs and network cards
    driver: str | None = None  # of the GPUs
    nccl: str | None = None
    interface: str | None = None  # over which ranks talked
    interface_mbit: int | None = None
    load_before: float | None = None  # processes that wanted a core, in the minute before and in the last one
    load_after: float | None = None


@dataclass(frozen=True)
class Work:
    """One thing that workload=collectives or kernels times: a collective of one size, or a kernel of one shape."""

    kind: str  # one of conf/clock.py's: a collective, products, attention_forward, norm, ..
    dtype: str
    bytes: int  # of a collective as nccl-tests counts its size; those that a kernel reads and writes (conf/series.py)
    shape: str = ""  # of a kernel
    tokens: int = 0
    causal: bool = False  # of attention
    flops: int = 0
    axis: str = ""  # of a collective: along which, among how many ranks of how many hosts
    ranks: int = 0
    hosts: int = 0


@dataclass
class Timed:
    """How long it took a rank, each time, in microseconds."""

    work: Work
    us: list[float]


@dataclass
class Rank:
    """What one rank measured."""

    comm: list[Entry]
    flops: int
    peak: Peak
    after_forward: int  # bytes held when forward ended
    device_name: str | None
    backend: str
    torch_version: str
    rank: int = 0
    losses: list[float] = field(default_factory=list)
    loss_shares: list[float] = field(default_factory=list)  # this rank's: those of different tokens add up to the loss
    token_shares: list[float] = field(default_factory=list)  # of the labels that count in a step, this rank's
    labels: float = 0.0  # how many the first step has, those that come often counting for more (1 / sum of p^2)
    steps: list[Step] = field(default_factory=list)
    held: list[int] = field(
        default_factory=list
    )  # bytes, of every step: at most by CUDA's allocator, or resident after it
    ideal: list[float] = field(
        default_factory=list
    )  # of workload=attention, ms: a perfect division of one process' time
    errors: dict[str, float] = field(default_factory=dict)  # of workload=attention, relative to one process
    host_bytes: int = 0  # at most, that wait in the host's memory
    reserved: int | None = None  # bytes, by CUDA's allocator
    foretold: bool = False  # of mode=simulate: were shallow models enough
    predicted: Predicted | None = None  # of mode=simulate, by the cluster's clock
    unpredicted: str = ""  # why not, where it has one
    host: Host | None = None  # on which it ran
    series: list[Timed] = field(default_factory=list)  # of workload=collectives and kernels

    @property
    def sent_bytes(self) -> float:
        return sum(entry.sent_bytes for entry in self.comm)


@dataclass
class Round:
    """All ranks of a configuration, once; and once more with collectives that return at once, where that was asked."""

    ranks: list[Rank]
    silent: list[Rank] = field(default_factory=list)


@dataclass
class Measured:
    """A configuration and all its rounds. Times are of all of them; what is counted is the same in each."""

    config: Config
    rounds: list[Round]
    mask: Mask = PLAIN  # of the sequences of the step that was counted
    derived_bytes: int | None = None  # what the account of the strategy says that the busiest rank sends
    derived_flops: int | None = None  # and what the one that does most computes
    work_max_by_mean: float | None = None  # of attention, over the ranks
    seconds: float | None = None  # how long its ranks took
    peak_tflops: float | None = None  # of the device, in this precision

    @property
    def ranks(self) -> list[Rank]:
        return self.rounds[-1].ranks

    @property
    def first(self) -> Rank:
        return self.ranks[0]

    @cached_property
    def busiest(self) -> Rank:
        """The rank that sends most."""
        return max(self.ranks, key=lambda rank: rank.sent_bytes)

    @cached_property
    def fullest(self) -> Rank:
        """The rank that holds most."""
        return max(self.ranks, key=lambda rank: rank.peak.total)

    @cached_property
    def predicted(self) -> Predicted | None:
        """Of the rank that takes longest."""
        found = [rank.predicted for rank in self.ranks if rank.predicted]
        return max(found, key=lambda each: each.step_ms, default=None)

    @property
    def flops(self) -> int:
        return max(rank.flops for rank in self.ranks)

    @property
    def timed(self) -> bool:
        return bool(self.first.steps)

    @cached_property
    def laps(self) -> dict[str, list[float]]:
        """Per lap, of every step of all rounds, the rank that took longest."""
        return {lap: [ms for each in self.rounds for ms in slowest(each.ranks, lap)] for lap in LAPS}

    @property
    def step_ms(self) -> float:
        return median(self.laps["step"])

    @property
    def tflops(self) -> float:
        return self.flops / self.step_ms / 1e9

    @property
    def cpu_ms(self) -> list[float]:
        """Of each rank, the median over its steps."""
        ranks = range(len(self.ranks))
        return [median(step.cpu for each in self.rounds for step in each.ranks[rank].steps) for rank in ranks]

    @property
    def steps_ms(self) -> list[float]:
        return slowest(self.ranks, "step")

    @property
    def steps_bytes(self) -> list[int]:
        return [max(of_ranks) for of_ranks in zip(*(rank.held for rank in self.ranks), strict=True)]

    @property
    def round_ms(self) -> list[float]:
        return [median(slowest(each.ranks, "step")) for each in self.rounds]

    @property
    def noisy(self) -> bool:
        """Do steps, or rounds, differ so much that their median says little?"""
        return any(spread(times) > NOISY for times in (self.laps["step"], self.round_ms))

    @property
    def errors(self) -> dict[str, float]:
        """Of workload=attention, each that of the rank that is farthest off."""
        names = dict.fromkeys(name for rank in self.ranks for name in rank.errors)
        return {name: max((rank.errors.get(name, 0.0) for rank in self.ranks), key=worst) for name in names}

    @property
    def ideal(self) -> list[float]:
        return [ms for each in self.rounds for ms in each.ranks[0].ideal]

    @property
    def share_of_ideal(self) -> float | None:
        return median(map(operator.truediv, self.ideal, self.laps["step"])) if self.ideal else None

    @property
    def exposed_offload_ms(self) -> float | None:
        """What the rank that waits longest waits in a step for copies to and from the host's memory."""
        if self.config.offload == "none":
            return None
        return median(ms for each in self.rounds for ms in slowest(each.ranks, "offload"))

    @property
    def exposed_comm_ms(self) -> float | None:
        """Step time less that of the same step when collectives return at once, round by round."""
        if not self.rounds[0].silent:
            return None
        return median(
            median(slowest(each.ranks, "step")) - median(slowest(each.silent, "step")) for each in self.rounds
        )

    def sent(self, *phases: str, weights: bool | None = None) -> int:
        """Bytes that the busiest rank sends in these phases (in all, if none is named), line by line as in comm.csv."""
        return sum(
            round(entry.sent_bytes)
            for entry in self.busiest.comm
            if (not phases or entry.phase in phases) and weights in (None, entry.weights)
        )

    def calls(self, kind: str) -> int:
        return sum(entry.calls for entry in self.busiest.comm if entry.kind == kind)


def slowest(ranks: list[Rank], lap: str) -> list[float]:
    """Of every step, the rank that took longest."""
    return [max(getattr(step, lap) for step in of_ranks) for of_ranks in zip(*(r.steps for r in ranks), strict=True)]


def worst(error: float) -> float:
    """To sort by: what is no number is worse than any."""
    return error if error == error else float("inf")


def spread(values: list[float]) -> float:
    return (percentile(values, 0.9) - percentile(values, 0.1)) / median(values)


def percentile(values: list[float], share: float) -> float:
    """Linearly interpolated, as numpy's."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
