"""yunchang: usp by its authors, with LongContextAttention, or UlyssesAttention where there is no ring.

Fang and Zhao 2024. Its ring accumulates into `x.to(torch.float32)`, which for an fp32 x is x itself: the gradients are
right in bf16 alone.
"""

from types import MappingProxyType

from torch import Tensor, distributed

from strategies.base import Options
from strategies.ops.mesh import Axis, Mesh
from strategies.peers.flash_attn_on_cpu import provide_flash_attn
from strategies.usp import USP


class Yunchang(USP):
    layouts = MappingProxyType({"contiguous": "basic", "zigzag": "zigzag", "striped": "strip"})

    def __init__(self, mesh: Mesh, options: Options) -> None:
        super().__init__(mesh, options)
        provide_flash_attn(options)
        from yunchang import LongContextAttention, UlyssesAttention
        from yunchang.globals import PROCESS_GROUP

        PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = own_group(self.ulysses), own_group(self.ring)
        if self.ring.size == 1:
            self.theirs = UlyssesAttention(PROCESS_GROUP.ULYSSES_PG)
        else:
            self.theirs = LongContextAttention(ring_impl_type=self.layouts[options.ring.layout])

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.theirs(q, k, v, causal=True)


def own_group(axis: Axis) -> distributed.ProcessGroup:
    """The axis' group, and of an axis of one rank a group that has it alone: theirs takes none for all ranks."""
    if axis.size > 1:
        return axis.group
    return distributed.new_group([distributed.get_rank()], use_local_synchronization=True)
