"""tp: tensor parallelism, Megatron's first form. Every rank has every token and a slice of every matrix.

paper           Shoeybi et al. 2019, Megatron-LM, section 3
tokens          all
weights         heads and ffn columns / N; norms whole; a kv head lives on several ranks if N > n_kv_heads
attention       H/N heads a rank; partial outputs are summed
mlp             F/N columns a rank; partial outputs are summed
embedding, head V/N rows a rank: embeddings are summed, logits stay [B, S, V/N], the loss exchanges 3 numbers a token
communication   forward: 2 AR(D); backward: 2 AR(D)
needs           n_heads % N == 0; N and n_kv_heads: one divides the other
"""

from torch import Tensor, nn

from strategies.base import Strategy
from strategies.ops.attention import attend
from strategies.ops.collectives import all_reduce, copy
from strategies.ops.mesh import neighbours
from strategies.ops.vocab import vocab_embedding, vocab_loss_sum
from strategies.ops.weights import column, column_heads, row


class TP(Strategy):
    def split(self, tokens: Tensor) -> Tensor:
        return tokens

    def shard(self, model: nn.Module) -> None:
        self.vocab_size, n_kv_heads = model.config.vocab_size, model.config.n_kv_heads
        replicas = neighbours(self.mesh, max(1, self.tp.size // n_kv_heads))  # ranks that share a kv head
        column(model.embed.table, self.tp)
        column(model.head.linear, self.tp)
        model.tie()
        for block in model.blocks:
            column(block.attn.q, self.tp)
            column_heads(block.attn.k, n_kv_heads, self.tp, replicas)
            column_heads(block.attn.v, n_kv_heads, self.tp, replicas)
            row(block.attn.o, self.tp)
            self.shard_mlp(block.mlp)
        self.zero_model(model)  # over dp

    def shard_mlp(self, mlp: nn.Module) -> None:
        column(mlp.gate, self.tp)
        column(mlp.up, self.tp)
        row(mlp.down, self.tp)

    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = copy(x, self.tp)  # [B, S, D]; its gradient is the ranks' sum
        q, k, v = attn.heads(attn.project(x), rope)  # [B, S, H_tp, K], k and v [B, S, G_tp, K]
        out = self.core_attention(q, k, v)
        return all_reduce(attn.output(out), self.tp)  # {[B, S, D]} -> [B, S, D]

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.options)

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        x = copy(x, self.tp)
        return all_reduce(mlp(x), self.tp)  # [B, S, F_tp] inside

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        rows = vocab_embedding(embedding, self.vocab_size, tokens, self.tp, self.options.compute_dtype)
        return all_reduce(rows, self.tp)  # {[B, S, D]} -> [B, S, D]

    def loss(self, head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        logits = head(copy(x, self.tp))  # [B, S, V_tp]
        return vocab_loss_sum(logits, labels, self.vocab_size, self.tp)
