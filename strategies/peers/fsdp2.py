"""fsdp2: zero with fully_shard as its documentation has it: a unit per block, the rest with the root."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from strategies.peers.averaged import Summed
from strategies.zero import Zero


class FSDP2(Zero):
    def shard(self, model: nn.Module) -> None:
        fully_shard_blocks(model, self.mesh.zero.mesh, self.options.compute_dtype)

    def loss(self, head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        return Summed.apply(super().loss(head, x, labels), self.mesh.zero.size)


def fully_shard_blocks(model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """A unit per block, and the rest with the root."""
    master_dtype = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(compute_dtype, master_dtype, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
