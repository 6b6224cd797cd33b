"""The mesh: world_size ranks along four named axes, and the groups that talk along each.

Neighbours in tp and ulysses talk most, so they are the nearest ranks, unless another placement is asked for (USP paper,
section 4: ulysses inside, ring outside; the orders are in conf/keys.py).
"""

import functools
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from conf.meshes import Line, lines


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, seen from this rank. An axis of size 1 has no group: nothing is ever sent along it."""

    name: str
    size: int = 1
    rank: int = 0
    mesh: DeviceMesh | None = None  # of this axis alone
    stride: int = 1  # from one rank to the next
    parts: tuple["Axis", "Axis"] | None = None  # of a ring with ring.inner: its inner and its outer axis

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    def span(self, n: int) -> tuple[int, int]:
        """The start and stop of this rank's share of n things, shares differing by at most one."""
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    def place(self, offset: int) -> int:
        """The rank along this axis that is `offset` places further, around its end."""
        return (self.rank + offset) % self.size

    def peer(self, offset: int) -> int:
        """The same as a global rank."""
        return dist.get_global_rank(self.group, self.place(offset))


@dataclass(frozen=True)
class Mesh:
    """The axes, and `zero`, over which ZeRO shards: all ranks that hold different tokens."""

    dp: Axis
    ring: Axis
    ulysses: Axis
    tp: Axis
    zero: Axis
    device: str = "cpu"

    @classmethod
    def build(
        cls,
        device: str,
        dp: int = 1,
        ring: int = 1,
        ulysses: int = 1,
        tp: int = 1,
        placement: str = "ulysses_inner",
        inner: int | None = None,
    ) -> "Mesh":
        """Every rank calls this once, after init_process_group with dp * ring * ulysses * tp ranks."""
        degrees = {"dp": dp, "ring": ring, "ulysses": ulysses, "tp": tp}
        axes = {name: axis_of(device, name, line) for name, line in lines(degrees, placement, inner).items()}
        if inner is not None:
            axes["ring"] = replace(axes["ring"], parts=(axes.pop("inner"), axes.pop("outer")))
        return cls(**axes, device=device)


@functools.cache  # groups are made once a process: they cost threads and connections
def axis_of(device: str, name: str, line: Line) -> Axis:
    """This rank's view of an axis.

    Every axis gets groups of its own, even where two have the same ranks: weights never queue behind activations,
    and a group's description says which axis it is.
    """
    if line.size == 1:
        return Axis(name)
    me = dist.get_rank()
    ranks = list(line.through(me))
    group = dist.new_group(ranks, use_local_synchronization=True, group_desc=name)
    mesh = DeviceMesh.from_group(group, device, ranks, mesh_dim_names=(name,))
    return Axis(name, line.size, line.place(me), mesh, line.stride)


def neighbours(mesh: Mesh, size: int) -> Axis:
    """Groups of `size` neighbours along tp: those that hold one and the same slice."""
    return axis_of(mesh.device, "tp_replicas", Line(size, mesh.tp.stride))


def everyone(mesh: Mesh) -> Axis:
    """All ranks as one axis."""
    return axis_of(mesh.device, "world", Line(mesh.zero.size * mesh.tp.size, stride=1))
