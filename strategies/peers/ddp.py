"""ddp: zero at zero_stage=0 with DistributedDataParallel (Li et al. 2020): bucketed all-reduces beside backward."""

from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate

from strategies.peers.averaged import Summed
from strategies.zero import Zero


class DDP(Zero):
    has_masters = False

    def shard(self, model: nn.Module) -> None:
        replicate(model, process_group=self.mesh.zero.group)

    def loss(self, head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        return Summed.apply(super().loss(head, x, labels), self.mesh.zero.size)
