"""What a mask lets the ranks of a ring see of each other, counted token by token, whatever a strategy does about it.

The plain causal mask has closed forms (analysis/accounts); documents, windows and chunks that are dealt out have none.
A token sees the keys from its first one up to itself, whoever owns them.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass

import numpy as np

from conf.dealing import deal
from conf.keys import Config
from conf.mask import Mask
from conf.meshes import footing_of

PAIR, PAIR_BACKWARD = 4, 10  # FLOP for each K of a head, of a query and a key that it sees (Dao 2023, section 3.1)


@dataclass(frozen=True)
class Seen:
    """Of a micro-batch of one ring. pairs [r]: of a query and a key that it sees, by the rank that computes it forward;
    backward [r]: and by the one that does so there.

    keys [r, r]: how many keys of the second rank the first one's queries see, of all its sequences together; 0 where
    others travel too.
    """

    pairs: np.ndarray
    backward: np.ndarray
    keys: np.ndarray

    @property
    def work(self) -> np.ndarray:
        """[r]: FLOP for each K of a head."""
        return PAIR * self.pairs + PAIR_BACKWARD * self.backward

    @property
    def sent(self) -> np.ndarray:
        """[r]: keys that each rank sends to those that need them."""
        return self.keys.sum(0) - np.diag(self.keys)

    @property
    def received(self) -> np.ndarray:
        """[r]: keys of others that each rank needs."""
        return self.keys.sum(1) - np.diag(self.keys)


def special(config: Config) -> bool:
    """Is there more to a row than the plain causal mask on tokens that are split by a rule?"""
    masked = config.documents.name != "none" or config.attention.window is not None
    around = (config.mesh.ring or 1) > 1
    return masked or (around and (config.ring.layout == "balanced" or config.ring.kv == "needed"))


def seen(config: Config, mask: Mask, dp: int) -> Iterator[Seen]:
    """Of each micro-batch of the rank `dp`, whose ring is one of its own. mask: of all sequences of a step."""
    size, ways = config.micro_batch_size, config.mesh.dp or 1
    start, stop = size * dp // ways, size * (dp + 1) // ways
    for micro in range(config.micro_batches):
        here = mask.of(micro * size + start, micro * size + max(stop, start + 1))
        key = "seen", config.seq_len, config.mesh.ring, *astuple(config.ring), max(1, stop - start)
        if key not in here.known:
            here.known[key] = of_ring(config, here, max(1, stop - start))
        yield here.known[key]


def of_ring(config: Config, mask: Mask, sequences: int) -> Seen:
    ring, tokens = config.mesh.ring or 1, np.arange(config.seq_len)
    owner, first = owners(config, mask), mask.first(tokens)
    times = sequences // len(first)  # each row stands for as many sequences
    if footing_of(config.strategy.name).grid:
        pairs = times * of_grid(owner, first, config.ring.inner or 1, ring)
    else:
        pairs = times * np.bincount(owner, (tokens - first + 1).sum(0), minlength=ring)
    backward = pairs
    if config.ring.backward == "q":  # where the key is
        ends = sum(np.bincount(row, minlength=len(tokens)) for row in first)  # queries that begin to see a key
        seen = np.cumsum(ends) - len(first) * tokens  # no query sees what comes after it
        backward = times * np.bincount(owner, seen, minlength=ring)
    keys = np.zeros((ring, ring))
    for rank in range(ring if config.ring.kv == "needed" else 0):  # else nobody asks, and it takes long
        mine = np.flatnonzero(owner == rank)
        for row in first:
            ends = np.bincount(row[mine], minlength=len(tokens) + 1) - np.bincount(mine + 1, minlength=len(tokens) + 1)
            keys[rank] += times * np.bincount(owner[np.cumsum(ends)[:-1] > 0], minlength=ring)
    return Seen(pairs, backward, keys)


def of_grid(owner: np.ndarray, first: np.ndarray, row: int, ring: int) -> np.ndarray:
    """[r]: pairs of a rank whose row owns the query and whose column owns the key."""
    pairs = np.empty(ring)
    for column in range(row):
        before = np.concatenate([[0], np.cumsum(owner % row == column)])  # the column's keys before each token
        seen = (before[1:] - before[first]).sum(0)
        pairs[column::row] = np.bincount(owner // row, seen, minlength=ring // row)
    return pairs


def owners(config: Config, mask: Mask) -> np.ndarray:
    """[S]: the rank of the ring that owns each token (strategies/ops/layouts.py)."""
    ring, seq_len = config.mesh.ring or 1, config.seq_len
    tokens = np.arange(seq_len)
    if config.ring.layout == "striped":
        return tokens % ring
    if config.ring.layout == "contiguous" or ring == 1:
        return tokens * ring // seq_len
    if config.ring.layout == "zigzag":
        chunk = tokens * 2 * ring // seq_len
        return np.minimum(chunk, 2 * ring - 1 - chunk)
    chunks = deal(mask, seq_len, ring, config.ring)
    owner = np.empty(chunks.size, int)
    owner[chunks] = np.arange(ring)[:, None]
    return owner[tokens * chunks.size // seq_len]


def of_rank(config: Config, mask: Mask, dp: int | None, ring: int | None) -> dict[str, float]:
    """pairs, keys sent and keys received in a micro-batch, on average: of a rank, or of the one that has most of each.

    And in which part of the micro-batches it sends keys, and gradients of keys, at all.
    """
    found = []
    for each in range(config.mesh.dp or 1) if dp is None else (dp,):
        micro = list(seen(config, mask, each))
        n = len(micro)
        for rank in range(config.mesh.ring or 1) if ring is None else (ring,):
            sent, received = [of.sent[rank] for of in micro], [of.received[rank] for of in micro]
            found.append(
                {
                    "pairs": sum(of.pairs[rank] for of in micro) / n,
                    "pairs_backward": sum(of.backward[rank] for of in micro) / n,
                    "work": sum(of.work[rank] for of in micro) / n,
                    "sent": sum(sent) / n,
                    "received": sum(received) / n,
                    "sends": sum(keys > 0 for keys in sent) / n,
                    "returns": sum(keys > 0 for keys in received) / n,
                }
            )
    most = max(found, key=lambda rank: rank["sent"] + rank["received"])
    works = max(found, key=lambda rank: rank["work"])
    return {**most, **{name: works[name] for name in ("pairs", "pairs_backward")}}


def work_max_by_mean(config: Config, mask: Mask) -> float:
    """Of what ranks compute in a step, that of the one with most over their mean, counted token by token."""
    by_rank = [  # of dp x ring; along tp and ulysses all compute as much
        np.sum([micro.work for micro in seen(config, mask, dp)], axis=0) for dp in range(config.mesh.dp or 1)
    ]
    return float(np.max(by_rank) / np.mean(by_rank))
