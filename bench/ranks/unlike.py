"""Which ranks of a configuration run: every real one; of made-up ones, those among which is the one to be measured."""

import math

import numpy as np

from bench.workloads.data import mask_of_step
from conf.keys import PLACEMENTS, Config
from conf.meshes import footing_of, place
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
        "ulysses": False,
        "tp": any(size % mesh["tp"] for size in (model.vocab_size, model.ffn_dim)),
    }
    found = set()
    for ring in ends_of_ring(config):
        rank = 0
        for axis in PLACEMENTS[config.placement]:
            rank = rank * mesh[axis] + (ring if axis == "ring" else mesh[axis] - 1 if last[axis] else 0)
        found.add(rank)
    rows = {model.dim, model.vocab_size, model.ffn_dim}
    rows |= {n_heads * (model.head_dim or 1) for n_heads in (model.n_heads, model.n_kv_heads)}
    uneven_zero = any(size % math.prod(mesh.values()) for size in rows)
    return sorted({0, *found} if uneven_zero else found)


def ends_of_ring(config: Config) -> set[int]:
    """Places on the ring: the last one, but if keys wait for queries or go around rings inside rings, either end.

    Of a grid the last row's first column computes most, for its keys come first; how tiles lie decides who holds most.
    """
    ring, inner = config.mesh.ring or 1, config.ring.inner
    if footing_of(config.strategy.name).grid:
        return {0, ring - (inner or 1), ring - 1}
    ends = {0, ring - 1} if config.ring.backward == "q" or inner else {ring - 1}
    return ends | ({inner - 1, ring - inner} if inner else set())


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
            np.stack([[m.work, m.sent, m.received] for m in seen(config, mask, each)]).sum(0) for each in range(dp)
        ]
        found = {tuple(map(int, np.unravel_index(of.argmax(), of.shape))) for of in np.stack(ranks, 1)}  # [dp, ring]
    return sorted({rank for each in found for rank in (places[each][0], places[each][-1])})
