"""Attention on a grid of ranks: a row's queries against a column's keys (Mesh-Attention, StarTrail).

The N ranks of a ring, c of them in a row (ring.inner) and N / c in a column, each own S/N tokens. A rank gathers the
queries of its row and the keys and values of its column, and attends. Parts of outputs go back to the owners of the
queries, with their log-sum-exp, and are merged there, in fp32: a reduce-scatter would send as much.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from strategies.ops.attention import attend, tiled_backward, tiled_forward
from strategies.ops.collectives import Pending, exchange, start_all_gather, start_reduce_scatter
from strategies.ops.kernels import Grads, accumulator, merge
from strategies.ops.layouts import positions, visible
from strategies.ops.mesh import Axis
from strategies.ops.options import Options
from strategies.ops.travels import travelling_dtype

TOKENS = 2  # the dimension of them in a message [n, B, S, ..]


class GridAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis, options: Options) -> Tensor:
        ctx.options, ctx.sides = options, sides(axis, q.shape[1], options)
        ctx.row, ctx.column = ctx.sides
        local_kv = torch.stack([k, v])
        arriving_q, arriving_kv = ctx.row.gather(q[None]), ctx.column.gather(local_kv)
        (row_q,), column_kv = arriving_q(), arriving_kv()  # [B, S_row, H, K], [2, B, S_column, G, K]
        ctx.tiles = list(visible(options.mask, ctx.row.positions, ctx.column.positions))
        parts = tiled_forward(row_q, *column_kv, ctx.tiles, options.kernel)
        outs, lses = (ctx.row.send(part) for part in (parts[0][None], parts[1].transpose(1, 2)[None]))
        out, lse = merged(outs.wait(), lses.wait(), ctx.row.axis.rank)
        ctx.save_for_backward(q, local_kv, out := out.to(q.dtype), lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        row_grad_q, *column_grad_kv = backward_of_tiles(ctx, grad)
        dtype = travelling_dtype(grad.dtype, ctx.options)
        summing = ctx.row.sum(row_grad_q[None].to(dtype)), ctx.column.sum(torch.stack(column_grad_kv).to(dtype))
        (grad_q,), (grad_k, grad_v) = (each.wait().to(grad.dtype) for each in summing)
        return grad_q, grad_k, grad_v, None, None


def backward_of_tiles(ctx: Any, grad: Tensor) -> Grads:
    """Of all queries of the row, keys and values of the column; what is gathered for it goes when it is done."""
    q, local_kv, out, lse = ctx.saved_tensors
    arriving = ctx.row.gather(torch.stack([grad, q, out])), ctx.row.gather(lse.transpose(1, 2)[None])
    arriving_kv = ctx.column.gather(local_kv)
    (row_grad, row_q, row_out), (row_lse,) = (arrived() for arrived in arriving)
    column_k, column_v = arriving_kv()
    tensors = row_grad, row_q, column_k, column_v, row_out, row_lse.transpose(1, 2)
    return tiled_backward(*tensors, ctx.tiles, ctx.options.kernel)


def merged(outs: Tensor, lses: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Of our tokens' outputs [c, 1, B, S, H, K] and log-sum-exps [c, 1, B, S, H] over each column's keys, over all.

    Our own part comes first: there every query sees itself.
    """
    out, lse = accumulator(outs[own, 0]), lses[own, 0].transpose(1, 2).contiguous()
    for other in (column for column in range(len(outs)) if column != own):
        merge(out, lse, outs[other, 0], lses[other, 0].transpose(1, 2))
    return out, lse


class Side:
    """The tokens of a row or of a column, in the order of the sequence. All messages are [n, B, S, ..]."""

    def __init__(self, axis: Axis, owned: Sequence[np.ndarray]) -> None:
        """owned: of each rank along the axis, the positions of its tokens."""
        self.axis, at = axis, np.concatenate(owned)
        order = np.argsort(at)
        self.positions, self.order, self.back = at[order], torch.from_numpy(order), torch.from_numpy(np.argsort(order))
        self.in_order = bool((order[1:] > order[:-1]).all())

    def ordered(self, x: Tensor, order: Tensor) -> Tensor:
        return x if self.in_order else x.index_select(TOKENS, order.to(x.device))

    def gather(self, x: Tensor) -> Callable[[], Tensor]:
        """This rank's x -> a function that waits for that of all."""
        if self.axis.size == 1:
            return lambda: x
        arriving = start_all_gather(x, TOKENS, self.axis)
        return lambda: self.ordered(arriving.wait(), self.order)

    def send(self, x: Tensor) -> Pending:
        """What we have of all tokens, to their owners -> [ranks, n, B, S_local, ..], what each has of ours."""
        parts = self.ordered(x, self.back).unflatten(TOKENS, (self.axis.size, -1)).movedim(TOKENS, 0)
        if self.axis.size == 1:
            return Pending([], (parts,), lambda parts: parts)
        each = [1] * self.axis.size
        return exchange(parts, each, each, self.axis)

    def sum(self, x: Tensor) -> Pending:
        """What we have of all tokens -> the ranks' sum of ours."""
        if self.axis.size == 1:
            return Pending([], (x,), lambda x: x)
        return start_reduce_scatter(self.ordered(x, self.back), TOKENS, self.axis)


def sides(ring: Axis, local_seq_len: int, options: Options) -> tuple[Side, Side]:
    """The row and the column of this rank."""
    known, key = options.mask.known, ("sides", ring, local_seq_len, options.ring.layout, options.ring.chunk)
    if key not in known:
        owned = [positions(rank, ring.size, ring.size * local_seq_len, options) for rank in range(ring.size)]
        row, column = ring.parts
        start = ring.rank - row.rank
        known[key] = Side(row, owned[start : start + row.size]), Side(column, owned[row.rank :: row.size])
    return known[key]


def grid_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis, options: Options) -> Tensor:
    """Attention in a sequence split over the ring in options.ring.layout, of whatever options.mask lets a token see.

    q [B, S_local, H, K], k and v [B, S_local, G, K] -> [B, S_local, H, K]
    """
    return attend(q, k, v, options) if axis.size == 1 else GridAttention.apply(q, k, v, axis, options)
