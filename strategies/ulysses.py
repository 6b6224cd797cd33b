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

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from strategies.base import Options, Rule, Shape, Strategy, head_chunks_rule, heads_rule, multiple
from strategies.ops.collectives import start_all_to_all
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
            head_chunks_rule(ulysses, shape),
            multiple("seq_len", shape.seq_len, ulysses, "mesh.ulysses"),
        ]

    def split(self, tokens: Tensor) -> Tensor:
        return tokens.chunk(self.ulysses.size, SEQUENCE)[self.ulysses.rank]

    def shard(self, model: nn.Module) -> None:
        self.zero_model(model)

    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = attn.heads(attn.project(x), rope)  # [B, S_sp, H, K], k and v [B, S_sp, G, K]
        out = self.core_attention(q, k, v)
        return attn.output(out)

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        arriving = to_heads(q, k, v, self.ulysses, self.options)
        outs = (attend(*chunk(), self.options.kernel) for chunk in arriving)  # of [B, S, H_sp, K], [B, S, G_sp, K]
        return to_tokens(outs, self.ulysses)  # -> [B, S_sp, H, K]

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp(x)


def to_heads(
    q: Tensor, k: Tensor, v: Tensor, ulysses: Axis, options: Options
) -> list[Callable[[], tuple[Tensor, ...]]]:
    """All heads of some tokens -> some heads of all tokens, on their way: call an item to wait for its q, k and v.

    There is one for each of options.ulysses_chunks pieces of the heads, sent in three exchanges or, packed, in one.
    Every rank needs a kv head: where there are fewer, they are copied first, and only then.
    """
    copies = ulysses.size // k.shape[HEADS]
    if copies > 1:
        k, v = k.repeat_interleave(copies, HEADS), v.repeat_interleave(copies, HEADS)

    def send(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        if options.ulysses_packed and ulysses.size > 1:
            by_rank = [t.unflatten(HEADS, (ulysses.size, -1)) for t in (q, k, v)]  # [B, S_sp, N, heads of that rank, K]
            together = start_all_to_all(torch.cat(by_rank, dim=3).flatten(2, 3), HEADS, SEQUENCE, ulysses)
            return lambda: together.wait().split([t.shape[3] for t in by_rank], HEADS)
        arriving_q = start_all_to_all(q, HEADS, SEQUENCE, ulysses)
        arriving_k = start_all_to_all(k, HEADS, SEQUENCE, ulysses)
        arriving_v = start_all_to_all(v, HEADS, SEQUENCE, ulysses)
        return lambda: (arriving_q.wait(), arriving_k.wait(), arriving_v.wait())

    return [send(*chunk) for chunk in zip(*(t.chunk(options.ulysses_chunks, HEADS) for t in (q, k, v)), strict=True)]


def to_tokens(outs: Iterable[Tensor], ulysses: Axis) -> Tensor:
    """Some heads of all tokens -> all heads of some tokens: each chunk leaves before the next is computed."""
    leaving = [start_all_to_all(out, SEQUENCE, HEADS, ulysses) for out in outs]
    chunks = [out.wait() for out in leaving]
    return torch.cat(chunks, HEADS) if len(chunks) > 1 else chunks[0]
