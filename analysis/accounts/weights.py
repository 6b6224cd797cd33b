"""The weights of a rank: which there are, what ZeRO sends of them, and what is kept of them.

ZeRO: Rajbhandari et al. 2020, sections 5 and 7. FSDP2 cuts dim 0 of every weight into equal parts, and pads it.
"""

from dataclasses import dataclass, replace
from typing import Any

from analysis.accounts.letters import WIDE, Amount, Letters, alone, whole
from analysis.accounts.sent import Sent, all_gather, all_reduce, reduce_scatter


@dataclass(frozen=True)
class Weight:
    """A rank's slice of a matrix or a norm, and how it is cut: by `tp`, as a shared `kv` head, by `ring`, or `not`."""

    rows: Amount
    columns: Amount
    cut: str


@dataclass(frozen=True)
class Group:
    """Weights that travel together along an axis of so many ranks, `times` times a model."""

    weights: list[Weight]
    ranks: Amount
    times: Amount = 1
    axis: str = "zero"


def norm(s: Letters) -> Weight:
    return Weight(s.d, 1, "not")


def attention_weights(s: Letters) -> list[Weight]:
    kv = Weight(s.kv_heads * s.K, s.d, "tp" if alone(s.kv_shared) else "kv")
    return [Weight(s.h * s.K / s.tp, s.d, "tp"), kv, kv, Weight(s.d, s.h * s.K / s.tp, "tp")]


def mlp_weights(s: Letters, tp: Amount) -> list[Weight]:
    wide = s.columns(s.i, tp)
    return [Weight(wide, s.d, "tp"), Weight(wide, s.d, "tp"), Weight(s.d, wide, "tp")]


def of_blocks(s: Letters) -> list[Group]:
    """Every block's weights together."""
    return [Group([*attention_weights(s), *mlp_weights(s, s.tp), norm(s), norm(s)], s.sharing, s.layers)]


def of_ends(s: Letters) -> list[Group]:
    """The embedding; the head with the last norm."""
    table = Weight(s.columns(s.V, s.tp), s.d, "tp")
    if s.tied:
        return [Group([table, norm(s)], s.sharing)]
    return [Group([table], s.sharing), Group([table, norm(s)], s.sharing)]


def zero(group: Group, s: Letters) -> list[Sent]:
    """Stage 3: AG forward, AG backward, RS; of a block while those before and behind it are computed. 2: AG, RS.

    Below stage 2: AR of the gradients (0), or RS of them and AG of the weights (1), once a step for the whole model.
    """
    p = group.ranks
    if s.stage < 2:
        elements = sum(w.rows * w.columns for w in group.weights)
        once: dict[str, Any] = {"weights": True, "axis": group.axis}
        if s.stage == 0:
            return [all_reduce("backward", p, elements * s.e_dw, "P", 0, **once)]
        return [
            reduce_scatter("backward", p, elements * s.e_dw, "P", 0, **once),
            all_gather("optimizer", p, elements * s.e, "P", 0, **once),
        ]
    elements = sum(whole(w.rows / p) * p * w.columns for w in group.weights)
    ahead: dict[str, Any] = {"weights": True, "axis": group.axis, "beside": "blocks"}
    lines = [all_gather("forward", p, elements * s.e, "P", **ahead)]
    if s.stage == 3:
        lines.append(all_gather("backward", p, elements * s.e, "P", **ahead))
    return [*lines, reduce_scatter("backward", p, elements * s.e_dw, "P", **ahead)]


def zero_step(groups: list[Group], s: Letters) -> list[Sent]:
    """The same of a whole step."""
    if s.stage >= 2:
        return [line.times(group.times * s.micro) for group in groups for line in zero(group, s)]
    in_buffers = [Group([Weight(elements, 1, "not")], ranks) for ranks, elements in buffers(groups, s)]
    return [replace(line, calls=1) for group in in_buffers for line in zero(group, s)]


def buffers(groups: list[Group], s: Letters) -> list[tuple[Amount, Amount]]:
    """Below stage 2: one buffer for all weights that are cut alike and shared by the same ranks: ranks, elements.

    It is padded to equal parts.
    """
    alike: dict[tuple[str, str], Amount] = {}
    slicing = {"zero": s.tp, "dp": s.r}  # where ranks that share a weight may have a slice of it, or all
    ranks = {group.axis: group.ranks for group in groups}
    for group in groups:
        for w in group.weights:
            key = group.axis, w.cut if not alone(slicing.get(group.axis, 1)) else "not"
            alike[key] = alike.get(key, 0) + group.times * w.rows * w.columns
    return [(p, whole(elements / p) * p) for (axis, _), elements in alike.items() for p in [ranks[axis]]]


def summed_over_tp(s: Letters, split_norms: bool) -> list[Sent]:
    """At a step's end, in fp32: gradients of the norms and of shared kv heads, of which each tp rank has a part."""
    n_norms, heads = 2 * s.layers + 1, 2 * s.layers
    if s.stage >= 2:  # ZeRO has sharded them already, each by itself
        norms, shared = n_norms * s.shard(s.d), heads * s.shard(s.K) * s.d
    else:  # or all together, in one buffer that is padded to equal parts
        parts = s.sharing if s.stage == 0 else 1
        norms, shared = (parts * whole(n / s.sharing) for n in (n_norms * s.d, heads * s.K * s.d))
    norms = norms if split_norms else 0
    return [
        all_reduce("backward", s.tp, norms * WIDE, "norms", weights=True),
        all_reduce("backward", s.kv_shared, shared * WIDE, "kv heads", weights=True, axis="tp_replicas"),
    ]


def clipped(s: Letters) -> list[Sent]:
    """The gradient's norm, one number."""
    return [all_reduce("optimizer", s.sharing * s.tp, WIDE, "norm", weights=True, axis="world")] if s.clipping else []


@dataclass(frozen=True)
class Share:
    """What a rank keeps of some tensors: elements that it holds, and of these such as its optimizer updates."""

    held: Amount
    trained: Amount
    tensors: Amount
    by_fsdp2: bool  # or in buffers of our own


def shares(groups: list[Group], s: Letters) -> list[Share]:
    found = []
    if s.stage < 2:
        shared = [group for group in groups if not alone(group.ranks)]
        found = [Share(n, n / p if s.stage == 1 else n, 1, False) for p, n in buffers(shared, s)]
        groups = [group for group in groups if alone(group.ranks)]
    for group in groups:
        for w in group.weights:
            shard = group.times * whole(w.rows / group.ranks) * w.columns
            found.append(Share(shard, shard, group.times, not alone(group.ranks)))
    return found


def kept(groups: list[Group], s: Letters) -> dict[str, Amount]:
    """Bytes of params, grads and optimizer that a rank keeps: two moments, and AdamW's step count for every tensor.

    In mixed precision a rank uses its weights in e bytes and keeps masters of what it trains. FSDP2's shards are the
    masters, and their gradients as wide.
    """
    kept = {"params": 0, "grads": 0, "optimizer": 0}
    for share in shares(groups, s):
        masters = 0 if share.by_fsdp2 or s.e_w == s.e else share.trained * s.e_w
        kept["params"] += share.held * (s.e_w if share.by_fsdp2 else s.e)
        kept["grads"] += share.held * (s.e_w if share.by_fsdp2 else s.e_dw)
        kept["optimizer"] += masters + 2 * share.trained * s.e_w + WIDE * share.tensors
    return kept
