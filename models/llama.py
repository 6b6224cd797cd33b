"""Llama, as one process would write it. It knows nothing of ranks.

Whatever touches more than this process's tokens or weights is asked of `strategy`, at four places: the embedding,
each block's attention, each block's MLP, and the head with its loss (see strategies/base.py). Everything else is
plain PyTorch on whatever tokens and whatever slice of the weights is here. Embed, Block and Head each ask from their
own forward, so that a strategy can have their weights gathered when they run.

Shapes: B batch, S tokens, D dim, H heads, G kv heads, K head_dim, F ffn_dim, V vocabulary.
Sources: Touvron et al. 2023 (Llama 2), Grattafiori et al. 2024 (Llama 3), Su et al. 2021 (RoPE).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from conf.keys import ModelConfig
from models.offload import Offload
from models.remade import Kept, Remade


class Strategy(Protocol):
    """Who is asked wherever more is touched than this process's tokens or weights (strategies/base.py)."""

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor: ...

    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor: ...

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor: ...

    def loss(self, head: nn.Module, x: Tensor, labels: Tensor) -> Tensor: ...


class Linear(nn.Linear):
    """y = x W^T. The weight is used in the activations' dtype, so fp32 master weights can serve bf16 activations."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return Normalized.apply(x, weight, self.eps)


class Normalized(Function):
    """RMSNorm that keeps its input and 1/rms, as torch's CUDA kernel does; torch's CPU form keeps x / rms too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        normal = x * inverse  # in inverse's dtype, at least fp32
        grad_weight = (grad * normal).flatten(0, -2).sum(0)
        grad = grad * weight.to(inverse.dtype)
        grad_x = (grad - normal * (grad * normal).mean(-1, keepdim=True)) * inverse
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class Rotary(nn.Module):
    """Rotary embedding of [B, S, H, K], pairing dims k and k + K/2 as the Hugging Face checkpoints do."""

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = rope
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


class SwiGLU(nn.Module):
    """silu(gate) * up (Shazeer 2020)."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return Gated.apply(gate, up)


class Gated(Function):
    """silu(gate) * up that keeps gate and up, and no silu(gate), as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


POINTWISE = RMSNorm, Rotary, SwiGLU  # what a compiler can fuse without seeing a matrix or a message


class Attention(nn.Module):
    """The projections around attention; attention itself is the strategy's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.dim, config.n_heads * config.head_dim)
        self.k = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.v = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.o = Linear(config.n_heads * config.head_dim, config.dim)
        self.rotary = Rotary()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] -> q [B, S, H*K], k and v [B, S, G*K]"""
        return self.q(x), self.k(x), self.v(x)

    def heads(self, qkv: tuple[Tensor, ...], rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, H*K], k and v [B, S, G*K] -> q [B, S, H, K], k and v [B, S, G, K], q and k rotated."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in qkv)
        return self.rotary(q, rope), self.rotary(k, rope), v

    def output(self, out: Tensor) -> Tensor:
        """[B, S, H, K] -> [B, S, D]"""
        return self.o(out.flatten(2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, chunks: int, made: Kept) -> None:
        super().__init__()
        self.chunks = chunks
        self.made = made
        self.gate = Linear(config.dim, config.ffn_dim)
        self.up = Linear(config.dim, config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)
        self.swiglu = SwiGLU()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D] -> gate and up [B, S, F]"""
        return self.gate(x), self.up(x)

    def output(self, projected: tuple[Tensor, ...]) -> Tensor:
        """gate and up [B, S, F] -> [B, S, D]"""
        return self.down(self.made(self.swiglu, *projected))

    def forward(self, x: Tensor) -> Tensor:
        return self.tiled(lambda part: self.output(self.project(part)), x)

    def tiled(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x) over chunks of the tokens, each run again in backward: no [B, S, F] ever exists whole.

        ALST's TiledMLP (Bekman et al. 2025, section 3.1).
        """
        if self.chunks == 1:
            return function(x)
        return torch.cat([checkpoint(function, part, use_reentrant=False) for part in chunked(x, self.chunks)], dim=1)


class Block(nn.Module):
    """One pre-norm transformer block: two residual additions, both sublayers run by the strategy."""

    def __init__(
        self,
        config: ModelConfig,
        strategy: Strategy,
        recompute: str,
        mlp_chunks: int,
        around: Callable[[], AbstractContextManager],
    ) -> None:
        super().__init__()
        self.made = Remade() if recompute == "selective" else Kept()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config, mlp_chunks, self.made)
        self.strategy = strategy
        self.recompute = recompute
        self.around = around  # what is kept of a block that runs again

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if self.recompute == "block":
            with self.around():
                return checkpoint(self.sublayers, x, rope, use_reentrant=False)
        with self.made.around():
            return self.sublayers(x, rope)

    def sublayers(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.strategy.attention(self.attn, self.made(self.attn_norm, x), rope)
        return x + self.strategy.mlp(self.mlp, self.made(self.mlp_norm, x))


class Embed(nn.Module):
    """Tokens to vectors."""

    def __init__(self, config: ModelConfig, strategy: Strategy) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.dim)
        self.strategy = strategy

    def forward(self, tokens: Tensor) -> Tensor:
        return self.strategy.embed(self.table, tokens)


class Head(nn.Module):
    """The last norm, the logits and their loss: in `chunks` of the tokens, so that logits never exist whole."""

    def __init__(self, config: ModelConfig, strategy: Strategy, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.linear = Linear(config.dim, config.vocab_size)
        self.strategy = strategy

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.norm(x)
        if self.chunks == 1:
            return self.strategy.loss(self.linear, x, labels)
        # A strategy may gather x over ranks: labels then hold their tokens too, one rank's after the other's.
        labels = labels.unflatten(1, (-1, x.shape[1])).movedim(1, 2)  # [B, S_local, ranks]
        return sum(
            checkpoint(self.strategy.loss, self.linear, part, its.movedim(2, 1).flatten(1), use_reentrant=False)
            for part, its in zip(chunked(x, self.chunks), chunked(labels, self.chunks), strict=True)
        )


class Llama(nn.Module):
    """The model on the tokens that this process owns.

    `strategy` answers what involves other ranks; `dtype` is the dtype of the activations (and of the weights as they
    are used). recompute: with `selective` norms' outputs and the MLPs' products are made again (remade.py), with
    `block` each block keeps its input only and runs again; with offload=activations that waits in the host's memory.
    The MLPs and the loss run in `mlp_chunks` and `loss_chunks` pieces of the tokens that are here, one after the other.
    """

    def __init__(
        self,
        config: ModelConfig,
        strategy: Strategy,
        dtype: torch.dtype,
        recompute: str = "none",
        mlp_chunks: int = 1,
        loss_chunks: int = 1,
        offload: str = "none",
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed = Embed(config, strategy)
        around = Offload().around if offload == "activations" else nullcontext
        self.blocks = nn.ModuleList(
            Block(config, strategy, recompute, mlp_chunks, around) for _ in range(config.n_layers)
        )
        self.head = Head(config, strategy, loss_chunks)
        self.tie()

    def tie(self) -> None:
        """Make the head's weight the embedding's, if the model ties them (again, once either was replaced)."""
        if self.config.tie_embeddings:
            self.head.linear.weight = self.embed.table.weight

    def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """The sum of this process's token losses.

        tokens, labels: [B, S] int64, label -100 = not counted; positions: [B or 1, S], where in its document each
        token is.
        """
        rope = rope_tables(positions, self.config, self.dtype)
        x = self.embed(tokens).to(self.dtype)
        for block in self.blocks:
            x = block(x, rope)
        return self.head(x, labels)


def chunked(x: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """[B, S, ..] in at most `chunks` pieces of equally many tokens, the last one maybe shorter."""
    return x.split(-(-x.shape[1] // chunks), dim=1)


def rope_tables(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, [.., S, 1, K], computed in at least fp32."""
    exact = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=exact) / config.head_dim
    frequencies = scaled_frequencies(config.rope_theta**-exponents, config)
    angles = positions.to(exact)[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[..., None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def scaled_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Llama 3.1: waves longer than the original context are slowed by `factor`, short ones kept, the rest blended."""
    if (scaling := config.rope_scaling) is None:
        return frequencies
    turns = scaling.original_max_position * frequencies / (2 * math.pi)  # of each wave within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor
