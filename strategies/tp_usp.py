"""tp_usp: TP-SP's linears around USP's attention, on a tp x ulysses x ring mesh.

paper           Fang and Zhao 2024, USP, section 4 (hybrid parallelism); Korthikanti et al. 2022
tokens          S/N between the matrices: split around the ring, over ulysses and over tp; S/ring in attention
weights         slices as tp_sp, each 1/(ring ulysses) again by ZeRO; the norms' gradients are summed over tp
attention       H/tp heads of gathered tokens; H/(tp ulysses) of them after the exchange, then around the ring
mlp             F/tp columns a rank, over gathered tokens; partial outputs are summed and split again
embedding, head as tp_sp, on S/(ring ulysses) tokens: logits [B, S/(ring ulysses), V/tp]
communication   forward: 2 AG(D) + 2 RS(D) over tp, 4 A2A(D/N, rho Dk/N) over ulysses, ring-1 hops of (k, v) + AG(P);
                backward: 4 AG(D) + 2 RS(D) over tp, 4 A2A(D/N, rho Dk/N) over ulysses,
                ring-1 hops of (k, v) and of (dk, dv) + AG(P) + RS(P)
needs           n_heads % (tp ulysses) == 0; tp ulysses and n_kv_heads: one divides the other;
                seq_len % (2 ring ulysses tp) == 0 for zigzag, % (ring ulysses tp) for the others
"""

from torch import Tensor

from strategies.base import Rule, Shape, head_chunks_rule, heads_rule, sequence_rule
from strategies.ops.layouts import ring_split
from strategies.ops.ring_attention import ring_attention
from strategies.tp_sp import TPSP
from strategies.ulysses import SEQUENCE, to_heads, to_tokens


class TPUSP(TPSP):
    axes = ("tp", "ulysses", "ring")

    @classmethod
    def degrees(cls, free: int, left_open: list[str], shape: Shape) -> dict[str, int]:
        """Two ranks for each open axis, as far as they go, and the rest for the ring: no number of heads limits it."""
        degrees = {}
        for axis in left_open:
            degrees[axis] = 2 if free % 2 == 0 else 1
            free //= degrees[axis]
        degrees["ring" if "ring" in left_open else left_open[0]] *= free
        return degrees

    @classmethod
    def rules(cls, shape: Shape) -> list[Rule]:
        degree = shape.degrees["tp"] * shape.degrees["ulysses"]
        return [
            heads_rule("mesh.ulysses * mesh.tp", degree, shape),
            head_chunks_rule(degree, shape),
            sequence_rule(shape),
        ]

    def split(self, tokens: Tensor) -> Tensor:
        around = ring_split(tokens, SEQUENCE, self.options.ring_layout, self.ring)
        return around.chunk(self.ulysses.size, SEQUENCE)[self.ulysses.rank]

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        arriving = to_heads(q, k, v, self.ulysses, self.options)
        outs = (ring_attention(*chunk(), self.ring, self.options) for chunk in arriving)  # [B, S_ring, H_tp_ulysses, K]
        return to_tokens(outs, self.ulysses)  # -> [B, S_sp, H_tp, K]
