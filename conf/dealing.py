"""ring.layout=balanced: chunks of a sequence dealt out so that every rank has as much attention to compute.

Every rank gets as many chunks, so that all else is even, too. A chunk's work is the keys that its tokens see.
"""

import numpy as np

from conf.keys import RingConfig
from conf.mask import Mask


def deal(mask: Mask, seq_len: int, ring: int, options: RingConfig) -> np.ndarray:
    """[ring, chunks of a rank]: which chunks each rank owns, in their order."""
    size = options.chunk_of(seq_len, ring)
    key = "dealt", seq_len, ring, size
    if key not in mask.known:
        positions = np.arange(seq_len)
        work = mask.seen(positions).sum(0).reshape(-1, size).sum(1)
        begin = mask.begin(positions[::size])  # [R, chunks]: where the documents begin that a chunk begins in
        continues = np.any(begin < positions[::size], axis=0)  # does a chunk begin amid a document?
        mask.known[key] = dealt(work, continues, ring)
    return mask.known[key]


def dealt(work: np.ndarray, continues: np.ndarray, ring: int) -> np.ndarray:
    """The heaviest chunk first, to the rank that has least to do of those with room.

    Then once more, with chunks beside those of the same document where that makes no rank busier than the busiest.
    """
    owner = heaviest_first(work, ring, continues, together=0)
    busiest = load_of(work, owner, ring).max()
    together = heaviest_first(work, ring, continues, together=busiest)
    if load_of(work, together, ring).max() <= busiest:
        owner = together
    return np.stack([np.flatnonzero(owner == rank) for rank in range(ring)])


def heaviest_first(work: np.ndarray, ring: int, continues: np.ndarray, together: int) -> np.ndarray:
    """The rank of each chunk. together: up to how much work a rank is given its neighbour of the same document."""
    owner = np.full(len(work), -1)
    load, room = np.zeros(ring, np.int64), np.full(ring, len(work) // ring)
    for chunk in np.argsort(-work, kind="stable"):
        beside = [owner[chunk - 1]] if continues[chunk] else []
        beside += [owner[chunk + 1]] if chunk + 1 < len(work) and continues[chunk + 1] else []
        near = [rank for rank in beside if rank >= 0 and room[rank] and load[rank] + work[chunk] <= together]
        rank = min(near, key=lambda rank: load[rank]) if near else np.where(room > 0, load, np.inf).argmin()
        owner[chunk] = rank
        load[rank] += work[chunk]
        room[rank] -= 1
    return owner


def load_of(work: np.ndarray, owner: np.ndarray, ring: int) -> np.ndarray:
    return np.bincount(owner, weights=work, minlength=ring)
