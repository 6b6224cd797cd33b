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

from strategies.base import Rule, Shape, head_chunks_rule, heads_rule, sequence_rule
from strategies.ops.layouts import ring_split
from strategies.ops.ring_attention import ring_attention
from strategies.ulysses import SEQUENCE, Ulysses, to_heads, to_tokens


class USP(Ulysses):
    axes = ("ulysses", "ring")

    @classmethod
    def degrees(cls, free: int, left_open: list[str], shape: Shape) -> dict[str, int]:
        """The widest ulysses that the heads allow without copies, as long as the ring keeps at least two ranks."""
        if len(left_open) == 1:
            return {left_open[0]: free}
        sizes = (free, shape.n_heads, shape.n_kv_heads)
        ulysses = next((u for u in range(max(1, free // 2), 1, -1) if not any(n % u for n in sizes)), 1)
        return {"ulysses": ulysses, "ring": free // ulysses}

    @classmethod
    def rules(cls, shape: Shape) -> list[Rule]:
        ulysses = shape.degrees["ulysses"]
        return [heads_rule("mesh.ulysses", ulysses, shape), head_chunks_rule(ulysses, shape), sequence_rule(shape)]

    def split(self, tokens: Tensor) -> Tensor:
        around = ring_split(tokens, SEQUENCE, self.options.ring_layout, self.ring)
        return around.chunk(self.ulysses.size, SEQUENCE)[self.ulysses.rank]

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        arriving = to_heads(q, k, v, self.ulysses, self.options)
        outs = (ring_attention(*chunk(), self.ring, self.options) for chunk in arriving)  # of [B, S_ring, H_ulysses, K]
        return to_tokens(outs, self.ulysses)  # -> [B, S_sp, H, K]
