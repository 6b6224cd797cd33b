"""The mesh: world_size ranks along four named axes, and the groups that talk along each.

Order, slowest first: dp, ring, ulysses, tp. Neighbours in tp and ulysses talk most, so they are the nearest ranks
(USP paper, section 4: ulysses inside, ring outside).
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("dp", "ring", "ulysses", "tp")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, seen from this rank. An axis of size 1 has no group: nothing is ever sent along it."""

    name: str
    size: int = 1
    rank: int = 0
    mesh: DeviceMesh | None = None

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

    @classmethod
    def build(cls, device: str, dp: int = 1, ring: int = 1, ulysses: int = 1, tp: int = 1) -> "Mesh":
        """Every rank calls this once, after init_process_group with dp * ring * ulysses * tp ranks."""
        degrees = dict(zip(AXES, (dp, ring, ulysses, tp), strict=True))
        axes = axes_of(device, degrees)
        # A group of its own, so that weights and activations never queue behind one another.
        zero = axes_of(device, {"zero": dp * ring * ulysses, "tp": tp})["zero"]
        return cls(**axes, zero=zero)


def axes_of(device: str, degrees: dict[str, int]) -> dict[str, Axis]:
    """Lay the ranks out as `degrees`, first axis slowest, and return this rank's view of every axis."""
    wide = {name: size for name, size in degrees.items() if size > 1}
    axes = {name: Axis(name) for name in degrees}
    if wide:
        mesh = init_device_mesh(device, tuple(wide.values()), mesh_dim_names=tuple(wide))
        for name, size in wide.items():
            axes[name] = Axis(name, size, mesh.get_local_rank(name), mesh[name] if len(wide) > 1 else mesh)
    return axes


def neighbours(axis: Axis, size: int) -> Axis:
    """Groups of `size` consecutive ranks within `axis`, the innermost: those that hold one and the same slice."""
    if size == 1:
        return Axis(f"{axis.name}_replicas")
    name = f"{axis.name}_replicas"
    return axes_of(axis.mesh.device_type, {"others": dist.get_world_size() // size, name: size})[name]


def everyone(axis: Axis) -> Axis:
    """All ranks as one axis, on the device of `axis`."""
    return axes_of(axis.mesh.device_type, {"world": dist.get_world_size()})["world"] if axis.mesh else Axis("world")
