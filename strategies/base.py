"""What a strategy is: the answers to "which tokens, which weights, what do I send", in straight-line code.

A strategy is asked four things, and its file is those four answers under a card:

    split(tokens)             which tokens of each sequence do I own
    shard(model)              which weights do I own
    attention(attn, x, rope)  what do I exchange in attention
    mlp(mlp, x)               what do I exchange in the MLP

attention calls `core_attention(q, k, v)` for what happens between its projections. It has a name of its own because it
is what workload=attention measures alone, and what "X is Y with another attention in the middle" replaces.

Two more are asked at the model's ends, `embed` and `loss`. Wherever tokens are split they need no exchange of their
own, so the answers below serve; strategies with a tp axis split the vocabulary instead (Megatron), and say so.

mesh.dp stands in front of every strategy: it deals out the batch, and ZeRO shards over it too.

The rules of every answer: gradients are SUMS over ranks, never averages, since the loss is divided by the global token
count once; verbs come from ops/collectives.py and name their axis; and nothing is kept whole that the card says is 1/N.
"""

from torch import Tensor, nn

from strategies.ops.mesh import Axis, Mesh
from strategies.ops.options import Options
from strategies.ops.vocab import token_loss_sum
from strategies.ops.weights import zero


class Strategy:
    """Inherit, fill in the card and the four answers, and say in conf/meshes.py on which meshes it can stand."""

    has_masters = True  # in mixed precision; peers have their own way

    def __init__(self, mesh: Mesh, options: Options) -> None:
        self.mesh, self.options = mesh, options
        self.dp, self.ring, self.ulysses, self.tp = mesh.dp, mesh.ring, mesh.ulysses, mesh.tp

    def split(self, tokens: Tensor) -> Tensor:
        """[B, S] -> [B, S_local], this rank's tokens. Called for tokens, labels and positions alike."""
        raise NotImplementedError

    def shard(self, model: nn.Module) -> None:
        """Keep this rank's slice of every weight of a meta model."""
        raise NotImplementedError

    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x as the blocks pass it on -> the same shape."""
        raise NotImplementedError

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, S_local, H_tp, K], k and v [B, S_local, G_tp, K] -> [B, S_local, H_tp, K]

        Over all tokens, as far as options.mask lets each see: those before it, of its document, within its window.
        """
        raise NotImplementedError(f"{type(self).__name__} has no core_attention, and workload=attention measures it")

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        """x as the blocks pass it on -> the same shape."""
        raise NotImplementedError

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        """tokens [B, S_local] -> x [B, S_local, D]"""
        return embedding(tokens)

    def loss(self, head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        """x [B, S_local, D], labels [B, S_local] -> the sum of the token losses."""
        return token_loss_sum(head(x), labels)

    def zero(self, *modules: nn.Module, axis: Axis | None = None) -> None:
        """ZeRO over all ranks that hold different tokens (or over `axis`), at the configured stage and dtype."""
        options, axis = self.options, axis or self.mesh.zero
        dtypes = {"compute_dtype": options.compute_dtype, "grad_dtype": options.gradients_in}
        zero(*modules, axis=axis, stage=options.zero_stage, **dtypes)

    def zero_model(self, model: nn.Module) -> None:
        """ZeRO for a whole model: the weights of each block, of the embedding and of the head travel together."""
        for block in model.blocks:
            self.zero(block)
        self.zero_ends(model)
        self.zero(model)  # owns no weight itself; FSDP2 schedules the others from it

    def zero_ends(self, model: nn.Module) -> None:
        for modules in [[model.embed, model.head]] if model.config.tie_embeddings else [[model.embed], [model.head]]:
            self.zero(*modules)
