"""Which of the bytes that a rank sends stay on its host, and which leave it.

Hosts are consecutive ranks, `ranks_per_host` of them each. What leaves a host is what its collectives put on the wire,
and so depends on how they are done:

    p2p                         a rank sends to the next one: all of it leaves the host, or nothing does; with
                                ring.cycles=all it is an all_to_all to the links
    all_to_all                  an equal part to each peer: those that are on other hosts, of all peers
    all_gather, all_reduce,     rings, on gloo as on NCCL. A ring leaves each of its hosts once, with as much as a rank
    broadcast, reduce_scatter   sends. Which of the host's ranks that is differs (NCCL has many rings, to use every
                                network card), so they share it equally; the sum over a host's ranks is exact
    reduce_scatter on gloo      parts exchanged, as in an all_to_all (strategies/ops/collectives.py)

tests/test_hosts.py holds the sums to what the kernel counts between two hosts.
"""

from conf.clock import Group
from conf.keys import Config
from conf.measurement import Entry, Host, Measured, Rank
from conf.meshes import Line, lines_of

BY_PAIRS = {"cpu": ("all_to_all", "reduce_scatter"), "cuda": ("all_to_all",)}


def ranks_per_host(config: Config) -> int:
    """As was asked for, or as a host of the simulated cluster has GPUs, or all."""
    if config.launch.ranks_per_host is not None:
        return config.launch.ranks_per_host
    if config.mode != "real" and config.cluster is not None:
        return config.cluster.gpus_per_node
    return config.world_size


def hosts(config: Config) -> int:
    return -(-config.world_size // ranks_per_host(config))


def machines(found: Measured) -> list[Host]:
    """The hosts on which ranks ran, in the order of their ranks."""
    firsts = found.ranks[:: ranks_per_host(found.config)]
    return [rank.host for rank in firsts if rank.host is not None]


def to_other_hosts(config: Config, rank: Rank) -> int:
    """Bytes that a rank sends to other hosts in a step."""
    if hosts(config) == 1:
        return 0
    return sum(round(entry.sent_bytes * share_that_leaves(config, rank.rank, entry)) for entry in rank.comm)


def share_that_leaves(config: Config, rank: int, entry: Entry) -> float:
    """Of what a rank sends in one line of comm.csv, how much leaves its host."""
    return share(config, rank, line_of(config, entry.axis, entry.group_size), entry.kind)


def share(config: Config, rank: int, line: Line, kind: str) -> float:
    """Of what a rank sends to the others on a line, how much leaves its host."""
    each, kind = ranks_per_host(config), on_links(config, kind)
    place, on_host = line.place(rank), rank % each
    before = min(place, on_host // line.stride)  # peers on this host
    after = min(line.size - 1 - place, (each - 1 - on_host) // line.stride)
    here = before + 1 + after
    if here == line.size:
        return 0.0
    if kind == "p2p":
        return float(after == 0)
    if kind in BY_PAIRS[config.device]:
        return (line.size - here) / (line.size - 1)
    return 1 / here


def group_of(config: Config, rank: int, axis: str, size: int, kind: str) -> Group:
    """For the clock: the group in which a rank does a collective. The rank that sends most out of its host decides."""
    line, kind = line_of(config, axis, size), on_links(config, kind)
    members = line.through(rank)
    each = ranks_per_host(config)
    nodes = len({member // each for member in members})
    leaves = max(share(config, member, line, kind) for member in members) if nodes > 1 else 0.0
    return Group(line.size, nodes, leaves, 1 - leaves if kind in BY_PAIRS[config.device] else 1.0)


def on_links(config: Config, kind: str) -> str:
    """As what a collective passes the links: hops around all rings at once are a part to each peer."""
    return "all_to_all" if kind == "p2p" and config.ring.cycles == "all" else kind


def line_of(config: Config, axis: str, size: int) -> Line:
    """The ranks of a group of this size, by the name of its axis; of torch's own meshes that begins with mesh_."""
    axis = axis.removeprefix("mesh_")
    if axis == "world":
        return Line(config.world_size, stride=1)
    found = lines_of(config)
    return Line(size, found["tp"].stride) if axis == "tp_replicas" else found[axis]
