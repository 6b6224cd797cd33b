"""tsp: tensor and sequence parallelism on one axis. Tokens stay, shards of the weights travel around a ring.

paper           Shyam et al. 2026, Folding Tensor and Sequence Parallelism (arXiv 2604.26294)
tokens          S/N everywhere, in the order of ring.layout
weights         1/N of every matrix, two shards of it while it runs; the norms whole, their gradients summed over the
                ring; embedding and head 1/N, gathered when they run
attention       all heads of S/N queries, against all keys and values, gathered
mlp             local on S/N tokens: gate and up come by, and then the product meets down, which adds to the output
embedding, head local on S/N tokens, their weights gathered; logits [B, S/N, V]
communication   W a buffer of shards, of q, k, v; of o; of gate, up; of down. forward: 4 x N-1 hops of (W) + AG(k, v);
                backward: 4 x N-1 hops of (W) and of (dW) + AG(k, v) + RS(dk, dv)
needs           seq_len % 2N == 0 for zigzag, % N for contiguous and striped, % 8N for balanced; nothing of heads;
                it has ring.kv=all_gather and mlp.chunks=1 alone
"""

from torch import Tensor, nn

from strategies.base import Strategy
from strategies.ops.layouts import ring_split
from strategies.ops.ring_attention import ring_attention
from strategies.ops.travelling_linears import column_linears, row_linear
from strategies.ops.weights import column, gather_nothing_ahead, partial_gradients, row, schedule_as_one


class TSP(Strategy):
    def split(self, tokens: Tensor) -> Tensor:
        return ring_split(tokens, self.ring, self.options)

    def shard(self, model: nn.Module) -> None:
        for block in model.blocks:
            attn, mlp = block.attn, block.mlp
            for linear in (attn.q, attn.k, attn.v, attn.o, mlp.gate, mlp.up):
                column(linear, self.ring)
            row(mlp.down, self.ring)
            partial_gradients(block.attn_norm, self.ring)
            partial_gradients(block.mlp_norm, self.ring)
            self.zero(block, axis=self.dp)
        self.zero_ends(model)
        schedule_as_one(model, self.mesh.zero)
        if self.dp.size == 1:
            gather_nothing_ahead(model.head)

    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        qkv = column_linears(x, [attn.q, attn.k, attn.v], self.ring, self.options)
        q, k, v = attn.heads(qkv, rope)  # [B, S_ring, H, K], k and v [B, S_ring, G, K]
        out = self.core_attention(q, k, v)
        (y,) = column_linears(out.flatten(2), [attn.o], self.ring, self.options)
        return y

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, self.ring, self.options)

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        gate, up = column_linears(x, [mlp.gate, mlp.up], self.ring, self.options)  # [B, S_ring, F]
        return row_linear(mlp.made(mlp.swiglu, gate, up), mlp.down, self.ring, self.options)
