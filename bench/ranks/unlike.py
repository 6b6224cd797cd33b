"""Which ranks of a configuration run: every real one; of made-up ones, those among which is the one to be measured."""

import math

from conf.keys import PLACEMENTS, Config


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
