"""deepspeed_ulysses: ulysses with DeepSpeed's DistributedAttention (Jacobs et al. 2023, their own code)."""

import os

from torch import Tensor

from strategies.base import Options
from strategies.ops.attention import attend
from strategies.ops.mesh import Mesh
from strategies.ulysses import HEADS, SEQUENCE, Ulysses


class DeepspeedUlysses(Ulysses):
    def __init__(self, mesh: Mesh, options: Options) -> None:
        super().__init__(mesh, options)
        os.environ.setdefault("DS_ACCELERATOR", mesh.device)  # it would look for one, and warn that it found none
        from deepspeed import comm, ops
        from deepspeed.sequence.layer import DistributedAttention

        ops.__compatible_ops__.pop("deepspeed_shm_comm", None)  # its all-reduce for inference, compiled when it starts
        comm.init_distributed(dist_init_required=False, verbose=False)
        self.theirs = DistributedAttention(self.local_attention, self.ulysses.group, HEADS, SEQUENCE)

    def local_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.options)

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.theirs(q, k, v, batch_dim_idx=0)
