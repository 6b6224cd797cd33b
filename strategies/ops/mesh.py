"""The mesh: world_size ranks along four named axes, and the groups that talk along each.

Order, slowest first: dp, ring, ulysses, tp. Neighbours in tp and ulysses talk most, so they are the nearest ranks
(USP paper, section 4: ulysses inside, ring outside); placement=ring_inner swaps these two.
"""

import functools
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, seen from this rank. An axis of size 1 has no group: nothing is ever sent along it."""

    name: str
    size: int = 1
    rank: int = 0
    mesh: DeviceMesh | None = None  # of this axis alone

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    def span(self, n: int) -> tuple[int, int]:
        """The start and stop of this rank's share of n things, shares differing by at most one."""
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    def peer(self, offset: int) -> int:
        """The global rank `offset` places further along this axis, around its end."""
        return dist.get_global_rank(self.group, (self.rank + offset) % self.size)


@dataclass(frozen=True)
class Mesh:
    """The axes, and `zero`: all ranks that hold different tokens (dp x ring x ulysses), over which ZeRO shards."""

    dp: Axis
    ring: Axis
    ulysses: Axis
    tp: Axis
    zero: Axis
    device: str = "cpu"

    @classmethod
    def build(
        cls, device: str, dp: int = 1, ring: int = 1, ulysses: int = 1, tp: int = 1, placement: str = "ulysses_inner"
    ) -> "Mesh":
        """Every rank calls this once, after init_process_group with dp * ring * ulysses * tp ranks."""
        sp = {"ring": ring, "ulysses": ulysses} if placement == "ulysses_inner" else {"ulysses": ulysses, "ring": ring}
        axes = axes_of(device, {"dp": dp, **sp, "tp": tp})
        zero = axes_of(device, {"zero": dp * ring * ulysses, "inside": tp})["zero"]
        return cls(**axes, zero=zero, device=device)


def axes_of(device: str, degrees: dict[str, int]) -> dict[str, Axis]:
    """Lay the ranks out as `degrees`, first axis slowest, and return this rank's view of every axis.

    Every axis gets groups of its own, even where two have the same ranks: weights never queue behind activations,
    and a group's description says which axis it is.
    """
    axes, stride = {}, 1
    for name, size in reversed(degrees.items()):
        axes[name] = axis_of(device, name, size, stride)
        stride *= size
    return axes


@functools.cache  # groups are made once a process: they cost threads and connections
def axis_of(device: str, name: str, size: int, stride: int) -> Axis:
    """The axis along which this rank's peers are `stride` apart."""
    if size == 1:
        return Axis(name)
    me = dist.get_rank()
    place = me // stride % size
    ranks = [me + (i - place) * stride for i in range(size)]
    group = dist.new_group(ranks, use_local_synchronization=True, group_desc=name)
    return Axis(name, size, place, DeviceMesh.from_group(group, device, ranks, mesh_dim_names=(name,)))


def neighbours(mesh: Mesh, size: int) -> Axis:
    """Groups of `size` consecutive ranks within tp, the innermost axis: those that hold one and the same slice."""
    return axis_of(mesh.device, "tp_replicas", size, stride=1)


def everyone(mesh: Mesh) -> Axis:
    """All ranks as one axis."""
    return axis_of(mesh.device, "world", mesh.zero.size * mesh.tp.size, stride=1)
