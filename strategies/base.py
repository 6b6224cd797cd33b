"""What a strategy is: the answers to "which tokens, which weights, what do I send", in straight-line code.

A strategy is asked four things, and its file is those four answers under a card:

    split(tokens)             which tokens of each sequence do I own
    shard(model)              which weights do I own
    attention(attn, x, rope)  what do I exchange in attention
    mlp(mlp, x)               what do I exchange in the MLP

attention calls `core_attention(q, k, v)` for what happens between its projections. It has a name of its own because it
is what workload=attention measures alone, and what "X is Y with another attention in the middle" replaces.

Two more are asked at the model's ends, `embed` and `loss`. Wherever tokens are split they need no exchange of their
own, so the answers below serve; strategies with a tp axis split the vocabulary instead (Megatron), and say so.

mesh.dp stands in front of every strategy: it deals out the batch, and ZeRO shards over it too.

The rules of every answer: gradients are SUMS over ranks, never averages, since the loss is divided by the global token
count once; verbs come from ops/collectives.py and name their axis; and nothing is kept whole that the card says is 1/N.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from strategies.ops.mesh import Axis, Mesh
from strategies.ops.vocab import token_loss_sum
from strategies.ops.weights import zero


@dataclass
class Options:
    """What a strategy may be told beside its mesh, one field per configuration key."""

    kernel: object  # one of ops/kernels.py
    compute_dtype: torch.dtype = torch.float32
    zero_stage: int = 3
    ring_layout: str = "zigzag"
    ring_grad_dtype: str = "fp32"
    ring_kv: str = "rotate"
    ulysses_packed: bool = False
    ulysses_chunks: int = 1


@dataclass
class Shape:
    """What the rules of a strategy are about: sizes that must divide by degrees."""

    n_heads: int
    n_kv_heads: int
    seq_len: int
    degrees: dict[str, int]  # of dp, ring, ulysses, tp
    ring_layout: str = "zigzag"
    ulysses_chunks: int = 1


@dataclass
class Rule:
    """The value of configuration key `key` must satisfy `fits`, because `why`."""

    key: str
    value: int
    why: str
    fits: Callable[[int], bool]


def multiple(key: str, value: int, of: int, names: str) -> Rule:
    """`key` must be a multiple of a product of degrees."""
    return Rule(key, value, f"must be a multiple of {names} = {of}", lambda v: v % of == 0)


def sequence_rule(shape: Shape) -> Rule:
    """seq_len in equal parts around the ring (two a rank in zigzag), each in equal parts over ulysses and tp."""
    wide = [axis for axis in ("ring", "ulysses", "tp") if shape.degrees[axis] > 1]
    parts = [2] if shape.ring_layout == "zigzag" and "ring" in wide else []
    names = " * ".join([*map(str, parts), *(f"mesh.{axis}" for axis in wide)])
    return multiple("seq_len", shape.seq_len, prod([*parts, *(shape.degrees[axis] for axis in wide)]), names)


def heads_rule(key: str, degree: int, shape: Shape) -> Rule:
    """Heads in equal parts, and kv heads in equal parts or in equally many copies."""

    def fits(ranks: int) -> bool:
        return shape.n_heads % ranks == 0 and (shape.n_kv_heads % ranks == 0 or ranks % shape.n_kv_heads == 0)

    heads = f"model.n_heads = {shape.n_heads} and divide, or be a multiple of, model.n_kv_heads = {shape.n_kv_heads}"
    return Rule(key, degree, f"must divide {heads}", fits)


def head_chunks_rule(degree: int, shape: Shape) -> Rule:
    """Each of `degree` ranks' heads, and kv heads (copies included), in equal chunks."""
    heads, kv_heads = shape.n_heads // degree, max(1, shape.n_kv_heads // degree)
    why = f"must divide a rank's heads in attention, {heads}, and its kv heads, {kv_heads}"
    return Rule(
        "ulysses.chunks", shape.ulysses_chunks, why, lambda chunks: heads % chunks == 0 and kv_heads % chunks == 0
    )


class Strategy:
    """Inherit, fill in the card, the axes and the four answers, and register in strategies/__init__.py."""

    axes: ClassVar[tuple[str, ...]] = ()  # the mesh axes that it has beside dp

    def __init__(self, mesh: Mesh, options: Options) -> None:
        self.mesh, self.options = mesh, options
        self.dp, self.ring, self.ulysses, self.tp = mesh.dp, mesh.ring, mesh.ulysses, mesh.tp

    @classmethod
    def degrees(cls, free: int, left_open: list[str], shape: Shape) -> dict[str, int]:
        """How `free` ranks are laid out along the axes that the user left open: the first takes all."""
        return {left_open[0]: free}

    @classmethod
    def rules(cls, shape: Shape) -> list[Rule]:
        """What must divide by what before a rank starts."""
        return []

    def split(self, tokens: Tensor) -> Tensor:
        """[B, S] -> [B, S_local], this rank's tokens. Called for tokens, labels and positions alike."""
        raise NotImplementedError

    def shard(self, model: nn.Module) -> None:
        """Keep this rank's slice of every weight of a meta model."""
        raise NotImplementedError

    def attention(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x as the blocks pass it on -> the same shape."""
        raise NotImplementedError

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, S_local, H_tp, K], k and v [B, S_local, G_tp, K] -> [B, S_local, H_tp, K]: causal over all tokens."""
        raise NotImplementedError

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        """x as the blocks pass it on -> the same shape."""
        raise NotImplementedError

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        """tokens [B, S_local] -> x [B, S_local, D]"""
        return embedding(tokens)

    def loss(self, head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        """x [B, S_local, D], labels [B, S_local] -> the sum of the token losses."""
        return token_loss_sum(head(x), labels)

    def zero(self, *modules: nn.Module, axis: Axis | None = None) -> None:
        """ZeRO over all ranks that hold different tokens (or over `axis`), at the configured stage and dtype."""
        options = self.options
        zero(*modules, axis=axis or self.mesh.zero, compute_dtype=options.compute_dtype, stage=options.zero_stage)

    def zero_model(self, model: nn.Module) -> None:
        """ZeRO for a whole model: the weights of each block, of the embedding and of the head travel together."""
        ends = [[model.embed, model.head]] if model.config.tie_embeddings else [[model.embed], [model.head]]
        for modules in [*([block] for block in model.blocks), *ends]:
            self.zero(*modules)
        self.zero(model)  # owns no weight itself; FSDP2 schedules the others from it
