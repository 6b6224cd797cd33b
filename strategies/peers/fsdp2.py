"""fsdp2: zero with fully_shard as its documentation has it: a unit per block, the rest with the root."""

from types import MappingProxyType

from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from strategies.peers.averaged import Summed
from strategies.zero import Zero


class FSDP2(Zero):
    ours, package, adapted = "zero", "torch", False
    fixed = MappingProxyType({"zero_stage": 3})

    def shard(self, model: nn.Module) -> None:
        master_dtype = next(model.parameters()).dtype
        policy = MixedPrecisionPolicy(self.options.compute_dtype, master_dtype, cast_forward_inputs=False)
        for module in (*model.blocks, model):
            fully_shard(module, mesh=self.mesh.zero.mesh, mp_policy=policy)

    def loss(self, head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        return Summed.apply(super().loss(head, x, labels), self.mesh.zero.size)
