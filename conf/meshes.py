"""On which meshes a strategy can stand: its axes, what must divide by what, and how it takes ranks that are left open.

A strategy is one line of STRATEGIES, in the order in which strategies/ is read; a library that is raced is one of
PEERS. mesh.dp stands in front of them all, and takes the ranks that the others leave.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm, prod
from typing import Any

from conf.keys import CHUNKS, PLACEMENTS, Config, ModelConfig, keys, multiples
from conf.words import Invalid, around, divisors

AXES = ("dp", "tp", "ulysses", "ring")


@dataclass(frozen=True)
class Rule:
    """The value of configuration key `key` must be one of `allowed`, which rise, because `why`."""

    key: str
    value: Any
    why: str
    allowed: Sequence[Any]


Degrees = dict[str, int]  # of dp, tp, ulysses, ring
Needs = Callable[[Config, Degrees], Rule]


def alone(config: Config, degrees: Degrees) -> Rule:
    """One process."""
    return Rule("world_size", degrees["dp"], "must be 1 for single", [1])


def heads(config: Config, degrees: Degrees) -> Rule:
    """Heads in equal parts over ulysses and tp, and kv heads in equal parts or in equally many copies."""
    axes = [axis for axis in ("ulysses", "tp") if axis in degrees]
    n_heads, n_kv_heads = config.model.n_heads, config.model.n_kv_heads
    why = f"must divide model.n_heads = {n_heads} and divide, or be a multiple of, model.n_kv_heads = {n_kv_heads}"
    return Rule(
        " * ".join(f"mesh.{axis}" for axis in axes),
        prod(degrees[axis] for axis in axes),
        why,
        shares_of_heads(config),
    )


def heads_before_ulysses(config: Config, degrees: Degrees) -> Rule:
    """The same of tp alone: its ranks' heads, and the kv heads that these need, are what ulysses deals out."""
    return heads(config, {"tp": degrees["tp"]})


def shares_of_heads(config: Config) -> list[int]:
    n_heads, n_kv_heads = config.model.n_heads, config.model.n_kv_heads
    return [ranks for ranks in divisors(n_heads) if n_kv_heads % ranks == 0 or ranks % n_kv_heads == 0]


def heads_of_rank(config: Config, degrees: Degrees) -> tuple[int, int]:
    """In attention: its heads, and its kv heads, copies included."""
    ranks = degrees["ulysses"] * degrees.get("tp", 1)
    return config.model.n_heads // ranks, max(1, config.model.n_kv_heads // ranks)


def head_chunks(config: Config, degrees: Degrees) -> Rule:
    """A rank's heads, and its kv heads, in equal chunks."""
    n_heads, n_kv_heads = heads_of_rank(config, degrees)
    return Rule(
        "ulysses.chunks",
        config.ulysses.chunks,
        f"must divide a rank's heads in attention, {n_heads}, and its kv heads, {n_kv_heads}",
        divisors(gcd(n_heads, n_kv_heads)),
    )


def head_stages(config: Config, degrees: Degrees) -> Rule:
    """A rank's heads in equal stages, which have whole kv heads each, or share one in equal numbers."""
    n_heads, n_kv_heads = heads_of_rank(config, degrees)
    return Rule(
        "ulysses.stages",
        config.ulysses.stages_of(n_heads),
        f"must divide a rank's heads in attention, {n_heads}, and its kv heads, {n_kv_heads}, or the reverse",
        [stages for stages in divisors(n_heads) if n_kv_heads % stages == 0 or stages % n_kv_heads == 0],
    )


def sequence(config: Config, degrees: Degrees) -> Rule:
    """seq_len in equal parts around the ring (two a rank in zigzag), each in equal parts over ulysses and tp."""
    wide = [axis for axis in ("ring", "ulysses", "tp") if degrees.get(axis, 1) > 1]
    layout = config.ring.layout if "ring" in wide else ""
    if layout == "balanced":
        return dealt_sequence(config, degrees)
    parts = [2] if layout == "zigzag" else []
    names = " * ".join([*map(str, parts), *(f"mesh.{axis}" for axis in wide)])
    of = prod([*parts, *(degrees[axis] for axis in wide)])
    return Rule("seq_len", config.seq_len, f"must be a multiple of {names} = {of}", multiples("seq_len", of))


def dealt_sequence(config: Config, degrees: Degrees) -> Rule:
    """As many chunks for every rank of the ring, and these together in equal parts over ulysses and tp."""
    ring, within = degrees["ring"], prod(degrees.get(axis, 1) for axis in ("ulysses", "tp"))
    chunks = CHUNKS if config.ring.chunk is None and config.seq_len >= CHUNKS * ring else config.ring.chunk or 1
    of = ring * lcm(chunks, within)
    names = f"mesh.ring and a rank's part of ulysses * tp = {within} and chunks = {chunks}"
    return Rule("seq_len", config.seq_len, f"must be a multiple of {names}: of {of}", multiples("seq_len", of))


def arranged(config: Config, degrees: Degrees) -> Rule:
    """Inner rings, or rows, of equally many ranks."""
    ring = degrees["ring"]
    return Rule("ring.inner", config.ring.inner or 1, f"must divide mesh.ring = {ring}", divisors(ring))


def best_row(ring: int, model: ModelConfig) -> int:
    """Of mesh_attention, ranks of a row with which least is sent: queries along it, and keys along a column."""
    return min(divisors(ring), key=lambda row: row + ring // row * model.n_kv_heads / model.n_heads)


Fill = Callable[[Config, int, list[str]], Degrees]


def first_takes_all(config: Config, free: int, left_open: list[str]) -> Degrees:
    return {left_open[0]: free}


def widest_ulysses(config: Config, free: int, left_open: list[str]) -> Degrees:
    """The widest ulysses that the heads allow without copies, as long as the ring keeps at least two ranks."""
    shares = divisors(gcd(free, config.model.n_heads, config.model.n_kv_heads))
    ulysses = max(share for share in shares if share <= max(1, free // 2))
    return {"ulysses": ulysses, "ring": free // ulysses}


def widest_tp(config: Config, free: int, left_open: list[str]) -> Degrees:
    """The widest tp that the heads allow, and the rest for the ring."""
    tp = max(share for share in shares_of_heads(config) if free % share == 0)
    return {"tp": tp, "ring": free // tp}


def two_for_each(config: Config, free: int, left_open: list[str]) -> Degrees:
    """Two ranks for each open axis, as far as they go, and the rest for the ring: no number of heads limits it."""
    degrees = {}
    for axis in left_open:
        degrees[axis] = 2 if free % 2 == 0 else 1
        free //= degrees[axis]
    degrees["ring" if "ring" in left_open else left_open[0]] *= free
    return degrees


@dataclass(frozen=True)
class Footing:
    """Where a strategy can stand: its axes beside dp, its rules, how open axes share the ranks; `fixed`, keys that it
    has one value of; and `grid`, are the ranks of its ring in rows and columns (ring.inner)?"""

    axes: tuple[str, ...] = ()
    needs: tuple[Needs, ...] = ()
    fill: Fill = first_takes_all
    fixed: Mapping[str, object] = field(default_factory=dict)
    grid: bool = False


STRATEGIES = {
    "single": Footing(needs=(alone,)),
    "zero": Footing(),
    "tp": Footing(("tp",), (heads,)),
    "tp_sp": Footing(("tp",), (heads, sequence)),
    "ulysses": Footing(("ulysses",), (heads, head_chunks, sequence)),
    "upipe": Footing(
        ("ulysses",), (heads, head_stages, sequence), fixed={"ulysses.packed": False, "ulysses.chunks": 1}
    ),
    "ring": Footing(("ring",), (sequence, arranged)),
    "usp": Footing(("ulysses", "ring"), (heads, head_chunks, sequence, arranged), widest_ulysses),
    "tp_usp": Footing(
        ("tp", "ulysses", "ring"), (heads, heads_before_ulysses, head_chunks, sequence, arranged), two_for_each
    ),
    "odysseus": Footing(("tp", "ring"), (heads, sequence, arranged), widest_tp),
    "mesh_attention": Footing(
        ("ring",), (sequence, arranged), fixed={"ring.kv": "all_gather", "ring.backward": "kv"}, grid=True
    ),
    "tsp": Footing(("ring",), (sequence,), fixed={"ring.kv": "all_gather", "ring.backward": "kv", "mlp.chunks": 1}),
}


def at_least_two(axis: str) -> Needs:
    """Alone on its axis a peer would send to itself."""
    two_or_more = multiples(f"mesh.{axis}", 1)[1:]
    return lambda config, degrees: Rule(f"mesh.{axis}", degrees[axis], "must be at least 2 for a peer", two_or_more)


def kv_heads_divide(axis: str, library: str) -> Needs:
    """Kv heads in equal parts: a library that does not copy them has none for a rank too many."""

    def rule(config: Config, degrees: Degrees) -> Rule:
        n_kv_heads = config.model.n_kv_heads
        why = f"must divide model.n_kv_heads = {n_kv_heads}, which {library} does not copy"
        return Rule(f"mesh.{axis}", degrees[axis], why, divisors(n_kv_heads))

    return rule


def no_more_than_kv_heads(config: Config, degrees: Degrees) -> Rule:
    n_kv_heads = config.model.n_kv_heads
    why = f"must be at most model.n_kv_heads = {n_kv_heads}, which DeepSpeed does not copy"
    return Rule("mesh.ulysses", degrees["ulysses"], why, range(1, n_kv_heads + 1))


@dataclass(frozen=True)
class Peer:
    """Another library's code, raced on the mesh of the strategy of ours that it answers to."""

    ours: str
    package: str = "torch"
    needs: tuple[Needs, ...] = ()  # beside those of ours
    fixed: Mapping[str, object] = field(default_factory=dict)  # keys that it has one value of
    also: tuple[str, ...] = ()  # strategies of ours that it answers to on their meshes, beside `ours`
    attention: bool = False  # has it an attention of its own, for workload=attention
    adapted: bool = False  # does it run on our kernel, where its own is CUDA's
    causal: bool = False  # does its attention know no other mask, and no dealing out by work

    @property
    def footing(self) -> Footing:
        ours = STRATEGIES[self.ours]
        return Footing(ours.axes, (*self.needs, *ours.needs), ours.fill, self.fixed)


PEERS = {
    "ddp": Peer("zero", fixed={"zero_stage": 0}),
    "fsdp2": Peer("zero", fixed={"zero_stage": 3}),
    "torch_tp": Peer(
        "tp_sp",
        needs=(at_least_two("tp"), kv_heads_divide("tp", "torch")),
        fixed={"zero_stage": 3, "mlp.chunks": 1, "loss.chunks": 1},
    ),
    "deepspeed_ulysses": Peer(
        "ulysses", "deepspeed", needs=(at_least_two("ulysses"), no_more_than_kv_heads), attention=True
    ),
    "torch_cp": Peer("ring", needs=(at_least_two("ring"),), attention=True, adapted=True, causal=True),
    "yunchang": Peer(
        "usp",
        "yunchang",
        needs=(kv_heads_divide("ulysses", "yunchang"),),
        also=("ulysses", "ring"),
        attention=True,
        adapted=True,
        causal=True,
    ),
}


def names() -> list[str]:
    """Every strategy, ours first."""
    return [*STRATEGIES, *PEERS]


def footing_of(name: str) -> Footing:
    return STRATEGIES[name] if name in STRATEGIES else PEERS[name].footing


def fix(config: Config) -> list[str]:
    """Set what the strategy has one value of to that -> a note where another was asked for."""
    name, notes = config.strategy.name, []
    for path, value in footing_of(name).fixed.items():
        key = keys()[path]
        if key.of(config) not in (value, key.default):
            notes.append(f"{name} has {path}={str(value).lower()} alone")
        key.put(config, value)
    return notes


def rules(config: Config) -> list[Rule]:
    """What must divide by what, once every degree is known."""
    footing = footing_of(config.strategy.name)
    degrees = {axis: getattr(config.mesh, axis) for axis in ("dp", *footing.axes)}
    return [need(config, degrees) for need in footing.needs]


def fill(config: Config) -> None:
    """Degrees whose product is world_size, on axes that the strategy has, and that divide what they split."""
    name, mesh, world_size = config.strategy.name, config.mesh, config.world_size
    footing = footing_of(name)
    has = ("dp", *footing.axes)
    for axis in AXES:
        degree = getattr(mesh, axis)
        if axis not in has and (degree or 1) > 1:
            raise Invalid(f"mesh.{axis}={degree}: strategy {name} has no {axis} axis, only {' and '.join(has)}")
    if "ring" in footing.axes and mesh.ulysses is not None:
        check_context_parallel(config)
    given = {axis: degree for axis in AXES if (degree := getattr(mesh, axis)) is not None}
    product = prod(given.values())
    left_open = [axis for axis in footing.axes if axis not in given]
    if not left_open and mesh.dp is None:
        left_open = ["dp"]
    if world_size % product or (not left_open and product != world_size):
        written = " * ".join(f"mesh.{axis}" for axis in given)
        wrong = "is not" if not left_open else "is no multiple of"
        near = around(world_size, multiples("world_size", product)[: None if left_open else 1])
        raise Invalid(f"world_size={world_size} {wrong} {written} = {product}; {near} would do")
    free = world_size // product
    fills = footing.fill if len(left_open) > 1 else first_takes_all
    filled = fills(config, free, left_open) if left_open else {}
    for axis in AXES:
        setattr(mesh, axis, given.get(axis, filled.get(axis, 1)))
    for rule in rules(config):
        if rule.value not in rule.allowed:
            raise Invalid(f"{rule.key}={rule.value} {rule.why}; {around(rule.value, rule.allowed)} would do")


@dataclass(frozen=True)
class Line:
    """Ranks along an axis: how many, and how far it is from one to the next."""

    size: int
    stride: int

    def place(self, rank: int) -> int:
        return rank // self.stride % self.size

    def through(self, rank: int) -> range:
        """A rank's peers along the axis, itself among them."""
        first = rank - self.place(rank) * self.stride
        return range(first, first + self.size * self.stride, self.stride)


def lines(degrees: Mapping[str, int], placement: str, inner: int | None = None) -> dict[str, Line]:
    """The axes as a placement lays them out, and `zero`: all ranks that hold different tokens (dp x ring x ulysses).

    With ring.inner also `inner`, as many neighbours of a ring, and `outer`, those of the ring at the same place there.
    """
    found, stride = {}, 1
    for axis in reversed(PLACEMENTS[placement]):
        found[axis] = Line(degrees[axis], stride)
        stride *= degrees[axis]
    if inner is not None:
        ring = found["ring"]
        found |= {"inner": Line(inner, ring.stride), "outer": Line(ring.size // inner, ring.stride * inner)}
    tp = found["tp"]  # at either end, so that the others are one line
    return {**found, "zero": Line(stride // tp.size, tp.size if tp.stride == 1 else 1)}


def place(config: Config, rank: int) -> dict[str, int]:
    """Where a rank is along each axis."""
    return {axis: line.place(rank) for axis, line in lines_of(config).items()}


def lines_of(config: Config) -> dict[str, Line]:
    """The axes of a resolved configuration."""
    degrees = {axis: getattr(config.mesh, axis) or 1 for axis in AXES}
    return lines(degrees, config.placement, config.ring.inner)


def check_context_parallel(config: Config) -> None:
    """Ulysses' ranks are a part of the context-parallel ranks, and the ring's are the rest (MindSpeed's rule)."""
    mesh = config.mesh
    outside = (mesh.dp or 1) * (mesh.tp or 1)
    context_parallel, ulysses = config.world_size // outside, mesh.ulysses or 1
    if mesh.ring is None and config.world_size % outside == 0 and context_parallel % ulysses:
        raise Invalid(
            f"the context-parallel size, world_size / (mesh.dp * mesh.tp) = {context_parallel}, must be divisible by "
            f"mesh.ulysses={ulysses}; {around(ulysses, divisors(context_parallel))} would do"
        )
