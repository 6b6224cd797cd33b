"""ring: queries stay, keys and values travel around a ring of ranks, with ZeRO-3 weights.

paper           Liu et al. 2023, Ring Attention with Blockwise Transformers; layouts: see ops/layouts.py
tokens          S/N everywhere, in the order of ring.layout
weights         1/N of everything, gathered a block at a time
attention       all heads of S/N queries, against one visiting block of keys and values after the other, tile by tile of
                what documents and windows let them see
mlp             local on S/N tokens
embedding, head local on S/N tokens, their weights gathered like a block's; logits [B, S/N, V]
communication   forward: N-1 hops of (k, v) + AG(P); backward: N-1 hops of (k, v) and of (dk, dv) + AG(P) + RS(P)
needs           seq_len % 2N == 0 for zigzag, % N for contiguous and striped, % 8N for balanced; nothing of heads
"""

from torch import Tensor, nn

from strategies.base import Strategy
from strategies.ops.layouts import ring_split
from strategies.ops.ring_attention import ring_attention


class Ring(Strategy):
    def split(self, tokens: Tensor) -> Tensor:
        return ring_split(tokens, self.ring, self.options)

    def shard(self, model: nn.Module) -> None:
        self.zero_model(model)

    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = attn.heads(attn.project(x), rope)  # [B, S_sp, H, K], k and v [B, S_sp, G, K]
        out = self.core_attention(q, k, v)
        return attn.output(out)

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, self.ring, self.options)

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp(x)
