"""single: one process, the reference that every other strategy must equal.

paper           none
tokens          all
weights         all
attention       local
mlp             local
embedding, head local
communication   forward: nothing; backward: nothing
needs           world_size 1
"""

from torch import Tensor, nn

from strategies.base import Strategy
from strategies.ops.attention import attend


class Single(Strategy):
    def split(self, tokens: Tensor) -> Tensor:
        return tokens

    def shard(self, model: nn.Module) -> None:
        pass

    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = attn.heads(attn.project(x), rope)  # [B, S, H, K], k and v [B, S, G, K]
        out = self.core_attention(q, k, v)
        return attn.output(out)

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.options)

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp(x)
