"""tp_sp: tensor parallelism with Megatron's sequence parallelism. Between the matrices, tokens are split too.

paper           Korthikanti et al. 2022, Reducing Activation Recomputation, section 4.2.2
tokens          S/N between the matrices (norms, residuals, embeddings); all of them inside
weights         as tp; the norms' gradients, each from S/N tokens, are summed at the end
attention       H/N heads a rank, over gathered tokens; partial outputs are summed and split again
mlp             F/N columns a rank, over gathered tokens; partial outputs are summed and split again
embedding, head V/N rows a rank: embeddings are summed and split, the head sees gathered tokens, logits [B, S, V/N]
communication   forward: 2 AG(D) + 2 RS(D); backward: 4 AG(D) + 2 RS(D)
needs           n_heads % N == 0; N and n_kv_heads: one divides the other; seq_len % N == 0
"""

from torch import Tensor, nn

from strategies.ops.collectives import reduce_scatter
from strategies.ops.linear import SEQUENCE, gathered_linear
from strategies.ops.vocab import vocab_embedding, vocab_loss_sum
from strategies.ops.weights import partial_gradients
from strategies.tp import TP


class TPSP(TP):
    def shard(self, model: nn.Module) -> None:
        for block in model.blocks:
            partial_gradients(block.attn_norm, self.tp)
            partial_gradients(block.mlp_norm, self.tp)
        partial_gradients(model.head.norm, self.tp)
        super().shard(model)

    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        qkv = gathered_linear(x, [attn.q, attn.k, attn.v], self.tp)  # [B, S_tp, D] -> [B, S, .._tp], gathered once
        q, k, v = attn.heads(qkv, rope)  # [B, S, H_tp, K], k and v [B, S, G_tp, K]
        out = self.core_attention(q, k, v)
        return reduce_scatter(attn.output(out), SEQUENCE, self.tp)  # {[B, S, D]} -> [B, S_tp, D]

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        def columns(x: Tensor) -> Tensor:
            projected = gathered_linear(x, [mlp.gate, mlp.up], self.tp)  # [B, S_tp, D] -> [B, S, F_tp]
            return reduce_scatter(mlp.output(projected), SEQUENCE, self.tp)  # {[B, S, D]} -> [B, S_tp, D]

        return mlp.tiled(columns, x)

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        rows = vocab_embedding(embedding, self.vocab_size, tokens, self.tp, self.options.compute_dtype)
        return reduce_scatter(rows, SEQUENCE, self.tp)  # {[B, S, D]} -> [B, S_tp, D]

    def loss(self, head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        (logits,) = gathered_linear(x, [head], self.tp)  # [B, S_tp, D] -> [B, S, V_tp]
        return vocab_loss_sum(logits, labels, self.vocab_size, self.tp)
