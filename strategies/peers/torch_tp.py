"""torch_tp: tp_sp with torch's parallelize_module and SequenceParallel, and FSDP2 over dp.

The plan is the usual one for Llama: norms on sequence shards, one all-gather in front of the column-wise projections,
row-wise outputs reduce-scattered along the sequence, cross-entropy on a split vocabulary (loss_parallel).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from strategies.ops.attention import attend
from strategies.ops.vocab import IGNORED
from strategies.peers.averaged import Summed
from strategies.peers.fsdp2 import fully_shard_blocks
from strategies.tp_sp import TPSP


class TorchTP(TPSP):
    def shard(self, model: nn.Module) -> None:
        dp, tp = (torch.arange(axis.size) * axis.stride for axis in (self.dp, self.tp))
        mesh = DeviceMesh(self.mesh.device, dp[:, None] + tp, mesh_dim_names=("dp", "tp"))
        loss_parallel().__enter__()  # backward needs it too
        for block in model.blocks:
            block.attn_norm, block.mlp_norm = theirs(block.attn_norm), theirs(block.mlp_norm)
            columns = dict.fromkeys(["attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"], ColwiseParallel())
            rows = dict.fromkeys(["attn.o", "mlp.down"], RowwiseParallel(output_layouts=Shard(1)))
            norms = dict.fromkeys(["attn_norm", "mlp_norm"], SequenceParallel())
            parallelize_module(block, mesh["tp"], {**norms, **columns, **rows})
        model.head.norm = theirs(model.head.norm)
        table = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        head = ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
        parallelize_module(
            model, mesh["tp"], {"embed.table": table, "head.norm": SequenceParallel(), "head.linear": head}
        )
        finish_gradients(model)
        if self.dp.size > 1:
            fully_shard_blocks(model, mesh["dp"], self.options.compute_dtype)

    def attention(self, attn: nn.Module, x: DTensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        qkv = attn.project(x.redistribute(placements=[Replicate()]))  # [B, S_tp, D] -> [B, S, .._tp]
        out = attend(*attn.heads(qkv, rope), self.options)
        return attn.output(out)  # -> [B, S_tp, D]

    def mlp(self, mlp: nn.Module, x: DTensor) -> Tensor:
        return mlp.output(mlp.project(x.redistribute(placements=[Replicate()])))  # [B, S_tp, D] -> [B, S_tp, D]

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        return embedding(tokens)  # -> [B, S_tp, D]

    def loss(self, head: nn.Module, x: DTensor, labels: Tensor) -> Tensor:
        logits = head(x).flatten(0, 1)
        loss = F.cross_entropy(logits.float(), labels.flatten(), reduction="sum", ignore_index=IGNORED)
        loss = loss.to_local() if isinstance(loss, DTensor) else loss
        return Summed.apply(loss, self.dp.size)


class Norm(nn.RMSNorm):
    """torch's RMSNorm, whose weight is used in the activations' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def theirs(norm: nn.Module) -> Norm:
    return Norm(norm.weight.shape[0], norm.eps, dtype=norm.weight.dtype, device=norm.weight.device)


def finish_gradients(model: nn.Module) -> None:
    """Sum over tp what DTensor leaves as partial sums, the norms' gradients (FSDP2 does so by itself).

    Hooks on parameters do not survive their move from the meta device, so they are set when the model first runs.
    """

    @torch.no_grad()
    def finish(parameter: nn.Parameter) -> None:
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)

    def hook_up(model: nn.Module, inputs: tuple) -> None:
        once.remove()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(finish)

    once = model.register_forward_pre_hook(hook_up)
