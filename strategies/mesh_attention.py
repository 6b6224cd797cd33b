"""mesh_attention: ranks in rows and columns, a row's queries against a column's keys, with ZeRO-3 weights.

paper           Chen et al. 2025, Mesh-Attention; StarTrail 2024 (arXiv 2407.00611)
tokens          S/N everywhere, in the order of ring.layout
weights         1/N of everything, gathered a block at a time
attention       all heads of c S/N queries, those of the row, against the keys and values of a column, r S/N of them;
                N = r c, c = ring.inner; parts of the outputs go home and are merged there
mlp             local on S/N tokens
embedding, head local on S/N tokens, their weights gathered like a block's; logits [B, S/N, V]
communication   forward: AG(q) + A2A(out) + A2A(lse) in rows, AG(k, v) in columns + AG(P);
                backward: AG(dO, q, out) + AG(lse) + RS(dq) in rows, AG(k, v) + RS(dk, dv) in columns + AG(P) + RS(P)
needs           ring.inner divides N; seq_len % 2N == 0 for zigzag, % N for contiguous and striped; nothing of heads
"""

from torch import Tensor

from strategies.ops.grid_attention import grid_attention
from strategies.ring import Ring


class MeshAttention(Ring):
    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grid_attention(q, k, v, self.ring, self.options)
