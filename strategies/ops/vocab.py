"""Embedding, head and loss with the vocabulary split over an axis (Shoeybi et al. 2019, section 3).

Each rank holds V_tp rows of the vocabulary, so logits are [B, S, V_tp] and never whole.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from strategies.ops.collectives import sum_over
from strategies.ops.mesh import Axis

IGNORED = -100


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of token losses, in at least fp32. logits [B, S, V], labels [B, S]; label -100 counts nothing."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten(), reduction="sum", ignore_index=IGNORED)


def vocab_embedding(embedding: nn.Embedding, vocab_size: int, tokens: Tensor, axis: Axis, dtype: torch.dtype) -> Tensor:
    """tokens [B, S] -> {[B, S, D]} unreduced, in `dtype`: zeros where another rank has the token's row."""
    start, stop = axis.span(vocab_size)
    elsewhere = (tokens < start) | (tokens >= stop)
    rows = F.embedding((tokens - start).masked_fill(elsewhere, 0), embedding.weight).to(dtype)
    return rows.masked_fill(elsewhere[..., None], 0)


class VocabLossSum(Function):
    """Cross-entropy over logits [T, V_tp]: the ranks share each token's maximum, then its sum and its label's logit."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, axis: Axis) -> Tensor:
        start, stop = axis.span(vocab_size)
        wide = torch.promote_types(logits.dtype, torch.float32)
        counted = labels != IGNORED
        here = (labels >= start) & (labels < stop)
        column = (labels - start).masked_fill(~here, 0)[:, None]

        highest = max_over(logits.amax(-1).to(wide), axis)
        probs = (logits.to(wide) - highest[:, None]).exp_()  # not yet normalised
        label_logit = (logits.gather(1, column)[:, 0].to(wide) - highest).masked_fill(~here, 0)
        total, label_logit = sum_over(torch.stack([probs.sum(-1), label_logit]), axis)
        probs /= total[:, None]
        ctx.save_for_backward(probs, column, here, counted)
        ctx.dtype = logits.dtype
        return (total.log() - label_logit).masked_fill(~counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_logits, column, here, counted = ctx.saved_tensors  # probs, ours to overwrite: backward runs once
        grad_logits.scatter_add_(1, column, -here[:, None].to(grad_logits.dtype))
        grad_logits *= (grad * counted)[:, None]
        return grad_logits.to(ctx.dtype), None, None, None


def max_over(x: Tensor, axis: Axis) -> Tensor:
    torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, axis.group)
    return x


def vocab_loss_sum(logits: Tensor, labels: Tensor, vocab_size: int, axis: Axis) -> Tensor:
    """The sum of token losses, the same on every rank. logits [B, S, V_tp], labels [B, S]."""
    if axis.size == 1:
        return token_loss_sum(logits, labels)
    return VocabLossSum.apply(logits.flatten(0, 1), labels.flatten(), vocab_size, axis)
