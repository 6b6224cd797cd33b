"""How long a step takes, in closed form: from a strategy's account, and from what its paper says runs beside what.

    of_config(config)                                  of a resolved configuration
    Step(account, letters, machine, places).times()    of one, or of arrays of many

A second opinion on bench/simulation/replay.py, which watches the code: the two share a cluster's clock and nothing
else. What is computed is derived by hand in computed.py; here is when, and what a rank waits for meanwhile.
What an account calls `beside` something costs the time by which it is longer; for the rest a rank waits.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from analysis import UserError
from analysis.accounts import account_of, none_of, weights
from analysis.accounts.letters import Amount, Letters
from analysis.accounts.sent import GRADIENTS, Sent
from analysis.accounts.weights import Group
from analysis.computed import Computed, once
from analysis.prices import NOTHING, Machine, Places, Work, mesh_of
from conf import tiers
from conf.clock import Clock
from conf.keys import Config
from conf.meshes import AXES
from conf.words import Invalid

WAYS = {"forward": ("forward",), "backward": ("recompute", "backward")}  # of a block -> what it exchanges


@dataclass
class Phase:
    """Forward, backward or the update: what is computed, and what is waited for, by kind of collective, in us."""

    work: Work = NOTHING
    exposed: dict[str, Amount] = field(default_factory=lambda: defaultdict(float))

    @property
    def us(self) -> Amount:
        return self.work.us + sum(self.exposed.values())

    def wait(self, kind: str, us: Amount, beside: Amount = 0.0, times: Amount = 1) -> None:
        """For something that takes so long, while something else is computed."""
        self.exposed[kind] = self.exposed[kind] + times * np.maximum(0.0, us - beside)

    def add(self, other: "Phase", times: Amount = 1) -> None:
        self.work += other.work * times
        for kind, us in other.exposed.items():
            self.wait(kind, us, times=times)


@dataclass(frozen=True)
class Times:
    """Of a step, in milliseconds: its three phases, and what a device does in them."""

    forward: Amount
    backward: Amount
    optimizer: Amount
    parts: dict[str, Amount]  # products, attention, kernels; launches, for which a GPU waits
    exposed: dict[str, Amount]  # by kind of collective; offload

    @property
    def step(self) -> Amount:
        return self.forward + self.backward + self.optimizer


def of_config(config: Config) -> Times:
    """Of a resolved configuration. Raises Invalid where the cluster lacks a figure, UserError without an account."""
    step = step_of(config)
    if config.workload == "attention":
        return step.times_of_attention(config.direction == "forward_backward")
    return step.times()


def step_of(config: Config) -> "Step":
    if (account := account_of(config.strategy.name)) is None:
        raise UserError(none_of(config.strategy.name))
    s = Letters.of(config)
    degrees = {axis: getattr(config.mesh, axis) or 1 for axis in AXES}
    mesh = mesh_of(degrees, config.placement, s.kv_shared, s.inner)
    places = {axis: Places(*line) for axis, line in mesh.items()}
    return Step(account, s, machine_of(config), places, config.offload != "none")


def machine_of(config: Config) -> Machine:
    if config.cluster is None:
        raise Invalid("cluster is null, and a time is that of a machine; cluster=h100 would do")
    clock = Clock.of(config.cluster.clock, config.cluster.name)
    return Machine(clock, config.cluster.name, tiers.ranks_per_host(config), config.device)


@dataclass(frozen=True)
class Step(Computed):
    """A training step of the rank that has most to do."""

    places: Mapping[str, Places]  # of every axis
    offload: bool = False
    links: Amount = 1.0  # how many times as fast they are as the clock says

    def times(self) -> Times:
        """Every micro-batch, and the update."""
        forward, backward, update = Phase(), Phase(), Phase(self.update())
        forward.add(self.forward(), self.s.micro)
        backward.add(self.backward(), self.s.micro)
        for line in self.once_a_step():
            (update if line.phase == "optimizer" else backward).wait(line.kind, self.us(line))
        return self.told(forward, backward, update)

    def times_of_attention(self, backward: bool) -> Times:
        """workload=attention: what is between the projections of one block."""
        phases = [Phase(self.attention(way)) for way in ("forward", "backward")[: 1 + backward]]
        for phase, way in zip(phases, ("forward", "backward"), strict=False):
            for part in self.account.attention:
                phase.add(self.exchanged(way, part(replace(self.s, recompute=False))))
        return self.told(*phases, *[Phase()] * (3 - len(phases)))

    def told(self, forward: Phase, backward: Phase, update: Phase) -> Times:
        """One after the other. A GPU's host runs ahead, unless it has more to launch than that takes; a CPU is one."""
        launched, ended, ends = 0.0, 0.0, [0.0]
        for phase in (forward, backward, update):
            launched = launched + (launches := self.on.launches(phase.work))
            ended = np.maximum(ended + phase.us, launched) if self.on.on_gpu else ended + phase.us + launches
            ends.append(ended / 1000)
        whole = Phase()
        for phase in (forward, backward, update):
            whole.add(phase, 1e-3)
        parts = {part: getattr(whole.work, part) for part in ("products", "attention", "kernels")}
        parts["launches"] = ends[-1] - whole.us
        laps = [after - before for before, after in pairwise(ends)]
        return Times(laps[0], laps[1], laps[2], parts, dict(whole.exposed))

    # When what is computed, and what is waited for.

    def forward(self) -> Phase:
        """The weights of a block are gathered while the one before it is computed, the first ones before anything."""
        found, block = Phase(self.angles() + self.embedding("forward") + self.loss("forward")), self.block("forward")
        found.add(block, self.s.layers)
        found.add(self.exchanged("forward", self.account.ends(self.s)))
        gather, ends = self.gathers(self.blocks), [self.gathers([group]) for group in self.ends]
        found.wait("all_gather", ends[0])
        found.wait("all_gather", gather, self.ahead(self.embedding("forward").us))
        found.wait("all_gather", gather, self.ahead(block.us), self.s.layers - 1)
        found.wait("all_gather", sum(ends[1:]), self.ahead(block.us))
        found.wait("offload", self.to_host, block.us, self.s.layers - 1)
        return found

    def backward(self) -> Phase:
        """Beside a block the weights of the one before it are gathered, and the gradients of the one behind it summed.

        On the same links, so one after the other.
        """
        ends = self.embedding("backward") + self.loss("backward") + self.parts_of_norms()
        found, block = Phase(ends), self.block("backward")
        found.add(block, self.s.layers)
        found.add(self.exchanged("backward", self.account.ends(self.s)))
        again = self.s.stage == 3
        gather, ends_gather = again * self.gathers(self.blocks), [again * self.gathers([group]) for group in self.ends]
        reduce, ends_reduce = self.reduces(self.blocks), [self.reduces([group]) for group in self.ends]
        found.wait("all_gather", sum(ends_gather[1:]))
        found.wait("all_gather", gather, self.ahead(self.loss("backward").us))
        for more, less, times in (
            (gather, reduce, max(0, self.s.layers - 2)),
            (gather, sum(ends_reduce[1:]), 1),
            (ends_gather[0], reduce, 1),
        ):
            for kind, us, before in (("all_gather", more, 0.0), ("reduce_scatter", less, more)):
                found.wait(kind, us, np.maximum(0.0, self.ahead(block.us) - before), times)
        found.wait("reduce_scatter", reduce, self.ahead(self.embedding("backward").us))
        found.wait("reduce_scatter", ends_reduce[0])
        found.wait("offload", self.to_host, block.us, self.s.layers - 1)
        return found

    def ahead(self, us: Amount) -> Amount:
        """What a collective may take beside so much else. On a CPU nothing: what moves bytes has no core of its own."""
        return us if self.on.on_gpu else 0.0

    def block(self, way: str) -> Phase:
        """A block, forward or backward; in backward with what is run again."""
        if way == "forward":
            work = self.linears("forward") + self.attention("forward") + self.between("forward")
        else:
            work = self.linears("backward") + self.attention("backward") + self.between("backward")
            if self.s.recompute:
                work += self.linears("again") + self.attention("forward") + self.between("again")
        found = Phase(work + self.weights_of(self.blocks, way))
        found.add(self.exchanges(way))
        return found

    @once
    def exchanges(self, way: str) -> Phase:
        """Of a block, around its matrices and its attention."""
        found = Phase()
        for number, part in enumerate(self.account.linears):
            found.add(self.exchanged(way, part(self.s), number))
        for part in self.account.attention:
            found.add(self.exchanged(way, part(self.s)))
        return found

    def exchanged(self, way: str, lines: Iterable[Sent], half: int | None = None) -> Phase:
        """Waiting for what is sent, and packing it. half: of a block, beside whose products: attention's, the MLP's."""
        found, hops, shards = Phase(), defaultdict(list), defaultdict(list)
        in_grid: dict[str, dict[tuple[str, str], Amount]] = defaultdict(lambda: defaultdict(float))
        for line in (line for line in lines if line.phase in WAYS[way]):
            us, chunk = line.calls * self.us(line), 1 / self.s.head_chunks
            if line.beside == "attention":
                hops[line.phase].append(line)
            elif line.beside == "shards":
                shards[line.phase].append(line)
            elif line.beside == "products":
                beside = self.gradients("x" if line.kind == "all_gather" else "W", half)
                found.wait(line.kind, us, self.ahead(beside.us))
            elif line.axis in ("inner", "outer"):
                in_grid[line.phase][line.axis, line.kind] += us
            elif line.kind == "all_to_all":  # the first chunk of the heads on its way in, the last one on its way out
                found.wait(line.kind, us * chunk)
                beside = self.attention(pass_of(line.phase))
                found.wait(line.kind, us * (1 - chunk), self.ahead(beside.us) * (1 - chunk))
            else:
                found.wait(line.kind, us)
            found.work += self.packed(line)
        for phase, us_of in in_grid.items():
            self.across_grid(found, pass_of(phase), us_of)
        for phase, lines in hops.items():
            if self.s.needed:  # one exchange beside a rank's own keys; gradients go back when there are all
                fetched, *summed = map(self.us, lines)
                found.wait("all_to_all", fetched, self.blocks_of_attention(pass_of(phase))[0].us)
                found.wait("all_to_all", sum(summed))
                continue
            self.around_rings(found, pass_of(phase), lines)
        for phase, lines in shards.items():
            found.add(self.shards_come_by(phase, lines, half or 0))
        return found

    def across_grid(self, found: Phase, way: str, us: dict[tuple[str, str], Amount]) -> None:
        """Along rows and columns at the same time: what arrives, beside a rank's own queries with its own keys; what
        goes home in the row, beside the rest of its own queries.
        """
        own, visiting = (work.us for work in self.blocks_of_attention(way))
        rest = self.ahead(visiting * (self.s.r / self.s.inner - 1))
        found.wait("all_gather", np.maximum(us["inner", "all_gather"], us["outer", "all_gather"]), self.ahead(own))
        found.wait("all_to_all", us["inner", "all_to_all"], rest)
        late = np.maximum(us["inner", "reduce_scatter"] - rest, us["outer", "reduce_scatter"])
        found.wait("reduce_scatter", late)

    def around_rings(self, found: Phase, way: str, lines: Iterable[Sent]) -> None:
        """Beside a block the next one comes by, and beside all blocks of an inner ring that of the next of these."""
        chunks, s = self.s.head_chunks, self.s
        own, visiting = (work.us / chunks for work in self.blocks_of_attention(way))
        hop: dict[str, list[Amount]] = defaultdict(lambda: [0.0, 0.0])  # of what visits, and of its gradient
        for line in lines:
            hop[line.axis][line.of in GRADIENTS] += self.us(line)
        if s.inner is None:
            found.add(self.around(s.r, hop["ring"], own, visiting), chunks)
            return
        rings, a_ring = s.r / s.inner, own + (s.inner - 1) * np.maximum(visiting, sum(hop["inner"]))
        found.add(self.around(s.inner, hop["inner"], own, visiting), chunks)
        found.add(self.around(s.inner, hop["inner"], visiting, visiting), chunks * (rings - 1))
        found.add(self.around(rings, hop["outer"], a_ring, a_ring), chunks)

    def around(self, r: Amount, hop: Sequence[Amount], own: Amount, visiting: Amount, home: Amount = 0.0) -> Phase:
        """Beside what is computed of one block or shard the next comes by; in backward also the gradient of the one
        before, the last of them beside what is computed at `home`.
        """
        found, least, (fetched, summed) = Phase(), np.minimum(r - 1, 1), hop
        visits = [(own, fetched, least), (home, summed, least)]
        visits += [(visiting, fetched, np.minimum(r - 2, 1)), (visiting, summed, np.minimum(r - 2, 1))]
        visits += [(visiting, fetched + summed, r - 3)]
        for block, took, times in visits:
            found.wait("p2p", took, self.ahead(block), np.maximum(times, 0))
        return found

    def shards_come_by(self, phase: str, lines: list[Sent], half: int) -> Phase:
        """Each pass of them goes around beside the products of those that were in the buffer before."""
        found, r, back = Phase(), self.s.r, phase == "backward"
        way = "again" if phase == "recompute" else phase
        fetched, summed = (lines[::2], lines[1::2]) if back else (lines, [])
        for number, (matrices, hop) in enumerate(zip(self.passes(half), fetched, strict=False)):
            kernels = self.travelling(way, matrices).us
            y, x, w = (self.products(of, matrices).us / r for of in "yxW")
            first, others = (x, x + w + kernels / r) if back else (y + kernels / r, y + kernels / r)
            home = self.us(summed[number]) if back else 0.0
            found.add(self.around(r, (self.us(hop), home), first, others, w))
        return found

    def us(self, line: Sent) -> Amount:
        line = replace(line, kind="all_to_all") if line.kind == "p2p" and self.s.cycles else line
        return self.on.collective(line, self.places[line.axis]) / self.links

    def gathers(self, groups: list[Group]) -> Amount:
        """The weights of groups that travel one after the other."""
        return sum(self.us(weights.zero(group, self.s)[0]) for group in groups) if self.s.stage >= 2 else 0.0

    def reduces(self, groups: list[Group]) -> Amount:
        return sum(self.us(weights.zero(group, self.s)[-1]) for group in groups) if self.s.stage >= 2 else 0.0

    def once_a_step(self) -> list[Sent]:
        """Replicas' gradients, and their new weights; gradients of which tp ranks have a part; the gradient's norm."""
        s = self.s
        zero = weights.zero_step([*self.account.groups(s), *self.ends], s) if s.stage < 2 else []
        return [*zero, *self.account.summed_at_end(s), *weights.clipped(s)]

    @property
    def to_host(self) -> Amount:
        """A block's input on its way to the host's memory, or back."""
        return (
            self.on.clock.host_us(self.account.saved_by_block(self.s), self.on.cluster, np.maximum)
            if self.offload
            else 0.0
        )


def pass_of(phase: str) -> str:
    """Forward is what runs again, too."""
    return "backward" if phase == "backward" else "forward"
