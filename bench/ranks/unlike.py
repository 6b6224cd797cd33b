"""Which ranks of a configuration run: every real one; of made-up ones, those among which is the one to be measured."""

import math

import numpy as np

from bench.workloads.data import mask_of_step
from conf.keys import PLACEMENTS, Config
from conf.meshes import place
from conf.seen import seen, special

FEW = 8  # ranks with different tokens


def turns(config: Config) -> list[list[int]]:
    """The ranks that run, those together that run at the same time.

    Real ones need each other. An emulated rank has the device to itself. Of emulated and simulated ranks, only those
    that may differ in what they do or hold run at all.
    """
    if config.mode == "real":
        return [list(range(config.world_size))]
    ranks = unlike_ranks(config)
    return [ranks] if config.mode == "simulate" else [[rank] for rank in ranks]


def unlike_ranks(config: Config) -> list[int]:
    """The ranks among which is the one that does most, the one that holds most, and the one that sends most.

    The last rank of a ring sees most of the visiting keys, and the last of an uneven division has the largest part
    (Axis.span); but where ZeRO's shards are uneven, it is the first that has it.
    """
    mesh, model = vars(config.mesh), config.model
    if special(config):
        return busiest_ranks(config)
    last = {
        "dp": config.micro_batch_size > mesh["dp"] and config.micro_batch_size % mesh["dp"] > 0,
        "ring": True,
        "ulysses": False,
        "tp": any(size % mesh["tp"] for size in (model.vocab_size, model.ffn_dim)),
    }
    rank = 0
    for axis in PLACEMENTS[config.placement]:
        rank = rank * mesh[axis] + (mesh[axis] - 1 if last[axis] else 0)
    rows = {model.dim, model.vocab_size, model.ffn_dim}
    rows |= {n_heads * (model.head_dim or 1) for n_heads in (model.n_heads, model.n_kv_heads)}
    uneven_zero = any(size % math.prod(mesh.values()) for size in rows)
    return sorted({0, rank}) if uneven_zero else [rank]


def busiest_ranks(config: Config) -> list[int]:
    """Where a mask decides: of dp x ring, those that compute most, send most keys and need most of others'.

    Where they are few, all of them: how much a rank holds depends on how its tiles lie. Of the others' axes the first
    ranks and the last, as above: their shards of heads and weights may differ.
    """
    mask, dp = mask_of_step(config), config.mesh.dp or 1
    places: dict[tuple[int, ...], list[int]] = {}
    for rank in range(config.world_size):
        at = place(config, rank)
        places.setdefault((at["dp"], at["ring"]), []).append(rank)
    found = set(places)
    if len(places) > FEW:
        ranks = [
            np.stack([[m.pairs, m.sent, m.received] for m in seen(config, mask, each)]).sum(0) for each in range(dp)
        ]
        found = {tuple(map(int, np.unravel_index(of.argmax(), of.shape))) for of in np.stack(ranks, 1)}  # [dp, ring]
    return sorted({rank for each in found for rank in (places[each][0], places[each][-1])})
