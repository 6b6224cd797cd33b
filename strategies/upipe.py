"""upipe: Ulysses with its heads in stages, one projected, exchanged and computed at a time, with ZeRO-3 weights.

paper           Ghadia et al. 2026, Untied Ulysses; a stage has U heads, by default one for each rank
tokens          S/N everywhere but in attention
weights         1/N of everything, gathered a block at a time
attention       all tokens of U/N heads a rank at a time, and nothing of the other heads; keys and values come once for
                all stages that need them; kept are x, out and its log-sum-exp: backward projects and exchanges again
mlp             local on S/N tokens
embedding, head local on S/N tokens, their weights gathered like a block's; logits [B, S/N, V]
communication   forward: 4 A2A(D/N, rho Dk/N), a part of it in each stage + AG(P);
                backward: 8 A2A(D/N, rho Dk/N), a part of it in each stage + AG(P) + RS(P)
needs           n_heads % N == 0; N and n_kv_heads: one divides the other (rho = N / n_kv_heads copies if N is larger);
                ulysses.stages and a rank's kv heads: one divides the other, and its heads; seq_len % N == 0
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from strategies.ops.attention import tiled_backward, tiled_forward
from strategies.ops.collectives import start_all_to_all
from strategies.ops.stages import Stages
from strategies.ulysses import HEADS, SEQUENCE, Ulysses


class UPipe(Ulysses):
    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        def project(of: str, weight: Tensor, x: Tensor) -> Tensor:  # a stage's [N, U/N, K, D] -> [B, S_sp, U, K]
            heads = F.linear(x, weight.flatten(0, 2).to(x.dtype)).unflatten(-1, (-1, attn.head_dim))
            return heads if of == "v" else attn.rotary(heads, rope)

        weights = (each.weight.unflatten(0, (-1, attn.head_dim)) for each in (attn.q, attn.k, attn.v))
        stages, parts = Stages.cut(*weights, 0, self.ulysses, self.options, project)
        return attn.output(InStages.apply(stages, *parts, x))

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def pick(of: str, part: Tensor) -> Tensor:  # a stage's [B, S_sp, N, U/N, K] -> [B, S_sp, U, K]
            return part.flatten(2, 3)

        stages, parts = Stages.cut(q, k, v, HEADS, self.ulysses, self.options, pick)
        return InStages.apply(stages, *parts)


class InStages(Function):
    """Attention of all heads of some tokens [B, S_sp, H, K]. given: what a stage's heads are made from."""

    @staticmethod
    def forward(ctx: Any, stages: Stages, *given: Tensor) -> Tensor:
        ulysses, outs, lses = stages.ulysses, [], []
        kv: list[Tensor] = []
        for stage in range(stages.count):
            made = (stages.made(of, stage, given) for of in stages.new(stage))
            arriving = [start_all_to_all(heads, HEADS, SEQUENCE, ulysses) for heads in made]
            q, *new = (heads.wait() for heads in arriving)  # [B, S, U/N, K]
            kv = new or kv
            out, lse = tiled_forward(q, *kv, stages.tiles(q), stages.options.kernel)
            outs.append(start_all_to_all(out, SEQUENCE, HEADS, ulysses).wait())  # [B, S_sp, U, K]
            lses.append(lse)
            del q, out  # before the next stage's are made
        ctx.stages, whole = stages, stages.joined(outs)
        ctx.save_for_backward(*given, *lses, whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        stages, ulysses, sums = ctx.stages, ctx.stages.ulysses, None
        kv: list[Tensor] = []
        *saved, whole = ctx.saved_tensors
        given, lses = [t.detach().requires_grad_() for t in saved[: -stages.count]], saved[-stages.count :]
        for stage, lse in enumerate(lses):
            with torch.enable_grad():
                made = (stages.made_again(of, stage, given) for of in stages.new(stage))
                arriving = [start_all_to_all(heads, HEADS, SEQUENCE, ulysses) for heads in made]
                q, *new = (heads.wait() for heads in arriving)
            kv = new or kv
            parts = (stages.part(t, stage) for t in (grad, whole))  # not before q, k, v are there: less is in flight
            arriving = [start_all_to_all(part, HEADS, SEQUENCE, ulysses) for part in parts]
            grad_out, out = (part.wait() for part in arriving)
            grad_q, *grad_kv = tiled_backward(grad_out, q, *kv, out, lse, stages.tiles(q), stages.options.kernel)
            del grad_out, out
            q.backward(grad_q)  # to its tokens, and into given
            sums = stages.added(sums, grad_kv)
            del q, grad_q, grad_kv
            if stages.ends(stage):
                torch.autograd.backward(kv, [t.to(whole.dtype) for t in sums])
                kv, sums, new = [], None, None
        return None, *(t.grad for t in given)
