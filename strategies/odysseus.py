"""odysseus: TP-SP's attention, and an MLP that stays on its own tokens with ZeRO-3 weights.

paper           Fang 2024, Odysseus (github.com/feifeibear/Odysseus-Transformer)
tokens          S/N everywhere but in attention
weights         attention as tp; the MLP 1/N, gathered when it runs; the norms' gradients are summed at the end
attention       H/N heads a rank, over gathered tokens; partial outputs are summed and split again
mlp             local on S/N tokens
embedding, head as tp_sp: V/N rows a rank, logits [B, S, V/N]
communication   forward: AG(D) + RS(D) + AG(P_mlp); backward: 2 AG(D) + RS(D) + AG(P_mlp) + RS(P_mlp)
needs           n_heads % N == 0; N and n_kv_heads: one divides the other; seq_len % N == 0
"""

from torch import Tensor, nn

from strategies.ops.mesh import everyone
from strategies.tp_sp import TPSP


class Odysseus(TPSP):
    def shard(self, model: nn.Module) -> None:
        self.everyone = everyone(self.tp)
        super().shard(model)

    def shard_mlp(self, mlp: nn.Module) -> None:
        self.zero3(mlp, axis=self.everyone)

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp(x)
