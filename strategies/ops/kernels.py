"""Attention over one block: one facade for every kernel, with the log-sum-exp that lets blocks be merged.

    forward(q, k, v, causal, windowed)                     -> out, lse
    backward(grad, q, k, v, out, lse, causal, windowed)    -> grad_q, grad_k, grad_v

q, out: [B, Sq, H, K]; k, v: [B, Skv, G, K] with G dividing H; lse: [B, H, Sq], natural log, at least fp32. Scores are
scaled by K**-0.5. Query i sees keys 0 to Skv - 1; if windowed, from key i on; if causal, up to key Skv - Sq + i, so
that the last query sees the last key (ops/layouts.py: Tile). Either asks for Sq <= Skv. backward may be given the out
and lse of a softmax over more keys than k holds: it then returns this block's part of the whole gradient (Dao 2023,
section 3.1).
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from conf.kernels import kernel_that_runs
from strategies.ops.flash_attention import FlashAttention2, FlashAttention3, FlashAttention4, Grads, dense, window

aten = torch.ops.aten


class Kernel(Protocol):
    """What computes a block of attention."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, windowed: bool = False
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        windowed: bool = False,
    ) -> Grads: ...


class Math:
    """The reference: scores in memory, any device and dtype, accumulated in at least fp32."""

    name = "math"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, windowed: bool = False) -> tuple[Tensor, Tensor]:
        scores = self.scores(q, k, causal, windowed)
        lse = scores.logsumexp(-1)
        out = torch.einsum("bgrqk,bkgd->bqgrd", (scores - lse[..., None]).exp(), v.to(scores.dtype))
        return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        windowed: bool = False,
    ) -> Grads:
        scores = self.scores(q, k, causal, windowed)
        probs = (scores - lse.unflatten(1, (k.shape[2], -1))[..., None]).exp()  # [B, G, H/G, Sq, Skv]
        grad, out, q_, k_, v_ = (t.to(scores.dtype) for t in (grad, out, q, k, v))
        grad, out, q_ = (self.grouped(t, k) for t in (grad, out, q_))
        delta = (grad * out).sum(-1).permute(0, 2, 3, 1)[..., None]
        grad_scores = probs * (torch.einsum("bqgrd,bkgd->bgrqk", grad, v_) - delta) * q.shape[-1] ** -0.5
        grad_q = torch.einsum("bgrqk,bkgd->bqgrd", grad_scores, k_).flatten(2, 3)
        grad_k = torch.einsum("bgrqk,bqgrd->bkgd", grad_scores, q_)
        grad_v = torch.einsum("bgrqk,bqgrd->bkgd", probs, grad)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def scores(self, q: Tensor, k: Tensor, causal: bool, windowed: bool) -> Tensor:
        """[B, G, H/G, Sq, Skv]"""
        q_, k_ = self.grouped(q, k).to(wide(q.dtype)), k.to(wide(k.dtype))
        scores = torch.einsum("bqgrd,bkgd->bgrqk", q_, k_) * q.shape[-1] ** -0.5
        if causal or windowed:
            scores = scores.masked_fill(hidden(q.shape[1], k.shape[1], causal, windowed, q.device), float("-inf"))
        return scores

    def grouped(self, x: Tensor, k: Tensor) -> Tensor:
        """[B, S, H, K] -> [B, S, G, H/G, K]"""
        return x.unflatten(2, (k.shape[2], -1))


class SdpaCpu:
    """torch's flash kernel for CPU, called through aten because only there it returns the lse.

    Of tiles it knows the full ones and causal squares. A causal one with keys before the square is two calls, a
    windowed one a call with a mask for every PIECE queries and the keys that these see.
    """

    name = "sdpa"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, windowed: bool = False) -> tuple[Tensor, Tensor]:
        before = k.shape[1] - q.shape[1]
        if windowed:
            parts = [(q[:, rows], k[:, keys], v[:, keys], seen) for rows, keys, seen in pieces(q, k, causal)]
            outs, lses = zip(*(self.call(*part[:3], seen=part[3]) for part in parts), strict=True)
            return torch.cat(outs, 1), torch.cat(lses, 2)
        if not causal or not before:
            return self.call(q, k, v, causal)
        out, lse = self.call(q, k[:, before:], v[:, before:], True)
        out = accumulator(out)
        merge(out, lse, *self.call(q, k[:, :before], v[:, :before]))
        return out.to(q.dtype), lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        windowed: bool = False,
    ) -> Grads:
        before = k.shape[1] - q.shape[1]
        if windowed:
            return self.backward_of_pieces(grad, q, k, v, out, lse, causal)
        if not causal or not before:
            return self.call_backward(grad, q, k, v, out, lse, causal)
        square = self.call_backward(grad, q, k[:, before:], v[:, before:], out, lse, True)
        full = self.call_backward(grad, q, k[:, :before], v[:, :before], out, lse)
        return square[0] + full[0], *(torch.cat([full[i], square[i]], 1) for i in (1, 2))

    def backward_of_pieces(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> Grads:
        """Pieces share keys, whose gradients are summed in at least fp32."""
        grads_q, grad_kv = [], [torch.zeros_like(t, dtype=wide(t.dtype)) for t in (k, v)]
        for rows, keys, seen in pieces(q, k, causal):
            part = grad[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows]
            of_q, *of_kv = self.call_backward(*part, seen=seen)
            grads_q.append(of_q)
            for whole, of_piece in zip(grad_kv, of_kv, strict=True):
                whole[:, keys].add_(of_piece)
        return torch.cat(grads_q, 1), *(t.to(k.dtype) for t in grad_kv)

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = heads_first(q, k, v)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=seen)
        return out.transpose(1, 2), lse

    def call_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool = False,
        seen: Tensor | None = None,
    ) -> Grads:
        grad, q, k, v, out = heads_first(grad, q, k, v, out)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=seen
        )
        return heads_swapped(*grads)


PIECE = 128  # queries: fewer are more calls, more are more keys that one of them does not see


def pieces(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of a windowed tile: PIECE queries after the other, the keys that they see, and which of these each does not."""
    n, m = q.shape[1], k.shape[1]
    within = m - n if causal else m
    mask = hidden(min(PIECE, n), min(PIECE, n) + m - n if causal else m, causal, True, q.device)
    mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, float("-inf"))
    for start in range(0, n, PIECE):
        stop = min(start + PIECE, n)
        keys = slice(start, stop + within if causal else m)
        yield slice(start, stop), keys, mask[: stop - start, : keys.stop - keys.start]


def hidden(n: int, m: int, causal: bool, windowed: bool, device: torch.device) -> Tensor:
    """[n, m]: which keys each query of a tile does not see."""
    ones = torch.ones(n, m, dtype=torch.bool, device=device)
    after, before = ones.triu(m - n + 1), ones.tril(-1)
    return after | before if causal and windowed else after if causal else before


class SdpaCuda:
    """torch's flash kernel for CUDA (fp16 and bf16), below scaled_dot_product_attention, which has no window."""

    name = "sdpa"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, windowed: bool = False) -> tuple[Tensor, Tensor]:
        whole = None, None, q.shape[1], k.shape[1], 0.0, causal and not windowed, False
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *whole, **window(q, k, causal, windowed))
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        windowed: bool = False,
    ) -> Grads:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that is 0
        whole = None, None, q.shape[1], k.shape[1], 0.0, causal and not windowed, seed, seed[0]
        tensors = grad, q, k, v, out, lse.contiguous()
        return aten._flash_attention_backward(*tensors, *whole, **window(q, k, causal, windowed))


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, S, H, K] -> [B, H, S, K], a view. torch's kernels read a last dim with gaps as if it had none."""
    return heads_swapped(*dense(*tensors))


def heads_swapped(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, S, H, K] <-> [B, H, S, K], views."""
    return tuple(t.transpose(1, 2) for t in tensors)


def pick_kernel(name: str, device: str, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel called `name`; `auto` is the fastest that runs there. Raises Invalid if the named one does not."""
    kernels: dict[str, Callable[[], Kernel]] = {
        "flash_attn_3": FlashAttention3,
        "flash_attn_4": FlashAttention4,
        "flash_attn": FlashAttention2,
        "sdpa": SdpaCpu if device == "cpu" else SdpaCuda,
        "math": Math,
    }
    generation = torch.cuda.get_device_capability()[0] if device == "cuda" and torch.cuda.is_available() else 0
    return kernels[kernel_that_runs(name, device, str(dtype).removeprefix("torch."), head_dim, generation)]()


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Fold the attention over more keys into out [B, S, H, K] and lse [B, H, S], in place.

    Sigmoids of differences, not quotients of exponentials: those overflow (jzhang38/EasyContext#14).
    """
    weight = torch.sigmoid(block_lse - lse).transpose(1, 2).unsqueeze(-1)  # the block's share of the softmax
    out.lerp_(block_out.to(out.dtype), weight.to(out.dtype))
    torch.logaddexp(lse, block_lse, out=lse)


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums are kept: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def accumulator(x: Tensor) -> Tensor:
    """x in at least fp32. The caller owns x: `.to` of an fp32 tensor is the tensor itself."""
    return x.to(wide(x.dtype))
