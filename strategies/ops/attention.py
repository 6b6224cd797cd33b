"""Attention over tokens that are all here, tile by tile of what a mask lets them see."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from strategies.ops.kernels import Grads, Kernel, wide
from strategies.ops.layouts import Tile, tiles_of
from strategies.ops.options import Options


def tiled_forward(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], kernel: Kernel) -> tuple[Tensor, Tensor]:
    """out [B, S, H, K] and lse [B, H, S] of tiles in which every query is once, or in none: 0 and -inf."""
    if whole(tiles, q, k):
        return kernel.forward(q, k, v, tiles[0].causal, tiles[0].windowed)
    out, lse = torch.zeros_like(q), q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide(q.dtype))
    for tile in tiles:
        part = q[tile.queries], k[tile.keys], v[tile.keys]
        out[tile.queries], lse[tile.lse] = kernel.forward(*part, tile.causal, tile.windowed)
    return out, lse


def tiled_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Sequence[Tile], kernel: Kernel
) -> Grads:
    """The gradients of q, k and v; a key may be in several tiles, so those of k and v are summed in at least fp32."""
    if whole(tiles, q, k):
        return kernel.backward(grad, q, k, v, out, lse, tiles[0].causal, tiles[0].windowed)
    grad_q = torch.zeros_like(q)
    grad_k, grad_v = (torch.zeros_like(t, dtype=wide(t.dtype)) for t in (k, v))
    add_backward((grad_q, grad_k, grad_v), grad, q, k, v, out, lse, tiles, kernel)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def add_backward(
    grads: Grads,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Sequence[Tile],
    kernel: Kernel,
) -> None:
    """Add to the gradients of q, k and v what these tiles have to give."""
    for tile in tiles:
        part = grad[tile.queries], q[tile.queries], k[tile.keys], v[tile.keys], out[tile.queries], lse[tile.lse]
        places = tile.queries, tile.keys, tile.keys
        for whole, place, of_tile in zip(
            grads, places, kernel.backward(*part, tile.causal, tile.windowed), strict=True
        ):
            whole[place].add_(of_tile)


def whole(tiles: Sequence[Tile], q: Tensor, k: Tensor) -> bool:
    """Is all that there is one tile?"""
    return len(tiles) == 1 and all(
        (there.start or 0, there.stop) in ((0, n), (0, None))
        for there, n in ((tiles[0].rows, len(q)), (tiles[0].q, q.shape[1]), (tiles[0].kv, k.shape[1]))
    )


class Attend(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        tiles = tiles_of(0, 0, 1, q.shape[1], options)
        out, lse = tiled_forward(q, k, v, tiles, options.kernel)
        ctx.tiles, ctx.kernel = tiles, options.kernel
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *tiled_backward(grad, *ctx.saved_tensors, ctx.tiles, ctx.kernel), None


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Attention among all tokens: q [B, S, H, K], k and v [B, S, G, K] -> [B, S, H, K]."""
    return Attend.apply(q, k, v, options)
