"""Attention over one block: one facade for every kernel, with the log-sum-exp that lets blocks be merged.

    forward(q, k, v, causal)                     -> out, lse
    backward(grad, q, k, v, out, lse, causal)    -> grad_q, grad_k, grad_v

q, out: [B, Sq, H, K]; k, v: [B, Skv, G, K] with G dividing H; lse: [B, H, Sq], natural log, at least fp32. Scores are
scaled by K**-0.5. Causal means Sq == Skv and token i sees tokens 0..i. backward may be given the out and lse of a
softmax over more keys than k holds: it then returns this block's part of the whole gradient (Dao 2023, section 3.1).
"""

from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from conf.kernels import kernel_that_runs

aten = torch.ops.aten
Grads = tuple[Tensor, ...]  # of q, k and v


class Kernel(Protocol):
    """What computes a block of attention."""

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> Grads: ...


class Math:
    """The reference: scores in memory, any device and dtype, accumulated in at least fp32."""

    name = "math"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        scores = self.scores(q, k, causal)
        lse = scores.logsumexp(-1)
        out = torch.einsum("bgrqk,bkgd->bqgrd", (scores - lse[..., None]).exp(), v.to(scores.dtype))
        return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> Grads:
        scores = self.scores(q, k, causal)
        probs = (scores - lse.unflatten(1, (k.shape[2], -1))[..., None]).exp()  # [B, G, H/G, Sq, Skv]
        grad, out, q_, k_, v_ = (t.to(scores.dtype) for t in (grad, out, q, k, v))
        grad, out, q_ = (self.grouped(t, k) for t in (grad, out, q_))
        delta = (grad * out).sum(-1).permute(0, 2, 3, 1)[..., None]
        grad_scores = probs * (torch.einsum("bqgrd,bkgd->bgrqk", grad, v_) - delta) * q.shape[-1] ** -0.5
        grad_q = torch.einsum("bgrqk,bkgd->bqgrd", grad_scores, k_).flatten(2, 3)
        grad_k = torch.einsum("bgrqk,bqgrd->bkgd", grad_scores, q_)
        grad_v = torch.einsum("bgrqk,bqgrd->bkgd", probs, grad)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def scores(self, q: Tensor, k: Tensor, causal: bool) -> Tensor:
        """[B, G, H/G, Sq, Skv]"""
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bqgrd,bkgd->bgrqk", self.grouped(q, k).to(wide), k.to(wide)) * q.shape[-1] ** -0.5
        if causal:
            future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return scores

    def grouped(self, x: Tensor, k: Tensor) -> Tensor:
        """[B, S, H, K] -> [B, S, G, H/G, K]"""
        return x.unflatten(2, (k.shape[2], -1))


class SdpaCpu:
    """torch's flash kernel for CPU, called through aten because only there it returns the lse."""

    name = "sdpa"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = heads_first(q, k, v)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out.transpose(1, 2), lse

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> Grads:
        grad, q, k, v, out = heads_first(grad, q, k, v, out)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)
        return heads_swapped(*grads)


class SdpaCuda:
    """torch's flash kernel for CUDA (fp16 and bf16)."""

    name = "sdpa"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = heads_first(q, k, v)
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out.transpose(1, 2), lse

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> Grads:
        s_q, s_kv = q.shape[1], k.shape[1]
        grad, q, k, v, out = heads_first(grad, q, k, v, out)
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that is 0
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, s_q, s_kv, 0.0, causal, seed, seed[0]
        )
        return heads_swapped(*grads)


class FlashAttention2:
    """The flash-attn package (Dao 2023), fp16 and bf16 on CUDA; from 2.7 on lse is [B, H, Sq]."""

    name = "flash_attn"
    plain = MappingProxyType(
        {"dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
    )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_forward

        scale = q.shape[-1] ** -0.5
        out, lse, *_ = _flash_attn_forward(
            q, k, v, softmax_scale=scale, causal=causal, return_softmax=False, **self.plain
        )
        return out, lse

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> Grads:
        from flash_attn.flash_attn_interface import _flash_attn_backward

        grads = tuple(torch.empty_like(t) for t in (q, k, v))
        tensors = (grad.contiguous(), q, k, v, out, lse.contiguous())
        scale = q.shape[-1] ** -0.5
        _flash_attn_backward(
            *tensors, *grads, softmax_scale=scale, causal=causal, deterministic=False, rng_state=None, **self.plain
        )
        return grads


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, S, H, K] -> [B, H, S, K], a view. torch's kernels read a last dim with gaps as if it had none."""
    return tuple((t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in tensors)


def heads_swapped(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, S, H, K] <-> [B, H, S, K], views."""
    return tuple(t.transpose(1, 2) for t in tensors)


def pick_kernel(name: str, device: str, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel called `name`; `auto` is the fastest that runs there. Raises Invalid if the named one does not."""
    sdpa = SdpaCpu if device == "cpu" else SdpaCuda
    runs = kernel_that_runs(name, device, str(dtype).removeprefix("torch."), head_dim)
    return {"flash_attn": FlashAttention2, "sdpa": sdpa, "math": Math}[runs]()


class Attend(Function):
    """Causal self-attention over tokens that are all here."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
        out, lse = kernel.forward(q, k, v, causal=True)
        ctx.kernel = kernel
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *ctx.kernel.backward(grad, *ctx.saved_tensors, causal=True), None


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
    """Causal attention: q [B, S, H, K], k and v [B, S, G, K] -> [B, S, H, K]."""
    return Attend.apply(q, k, v, kernel)
