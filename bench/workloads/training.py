"""One rank's training: a sharded Llama, its optimizer, and the three parts of a step that the instruments time."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from conf.keys import ModelConfig, OptimConfig
from conf.mask import PLAIN, Mask
from models.llama import POINTWISE, Llama
from strategies.base import Strategy
from strategies.ops.vocab import IGNORED
from strategies.ops.weights import (
    finish_gradients,
    gradient,
    gradient_norm,
    local,
    lower,
    materialize,
    publish_weights,
    trained,
)

PRECISIONS = {  # of the weights that the optimizer updates, and of the activations and the weights as they are used
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16_mixed": (torch.float32, torch.bfloat16),
}


@dataclass
class Batch:
    """What one rank sees of a global batch. tokens, labels [B_dp, S_local]; positions [B_dp or 1, S_local]."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor  # within their documents
    mask: Mask  # of its sequences
    n_valid: int  # labels that count in the global batch
    n_own: int = 0  # of these, how many are here

    @property
    def share(self) -> float:
        return self.n_own / self.n_valid

    def labels_by_weight(self) -> float:
        """How many labels there are here, for a mean over them: fewer where some come often (1 / sum p^2)."""
        _, counts = self.labels[self.labels != IGNORED].cpu().unique(return_counts=True)
        return self.n_own**2 / float(counts.double().square().sum()) if self.n_own else 0.0


class Training:
    """Build the model's share of this rank, load its weights, then forward, backward and update in turn.

    dtypes: of weights and activations, one of PRECISIONS (tests pass float64).
    """

    def __init__(
        self,
        config: ModelConfig,
        strategy: Strategy,
        optim: OptimConfig,
        dtypes: tuple[torch.dtype, torch.dtype] = PRECISIONS["fp32"],
        recompute: str = "none",
        mlp_chunks: int = 1,
        loss_chunks: int = 1,
        offload: str = "none",
        compiled: bool = False,
    ) -> None:
        weights_dtype, compute_dtype = dtypes
        self.strategy, self.mesh, self.device = strategy, strategy.mesh, strategy.mesh.device
        with torch.device("meta"):
            model = Llama(config, strategy, compute_dtype, recompute, mlp_chunks, loss_chunks, offload)
        self.model = model.to(weights_dtype)
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        strategy.shard(self.model)
        if compute_dtype != weights_dtype and strategy.has_masters:
            lower(self.model, compute_dtype, strategy.options.gradients_in)
        if compiled:
            for module in self.model.modules():
                if isinstance(module, POINTWISE):
                    module.compile()
        self.optim = optim
        self.optimizer: torch.optim.Optimizer | None = None

    def load(self, whole: Callable[[str, torch.Size], Tensor]) -> "Training":
        """Give the model its weights: whole(name, shape) is a whole parameter, asked for one at a time."""
        materialize(self.model, self.device, lambda name: whole(name, self.shapes[name]))
        return self

    def micro_batches(self, tokens: Tensor, labels: Tensor, n: int, mask: Mask = PLAIN) -> list[Batch]:
        """This rank's part of each of n equal parts of a global batch, tokens and labels [B, S]."""
        n_valid, size = int((labels != IGNORED).sum()), len(tokens) // n
        parts = zip(tokens.chunk(n), labels.chunk(n), strict=True)
        return [self.place(*part, n_valid, mask.of(i * size, (i + 1) * size)) for i, part in enumerate(parts)]

    def place(self, tokens: Tensor, labels: Tensor, n_valid: int | None = None, mask: Mask = PLAIN) -> Batch:
        """This rank's part of whole sequences, tokens and labels [B, S]: a global batch, or one with n_valid labels."""
        n_valid = int((labels != IGNORED).sum()) if n_valid is None else n_valid
        whole = np.arange(tokens.shape[1])
        start, stop = self.mesh.dp.span(len(tokens))
        tokens, labels, mask = tokens[start:stop], labels[start:stop], mask.of(start, max(stop, start + 1))
        positions = torch.from_numpy(whole - mask.begin(whole))
        if start == stop:  # fewer sequences than dp ranks: take part in the collectives with one that counts nothing
            tokens, labels = torch.zeros_like(positions), torch.full_like(positions, IGNORED)
        self.strategy.options.mask = mask
        tokens, labels, positions = (self.strategy.split(t) for t in (tokens, labels, positions))
        n_own = int((labels != IGNORED).sum())
        tokens, labels, positions = (t.to(self.device).contiguous() for t in (tokens, labels, positions))
        return Batch(tokens, labels, positions, mask, max(1, n_valid), n_own)

    def forward(self, batch: Batch) -> Tensor:
        """This rank's share of the loss: the shares of the ranks along the zero axis add up to it."""
        self.strategy.options.mask = batch.mask
        return self.model(batch.tokens, batch.labels, batch.positions) / batch.n_valid

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Gradients add up until the last micro-batch of a step has been here."""
        loss.backward()
        if last:
            self.finish()

    def finish(self) -> None:
        finish_gradients(self.model)

    @torch.no_grad()
    def update(self) -> None:
        """Clip, AdamW, and zero the gradients, which stay allocated from step to step."""
        if self.optimizer is None:
            self.optimizer = self.make_optimizer()
        shards = self.optimizer.param_groups[0]["params"]
        for shard, grad in zip(shards, self.trained_gradients, strict=True):
            shard.grad = grad.to(shard.dtype)  # itself, unless it is kept in a narrower dtype
        if self.optim.grad_clip is not None:
            scale = (self.optim.grad_clip / (gradient_norm(self.model) + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([shard.grad for shard in shards], scale)
        self.optimizer.step()
        for shard in shards:
            shard.grad = None
        publish_weights(self.model)
        self.zero_grads()

    def warm(self) -> None:
        """Make the gradients and the optimizer's state, which a first step would leave, without its forward."""
        for parameter in self.model.parameters():
            if gradient(parameter) is None:
                parameter.grad = torch.zeros_like(parameter)
        self.update()

    def zero_grads(self) -> None:
        torch._foreach_zero_(self.gradients())

    def gradients(self) -> list[Tensor]:
        """Those that are kept on this rank."""
        return [grad for parameter in self.model.parameters() if (grad := gradient(parameter)) is not None]

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over plain tensors, this rank's shards: it is elementwise, and needs nothing from DTensor."""
        updated = list(trained(self.model))
        shards = [torch.nn.Parameter(weights) for weights, _, _, _ in updated]
        self.trained_gradients = [grad for _, grad, _, _ in updated]  # they stay where they are from step to step
        o = self.optim
        return torch.optim.AdamW(
            shards, lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, weight_decay=o.weight_decay, fused=True
        )

    @torch.no_grad()
    def state(self) -> dict[str, list[Tensor]]:
        """What of the model and its optimizer lives on this rank, after the first update."""
        parameters = list(self.model.parameters())
        masters = [weights for weights, _, share, _ in trained(self.model) if share.wide]
        moments = self.optimizer.state if self.optimizer else {}
        return {
            "params": [local(parameter).detach() for parameter in parameters],
            "grads": self.gradients(),
            "optimizer": [*masters, *(moment for state in moments.values() for moment in state.values())],
        }

    def global_loss(self, shares: Tensor) -> list[float]:
        """The losses of which each rank of the zero axis holds a share."""
        shares = shares.clone()
        if self.mesh.zero.size > 1:
            dist.all_reduce(shares, group=self.mesh.zero.group)
        return shares.tolist()
