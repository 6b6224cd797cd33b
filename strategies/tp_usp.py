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
needs           n_heads % (tp ulysses) == 0; n_kv_heads and tp, n_kv_heads and tp ulysses: one divides the other;
                seq_len % (2 ring ulysses tp) == 0 for zigzag, % (ring ulysses tp) for the others
"""

from torch import Tensor

from strategies.ops.layouts import ring_split
from strategies.ops.ring_attention import ring_attention
from strategies.tp_sp import TPSP
from strategies.ulysses import SEQUENCE, through_heads


class TPUSP(TPSP):
    def split(self, tokens: Tensor) -> Tensor:
        around = ring_split(tokens, self.ring, self.options)
        return around.chunk(self.ulysses.size, SEQUENCE)[self.ulysses.rank]

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, S_sp, H_tp, K]
        return through_heads(q, k, v, self.ulysses, self.options, self.inner_attention)

    def inner_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, S_ring, H_tp_ulysses, K]
        return ring_attention(q, k, v, self.ring, self.options)
