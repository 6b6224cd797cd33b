"""odysseus: TP-SP's attention, and an MLP that stays on its own tokens with ZeRO-3 weights.

paper           Fang 2024, Odysseus (github.com/feifeibear/Odysseus-Transformer); with mesh.ring, orthogonal to Ring
tokens          S/N everywhere but in attention
weights         attention as tp; the MLP 1/N, gathered when it runs; the norms' gradients are summed over tp
attention       H/tp heads a rank, over gathered tokens (S/ring of them, and around the ring); split again
mlp             local on S/N tokens
embedding, head as tp_sp: V/tp rows a rank, logits [B, S/ring, V/tp]
communication   forward: AG(D) + RS(D) + AG(P_mlp); backward: 2 AG(D) + RS(D) + AG(P_mlp) + RS(P_mlp)
needs           n_heads % tp == 0; tp and n_kv_heads: one divides the other; seq_len % tp == 0
                (with a ring, % (2 ring tp) for zigzag, % (ring tp) for the others)
"""

from torch import Tensor, nn

from strategies.ops.layouts import ring_split
from strategies.ops.mesh import everyone
from strategies.ops.ring_attention import ring_attention
from strategies.ops.weights import schedule_as_one
from strategies.tp_sp import TPSP


class Odysseus(TPSP):
    def split(self, tokens: Tensor) -> Tensor:
        return ring_split(tokens, self.ring, self.options)

    def shard(self, model: nn.Module) -> None:
        self.everyone = everyone(self.mesh)
        super().shard(model)
        if self.mesh.zero.size == 1:  # the MLPs are all that ZeRO shards
            schedule_as_one(model, self.everyone)

    def shard_mlp(self, mlp: nn.Module) -> None:
        self.zero(mlp, axis=self.everyone)

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, S_ring, H_tp, K]
        return ring_attention(q, k, v, self.ring, self.options)

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp(x)
