"""ulysses: sequence parallelism that trades tokens for heads around attention, with ZeRO-3 weights.

paper           Jacobs et al. 2023, DeepSpeed Ulysses, section 3
tokens          S/N everywhere but in attention
weights         1/N of everything, gathered a block at a time
attention       all tokens of H/N heads: q, k, v are exchanged on the way in, the output on the way out; so whatever
                documents and windows hide, all ranks have as much to do, but none can have less than a head
mlp             local on S/N tokens
embedding, head local on S/N tokens, their weights gathered like a block's; logits [B, S/N, V]
communication   forward: 4 A2A(D/N, rho Dk/N) + AG(P); backward: 4 A2A(D/N, rho Dk/N) + AG(P) + RS(P)
needs           n_heads % N == 0; N and n_kv_heads: one divides the other (rho = N / n_kv_heads copies if N is larger);
                seq_len % N == 0
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from strategies.base import Options, Strategy
from strategies.ops.attention import attend
from strategies.ops.collectives import start_all_to_all
from strategies.ops.mesh import Axis

SEQUENCE, HEADS = 1, 2


class Ulysses(Strategy):
    def split(self, tokens: Tensor) -> Tensor:
        return tokens.chunk(self.ulysses.size, SEQUENCE)[self.ulysses.rank]

    def shard(self, model: nn.Module) -> None:
        self.zero_model(model)

    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = attn.heads(attn.project(x), rope)  # [B, S_sp, H, K], k and v [B, S_sp, G, K]
        out = self.core_attention(q, k, v)
        return attn.output(out)

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return through_heads(q, k, v, self.ulysses, self.options, self.inner_attention)

    def inner_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, S, H_sp, K], k and v [B, S, G_sp, K]
        return attend(q, k, v, self.options)

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp(x)


def through_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ulysses: Axis,
    options: Options,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """All heads of some tokens -> attention over some heads of all tokens -> all heads of some tokens.

    Heads go in options.ulysses.chunks pieces: while one is computed, those after it and the output before it are on
    their way. Every rank needs a kv head: where there are fewer, they are copied first, and only then.
    """
    copies = ulysses.size // k.shape[HEADS]
    if copies > 1:
        k, v = k.repeat_interleave(copies, HEADS), v.repeat_interleave(copies, HEADS)
    pieces = zip(*(t.chunk(options.ulysses.chunks, HEADS) for t in (q, k, v)), strict=True)
    arriving = [send_heads(*piece, ulysses, options) for piece in pieces]
    leaving = []
    for wait in arriving:
        leaving.append(start_all_to_all(attention(*wait()), SEQUENCE, HEADS, ulysses))  # -> [B, S_sp, H, K]
    outs = [out.wait() for out in leaving]
    return torch.cat(outs, HEADS) if len(outs) > 1 else outs[0]


def send_heads(
    q: Tensor, k: Tensor, v: Tensor, ulysses: Axis, options: Options
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """[B, S_sp, H, K] -> a function that waits for [B, S, H_sp, K]: in three exchanges or, packed, in one."""
    if options.ulysses.packed and ulysses.size > 1:
        by_rank = [t.unflatten(HEADS, (ulysses.size, -1)) for t in (q, k, v)]  # [B, S_sp, N, heads of that rank, K]
        together = start_all_to_all(torch.cat(by_rank, dim=3).flatten(2, 3), HEADS, SEQUENCE, ulysses)
        return lambda: together.wait().split([t.shape[3] for t in by_rank], HEADS)
    arriving_q = start_all_to_all(q, HEADS, SEQUENCE, ulysses)
    arriving_k = start_all_to_all(k, HEADS, SEQUENCE, ulysses)
    arriving_v = start_all_to_all(v, HEADS, SEQUENCE, ulysses)
    return lambda: (arriving_q.wait(), arriving_k.wait(), arriving_v.wait())
