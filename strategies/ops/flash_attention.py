"""FlashAttention's packages behind the facade of kernels.py: fp16 and bf16 on CUDA.

All three return lse [B, H, Sq] in fp32 and natural log, take that of more keys in backward, and count a window from the
last key: a query sees as many keys before its own place as there are more keys than queries (Dao 2023).
"""

import torch
from torch import Tensor

Grads = tuple[Tensor, ...]  # of q, k and v


class FlashAttention2:
    """flash-attn (Dao 2023), from 2.7 on."""

    name = "flash_attn"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, windowed: bool = False) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_forward

        plain = {"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None, "return_softmax": False}
        mask = {"causal": causal, **window(q, k, causal, windowed)}
        out, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=scale(q), **mask, **plain)
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
        from flash_attn.flash_attn_interface import _flash_attn_backward

        grad, (q, k, v, out) = grad.contiguous(), dense(q, k, v, out)
        grads = tuple(torch.empty_like(t) for t in (q, k, v))
        plain = {"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None, "deterministic": False, "rng_state": None}
        mask = {"causal": causal, **window(q, k, causal, windowed)}
        _flash_attn_backward(grad, q, k, v, out, lse.contiguous(), *grads, softmax_scale=scale(q), **mask, **plain)
        return grads


class FlashAttention3:
    """flash-attn-3 (Shah et al. 2024), the folder hopper/ of flash-attention: H100 and its like.

    Its operators are called: what Python around them takes is not the same in flash-attention 2.8.3 and after it.
    """

    name = "flash_attn_3"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, windowed: bool = False) -> tuple[Tensor, Tensor]:
        import flash_attn_3._C  # noqa: F401 (registers them)

        mask = {"is_causal": causal, **window(q, k, causal, windowed)}
        out, lse, *_ = torch.ops.flash_attn_3.fwd(*dense(q, k, v), softmax_scale=scale(q), num_splits=1, **mask)
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
        import flash_attn_3._C  # noqa: F401

        grad, (q, k, v, out) = grad.contiguous(), dense(q, k, v, out)
        grads = tuple(torch.empty_like(t) for t in (q, k, v))  # versions differ in what they return
        mask = {"is_causal": causal, **window(q, k, causal, windowed)}
        torch.ops.flash_attn_3.bwd(grad, q, k, v, out, lse.contiguous(), *grads, softmax_scale=scale(q), **mask)
        return grads


class FlashAttention4:
    """flash-attn-4, in CuTe's Python, which is compiled when it is first called: Hopper and Blackwell."""

    name = "flash_attn_4"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, windowed: bool = False) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_fwd

        mask = {"causal": causal, **window(q, k, causal, windowed, unbounded=None)}
        out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale(q), return_lse=True, **mask)
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
        from flash_attn.cute.interface import _flash_attn_bwd

        mask = {"causal": causal, **window(q, k, causal, windowed, unbounded=None)}
        tensors = q, k, v, out, grad.contiguous(), lse.contiguous()
        return tuple(_flash_attn_bwd(*tensors, softmax_scale=scale(q), **mask)[:3])


def dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Without gaps in the last dim, as the kernels want it, and gradients that are made like these."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def window(q: Tensor, k: Tensor, causal: bool, windowed: bool, unbounded: int | None = -1) -> dict[str, int | None]:
    """How many keys a query sees before its own place, and after it."""
    left = k.shape[1] - q.shape[1] if windowed else unbounded
    return {"window_size_left": left, "window_size_right": 0 if causal else unbounded}
