"""The letters of the formulas: the numbers of one configuration, of many, or sympy's symbols (analysis/symbols.py).

The formulas are plain arithmetic on them. Of numbers they make bytes, of symbols the expressions of the printed table,
and of arrays, one element a configuration, the bytes of all of them at once (analysis/candidates.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from numbers import Real
from typing import Any

import numpy as np

from conf.documents import mask_of
from conf.keys import Config
from conf.mask import Mask
from conf.meshes import place
from conf.seen import of_rank, special

Amount = Any  # a number, an array of them, or an expression of sympy's
BYTES = {"fp32": (4, 4), "bf16": (2, 2), "bf16_mixed": (4, 2)}  # of a weight as it is updated, of an activation
WIDE = 4  # bytes of what is always exchanged in fp32
OF_AXES = {"dp": "dp", "tp": "tp", "ulysses": "u", "ring": "r"}  # an axis of the mesh -> its letter


def whole(x: Amount) -> Amount:
    """A number rounded up; a symbol as it is."""
    if isinstance(x, np.ndarray):
        return np.ceil(x)
    return ceil(x) if isinstance(x, Real) else x


def alone(ranks: Amount) -> bool:
    """Is it a group of one rank, which has nobody to send to? Of many configurations: in all of them."""
    one = ranks == 1
    return bool(one.all() if isinstance(one, np.ndarray) else one)  # np.all would take three times as long


def part(n: Amount, ways: Amount, at: Mapping[str, int] | None, axis: str) -> Amount:
    """Of n things in parts that differ by one at most, that of a rank on this axis, or the largest."""
    return whole(n / ways) if at is None else n * (at[axis] + 1) // ways - n * at[axis] // ways


def unless_alone(ranks: Amount, amount: Amount) -> Amount:
    """Nothing in a group of one rank."""
    if isinstance(ranks, np.ndarray):
        return np.where(ranks == 1, 0, amount)
    return 0 if ranks == 1 else amount


@dataclass
class Letters:
    """One configuration in the letters of the formulas, on one rank: where it is `at`, or one that has most of all."""

    B: Amount  # sequences of this rank, at a time
    L: Amount  # tokens of a sequence
    d: Amount
    i: Amount
    h: Amount
    h_kv: Amount
    K: Amount
    V: Amount
    layers: Amount
    dp: Amount
    tp: Amount
    u: Amount
    r: Amount
    e: Amount  # bytes of an activation, and of a weight as it is used
    e_w: Amount  # of a weight as it is updated, and of each of its two moments
    e_dw: Amount  # of its gradient
    e_g: Amount  # of a travelling dK or dV
    rho: Amount = 1  # copies of a kv head that ulysses needs
    kv_shared: Amount = 1  # tp ranks that share a kv head
    stage: int = 3
    micro: Amount = 1  # micro-batches
    recompute: bool = False  # whole blocks
    selective: bool = False  # what is cheap to make again
    mlp_chunks: int = 1
    loss_chunks: int = 1
    packed: bool = False
    head_chunks: int = 1
    stages: int | None = None  # of upipe; a rank's heads one by one
    gather_kv: bool = False
    tied: bool = False
    clipping: bool = True
    needed: bool = False
    cycles: bool = False  # hops go around all rings at once
    queries: bool = False  # travel in backward, not keys
    inner: Amount = None  # ranks of an inner ring, or of a row, where there are any
    layout: str = "zigzag"
    seen: Mapping[str, Amount] | None = None  # pairs and keys of a rank, where they have no closed form (conf/seen.py)
    at: Mapping[str, int] | None = None  # its place along each axis, and along `zero`

    @classmethod
    def of(cls, config: Config, rank: int | None = None, mask: Mask | None = None) -> "Letters":
        """The numbers of a resolved configuration, of this rank. mask: where documents end by tokens."""
        model, mesh = config.model, config.mesh
        dp, tp, ulysses, ring = (degree or 1 for degree in (mesh.dp, mesh.tp, mesh.ulysses, mesh.ring))
        e_w, e = BYTES[config.precision]
        at = None if rank is None else place(config, rank)
        seen = None
        if special(config):
            mask = mask or mask_of(config)
            seen = of_rank(config, mask, *((None, None) if at is None else (at["dp"], at["ring"])))
        return cls(
            B=max(1, part(config.micro_batch_size, dp, at, "dp")),
            L=config.seq_len,
            d=model.dim,
            i=model.ffn_dim,
            h=model.n_heads,
            h_kv=model.n_kv_heads,
            K=model.head_dim,
            V=model.vocab_size,
            layers=model.n_layers,
            dp=dp,
            tp=tp,
            u=ulysses,
            r=ring,
            e=e,
            e_w=e_w,
            e_dw=e if config.grad_dtype == "same" else e_w,
            e_g=WIDE if config.ring.grad_dtype == "fp32" else e,
            rho=max(1, ulysses // max(1, model.n_kv_heads // tp)),
            kv_shared=max(1, tp // model.n_kv_heads),
            stage=config.zero_stage,
            micro=config.micro_batches,
            recompute=config.recompute == "block",
            selective=config.recompute == "selective",
            mlp_chunks=config.mlp.chunks,
            loss_chunks=config.loss.chunks,
            packed=config.ulysses.packed,
            head_chunks=config.ulysses.chunks,
            stages=config.ulysses.stages,
            gather_kv=config.ring.kv == "all_gather",
            needed=config.ring.kv == "needed",
            cycles=config.ring.cycles == "all",
            queries=config.ring.backward == "q",
            inner=config.ring.inner,
            seen=seen,
            tied=model.tie_embeddings,
            clipping=config.optim.grad_clip is not None,
            layout=config.ring.layout,
            at=at,
        )

    @property
    def tokens(self) -> Amount:
        """T: of a tp group, between the attentions."""
        return self.B * self.L / (self.u * self.r)

    @property
    def D(self) -> Amount:
        """Bytes of a tp group's activation."""
        return self.tokens * self.d * self.e

    @property
    def q(self) -> Amount:
        """Bytes of a rank's queries."""
        return self.tokens * self.h * self.K / self.tp * self.e

    @property
    def kv(self) -> Amount:
        """Bytes of a rank's keys, and of its values, copies included."""
        return self.tokens * self.rho * self.kv_heads * self.K * self.e

    @property
    def token_kv(self) -> Amount:
        """Bytes of a token's keys, and of its values, where a rank of the ring computes."""
        return self.rho * self.kv_heads / self.u * self.K * self.e

    @property
    def numbers(self) -> Amount:
        """Bytes of one number, as lse, for each of a rank's queries and heads."""
        return self.tokens * self.h / self.tp * WIDE

    @property
    def kv_heads(self) -> Amount:
        """Of a tp rank."""
        return self.h_kv * self.kv_shared / self.tp

    @property
    def head_stages(self) -> Amount:
        """In how many stages upipe has a rank's heads."""
        return self.stages or whole(self.h / self.u)

    @property
    def kv_stages(self) -> Amount:
        """In how many of them it has new kv heads."""
        kv_heads = whole(self.rho * self.h_kv / self.u)
        return kv_heads if self.stages is None else np.minimum(self.stages, kv_heads)

    @property
    def sharing(self) -> Amount:
        """Ranks that hold different tokens, over which ZeRO shards."""
        return self.dp * self.u * self.r

    @property
    def forwards(self) -> tuple[str, ...]:
        """The phases in which a block's forward runs."""
        return ("forward", "recompute") if self.recompute else ("forward",)

    def columns(self, n: Amount, ways: Amount) -> Amount:
        """A tp rank's part of n columns, cut in so many ways."""
        return part(n, ways, self.at, "tp")

    def shard(self, rows: Amount, axis: str = "zero") -> Amount:
        """A rank's rows of a weight that FSDP2 has cut: equal parts, and the last ones what is left."""
        chunk = whole(rows / (self.sharing if axis == "zero" else self.dp))
        return chunk if self.at is None else max(0, min(chunk, rows - self.at[axis] * chunk))

    def pieces(self, chunks: int, tp: Amount) -> tuple[int, Amount]:
        """How many pieces a rank's 1/tp of the tokens is cut into, at most `chunks`; which part the last one is."""
        if chunks == 1:
            return 1, 1
        here = self.L // (self.u * self.r * tp)
        size = whole(here / chunks)
        pieces = whole(here / size)
        return pieces, (here - (pieces - 1) * size) / here
