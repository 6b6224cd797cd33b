"""Few ranks for a short document and many for a long one, beside one mesh for all: what it sends, how even it is.

Megatron's hybrid context parallelism: a document goes around a ring of n = max(1, 2^ceil(log2(tokens / most))) ranks,
`most` being what one rank takes alone. Documents are dealt out, the heaviest first, to the ranks that have least to do;
a rank whose work has come to 1.1 of the mean takes no more, as long as others are open. Nothing of it is run: work and
bytes are those of formulas, of attention alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, log2

import numpy as np
import pandas as pd

from analysis import UserError
from analysis.accounts.letters import BYTES
from conf import meshes
from conf.clock import Clock
from conf.compose import REFUSED, configuration, sentence
from conf.documents import mask_of
from conf.keys import Config, MeshConfig, RingConfig, StrategyConfig
from conf.resolve import resolve
from conf.seen import seen
from conf.words import Invalid

CLOSED = 1.1  # of the mean work: a rank that has so much takes no more


@dataclass(frozen=True)
class Shares:
    """By rank: query-key pairs, tokens, and keys that it sends in a forward pass."""

    pairs: np.ndarray
    tokens: np.ndarray
    keys: np.ndarray


def printed(overrides: Sequence[str]) -> str:
    config = asked(overrides)
    table = pd.DataFrame([line(name, config, shares) for name, shares in ways(config)])
    lengths = documents(config)
    many = f"{len(lengths):,} documents of {np.median(lengths):,.0f} tokens in the median and {max(lengths):,} at most"
    where = f"{config.batch_size} sequences of {config.seq_len:,} on {config.world_size} ranks"
    said = f"{many}, in {where}; attention of one layer, forward"
    return f"{said}\n\n{table.to_string(index=False)}"


def asked(overrides: Sequence[str]) -> Config:
    try:
        config = configuration(overrides)
        if config.documents.name not in ("lengths", "histogram"):
            raise Invalid(f"documents={config.documents.name} has no lengths to deal out; histogram would do")
        if config.world_size & (config.world_size - 1):
            near = 2 ** round(log2(config.world_size))
            raise Invalid(f"world_size={config.world_size} is no power of two, and degrees are; {near} would do")
        ring = replace(config, strategy=StrategyConfig("ring"), mesh=MeshConfig(), mode="simulate")
        return resolve(ring).config
    except REFUSED as error:
        raise UserError(sentence(error)) from None


def documents(config: Config) -> list[int]:
    """Their lengths, in all sequences of a step."""
    tokens = np.arange(config.seq_len)
    begin = np.broadcast_to(mask_of(config).begin(tokens), (config.batch_size, config.seq_len))
    return [int(n) for row in begin for n in np.diff([*np.unique(row), config.seq_len])]


def ways(config: Config) -> Iterator[tuple[str, Shares]]:
    """One ring over all ranks in every layout, and a ring for each document."""
    for layout in ("contiguous", "zigzag", "balanced"):
        fixed = replace(config, ring=RingConfig(layout, "needed"))
        if all(rule.value in rule.allowed for rule in meshes.rules(fixed)):
            (found,) = seen(replace(fixed, micro_batches=1), mask_of(config), 0)
            each = config.seq_len * config.batch_size / config.world_size
            yield f"one ring, {layout}, needed keys", Shares(found.pairs, np.full(config.world_size, each), found.sent)
    yield "a ring for each document", dealt(documents(config), config.world_size, most_of(config))


def most_of(config: Config) -> int:
    """Tokens of a document that one rank takes alone: as many as it would have of a whole batch."""
    return max(1, config.seq_len * config.batch_size // config.world_size)


def dealt(lengths: Sequence[int], ranks: int, most: int) -> Shares:
    """Rings are aligned: one of n ranks begins at a multiple of n."""
    pairs, tokens, keys = (np.zeros(ranks) for _ in range(3))
    mean = sum(n * (n + 1) / 2 for n in lengths) / ranks
    for length in sorted(lengths, reverse=True):
        degree = min(ranks, degree_of(length, most))
        load = pairs.reshape(-1, degree).max(1)
        is_open = load < CLOSED * mean
        ring = int(np.where(is_open | ~is_open.any(), load, np.inf).argmin())
        mine = slice(ring * degree, (ring + 1) * degree)
        pairs[mine] += length * (length + 1) / 2 / degree  # in zigzag
        tokens[mine] += length / degree
        keys[mine] += (degree - 1) * length / degree
    return Shares(pairs, tokens, keys)


def degree_of(length: int, most: int) -> int:
    return max(1, 2 ** ceil(log2(length / most)))


def line(name: str, config: Config, shares: Shares) -> dict[str, object]:
    model, size = config.model, BYTES[config.precision][1]
    of_key = 2 * model.n_kv_heads * model.dim_of_head * size / 2**20
    found: dict[str, object] = {
        "": name,
        "work max/mean": f"{shares.pairs.max() / shares.pairs.mean():.2f}",
        "tokens max/mean": f"{shares.tokens.max() / shares.tokens.mean():.2f}",
        "MiB sent, mean": f"{shares.keys.mean() * of_key:,.1f}",
        "MiB sent, busiest": f"{shares.keys.max() * of_key:,.1f}",
    }
    if config.cluster is not None and config.cluster.clock is not None:
        clock = Clock.of(config.cluster.clock, config.cluster.name)
        us = clock.attention_us("forward", model.n_heads * shares.pairs.max(), model.dim_of_head)
        found["busiest rank, ms"] = f"{us / 1000:,.2f}"
    return found
