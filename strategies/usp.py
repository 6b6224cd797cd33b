"""usp: Ulysses with ring attention in the middle, on a ulysses x ring mesh, with ZeRO-3 weights.

paper           Fang and Zhao 2024, USP, section 3
tokens          S/N everywhere but in attention: split around the ring in ring.layout, each part again over ulysses
weights         1/N of everything, gathered a block at a time
attention       S/ring tokens of H/ulysses heads: exchanged over ulysses, then keys and values travel the ring
mlp             local on S/N tokens
embedding, head local on S/N tokens, their weights gathered like a block's; logits [B, S/N, V]
communication   forward: 4 A2A(D/N, rho Dk/N) over ulysses, ring-1 hops of (k, v) + AG(P);
                backward: the same with ring-1 hops of (dk, dv) too + AG(P) + RS(P)
needs           n_heads % ulysses == 0; ulysses and n_kv_heads: one divides the other;
                seq_len % (2 ring ulysses) == 0 for zigzag, % (ring ulysses) for the others
"""

from torch import Tensor

from strategies.ops.layouts import ring_split
from strategies.ops.ring_attention import ring_attention
from strategies.ulysses import SEQUENCE, Ulysses


class USP(Ulysses):
    def split(self, tokens: Tensor) -> Tensor:
        around = ring_split(tokens, self.ring, self.options)
        return around.chunk(self.ulysses.size, SEQUENCE)[self.ulysses.rank]

    def inner_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, S_ring, H_ulysses, K]
        return ring_attention(q, k, v, self.ring, self.options)
