"""Heads in stages, of which one is there at a time (Ghadia et al. 2026): how they are dealt out, and made again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.ops.hooks import hooked
from strategies.ops.kernels import accumulator
from strategies.ops.layouts import Tile, tiles_of
from strategies.ops.mesh import Axis
from strategies.ops.options import Options

HEADS = 2
Heads = Callable[..., Tensor]  # of q, k or v: a stage's part, and what all stages share -> [B, S_local, U, K]


@dataclass(frozen=True)
class Stages:
    """Of every rank's heads each stage has the next few; stages in a row that need the same kv heads share them."""

    count: int
    kv_count: int
    copies: int  # of a kv head
    heads: Heads
    ulysses: Axis
    options: Options

    @classmethod
    def cut(
        cls, q: Tensor, k: Tensor, v: Tensor, dim: int, ulysses: Axis, options: Options, heads: Heads
    ) -> tuple["Stages", list[Tensor]]:
        """The stages, and of q, k and v in turn the parts from which each of them makes its heads.

        q, k, v: with one of each head along `dim`, in place of which a part has two, ranks and a rank's heads.
        """
        ranks, kv_ranks = ulysses.size, min(ulysses.size, k.shape[dim])
        n, n_kv = q.shape[dim] // ranks, k.shape[dim] // kv_ranks
        stages = options.ulysses.stages_of(n)
        found = cls(stages, min(stages, n_kv), ranks // kv_ranks, heads, ulysses, options)
        dealt = ((q, ranks, found.count), (k, kv_ranks, found.kv_count), (v, kv_ranks, found.kv_count))
        return found, [
            part for t, ranks, stages in dealt for part in t.unflatten(dim, (ranks, stages, -1)).unbind(dim + 1)
        ]

    @property
    def sharing(self) -> int:
        """Stages in a row that have keys and values in common."""
        return self.count // self.kv_count

    def new(self, stage: int) -> str:
        """What it brings: its queries, and of those that share keys and values the first brings these, too."""
        return "q" if stage % self.sharing else "qkv"

    def ends(self, stage: int) -> bool:
        return (stage + 1) % self.sharing == 0

    def made(self, of: str, stage: int, given: Sequence[Tensor]) -> Tensor:
        """The stage's heads of q, k or v, [B, S_local, U, K], kv heads copied where ranks are more."""
        kv = stage // self.sharing
        place = {"q": stage, "k": self.count + kv, "v": self.count + self.kv_count + kv}[of]
        heads = self.heads(of, given[place], *given[self.count + 2 * self.kv_count :])
        return heads if of == "q" or self.copies == 1 else heads.repeat_interleave(self.copies, HEADS)

    def made_again(self, of: str, stage: int, given: Sequence[Tensor]) -> Tensor:
        """The same in backward."""
        with hooked(again=True):
            return self.made(of, stage, given)

    def part(self, x: Tensor, stage: int) -> Tensor:
        """[B, S, H, K] -> the stage's heads [B, S, U, K]."""
        return x.unflatten(HEADS, (self.ulysses.size, self.count, -1))[:, :, :, stage].flatten(2, 3)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Of every stage its heads [B, S, U, K] -> [B, S, H, K]."""
        return torch.stack([part.unflatten(HEADS, (self.ulysses.size, -1)) for part in parts], 3).flatten(2, 4)

    def added(self, sums: list[Tensor] | None, grad_kv: list[Tensor]) -> list[Tensor]:
        """The gradients of keys and values, over the stages that share them: in at least fp32, if there are several."""
        if self.sharing == 1:
            return grad_kv
        if sums is None:
            return [accumulator(t) for t in grad_kv]
        return [total.add_(t) for total, t in zip(sums, grad_kv, strict=True)]

    def tiles(self, q: Tensor) -> list[Tile]:
        """What queries of all tokens see of them."""
        return tiles_of(0, 0, 1, q.shape[1], self.options)
