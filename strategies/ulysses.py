"""ulysses: sequence parallelism that trades tokens for heads around attention, with ZeRO-3 weights.

paper           Jacobs et al. 2023, DeepSpeed Ulysses, section 3
tokens          S/N everywhere but in attention
weights         1/N of everything, gathered a block at a time
attention       all tokens of H/N heads: q, k, v are exchanged on the way in, the output on the way out
mlp             local on S/N tokens
embedding, head local on S/N tokens, their weights gathered like a block's; logits [B, S/N, V]
communication   forward: 4 A2A(D/N, rho Dk/N) + AG(P); backward: 4 A2A(D/N, rho Dk/N) + AG(P) + RS(P)
needs           n_heads % N == 0; N and n_kv_heads: one divides the other (rho = N / n_kv_heads copies if N is larger);
                seq_len % N == 0
"""

from torch import Tensor, nn

from strategies.base import Rule, Shape, Strategy, heads_rule, multiple
from strategies.ops.collectives import all_to_all
from strategies.ops.kernels import attend
from strategies.ops.mesh import Axis

SEQUENCE, HEADS = 1, 2


class Ulysses(Strategy):
    axes = ("ulysses",)

    @classmethod
    def rules(cls, shape: Shape) -> list[Rule]:
        ulysses = shape.degrees["ulysses"]
        return [
            heads_rule("mesh.ulysses", ulysses, shape),
            multiple("seq_len", shape.seq_len, ulysses, "mesh.ulysses"),
        ]

    def split(self, tokens: Tensor) -> Tensor:
        return tokens.chunk(self.ulysses.size, SEQUENCE)[self.ulysses.rank]

    def shard(self, model: nn.Module) -> None:
        self.zero_model(model)

    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = attn.heads(attn.project(x), rope)  # [B, S_sp, H, K], k and v [B, S_sp, G, K]
        k, v = copy_kv_heads(k, self.ulysses), copy_kv_heads(v, self.ulysses)
        q = all_to_all(q, HEADS, SEQUENCE, self.ulysses)  # -> [B, S, H_sp, K]
        k = all_to_all(k, HEADS, SEQUENCE, self.ulysses)  # -> [B, S, G_sp, K]
        v = all_to_all(v, HEADS, SEQUENCE, self.ulysses)
        out = attend(q, k, v, self.options.kernel)
        out = all_to_all(out, SEQUENCE, HEADS, self.ulysses)  # [B, S, H_sp, K] -> [B, S_sp, H, K]
        return attn.output(out)

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp(x)


def copy_kv_heads(kv: Tensor, ulysses: Axis) -> Tensor:
    """[B, S_sp, G, K] -> [B, S_sp, max(G, N), K]: one head for every rank, and no copy where there are enough."""
    copies = ulysses.size // kv.shape[HEADS]
    return kv.repeat_interleave(copies, HEADS) if copies > 1 else kv
