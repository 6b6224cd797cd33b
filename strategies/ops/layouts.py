"""Which tokens a rank of the ring owns, and which parts of a visiting block its queries see.

layout       rank r of P owns                       work under a causal mask
contiguous   chunk r                                rank r computes r + 1 of P blocks: uneven
zigzag       chunks r and 2P - 1 - r, of 2P         even (zhuzilin/ring-flash-attention; Llama 3, section 3.3.2)
striped      tokens r, r + P, r + 2P, ...           even up to one diagonal (Brandon et al. 2023)
balanced     as many short chunks as any other      as even as it can be, whatever the mask (conf/dealing.py)
"""

from collections.abc import Iterator
from dataclasses import astuple
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from conf.dealing import deal
from conf.mask import Mask, Tokens
from strategies.ops.mesh import Axis
from strategies.ops.options import Options

ALL = slice(None)


class Tile(NamedTuple):
    """Queries that see keys in the same way: n of the local queries, m of the visiting keys.

    Query i of the tile sees its keys from the first on, or, if windowed, from the i-th; up to the last, or, if causal,
    up to the one that is as far from the last as the query is: 0 <= i < n <= m.
    """

    rows: slice  # of the batch
    q: slice
    kv: slice
    causal: bool = False
    windowed: bool = False
    kv_rows: slice | None = None  # of the batch, where keys are not laid out as queries are

    @property
    def queries(self) -> tuple[slice, slice]:
        """Where in q, and in whatever is [B, S, ..] as it is."""
        return self.rows, self.q

    @property
    def keys(self) -> tuple[slice, slice]:
        return self.kv_rows or self.rows, self.kv

    @property
    def lse(self) -> tuple[slice, slice, slice]:
        """Where in a log-sum-exp [B, H, S]."""
        return self.rows, ALL, self.q


def pairs(n: int, m: int, causal: bool, windowed: bool) -> int:
    """Of a query and a key that it sees, in a tile of n queries and m keys."""
    return n * m - (causal + windowed) * (n * (n - 1) // 2)


def ring_split(x: Tensor, axis: Axis, options: Options) -> Tensor:
    """This ring rank's tokens of x [B, S], in the layout's order."""
    if axis.size == 1:
        return x
    return x[:, torch.from_numpy(positions(axis.rank, axis.size, x.shape[1], options))]


def positions(rank: int, size: int, seq_len: int, options: Options) -> Tokens:
    """[S_ring]: where in the sequence a rank's tokens are. They rise in every layout."""
    layout, chunk = options.ring.layout, options.ring.chunk
    known, key = options.mask.known, ("positions", rank, size, seq_len, layout, chunk)
    if key not in known:
        whole = np.arange(seq_len)
        if layout == "striped" or size == 1:
            known[key] = whole[rank::size]
        else:
            chunks = {
                "contiguous": lambda: [rank],
                "zigzag": lambda: [rank, 2 * size - 1 - rank],
                "balanced": lambda: deal(options.mask, seq_len, size, options.ring)[rank],
            }[layout]()
            known[key] = whole.reshape(len(chunks) * size, -1)[chunks].reshape(-1)
    return known[key]


def tiles_of(rank: int, source: int, size: int, local_seq_len: int, options: Options) -> list[Tile]:
    """What the queries of a ring rank see of the block that `source` owns."""
    known, key = options.mask.known, ("tiles", rank, source, size, local_seq_len, *astuple(options.ring))
    if key not in known:
        of = (positions(each, size, size * local_seq_len, options) for each in (rank, source))
        known[key] = list(visible(options.mask, *of))
    return known[key]


Keys = tuple[slice, slice]  # of a block: in which sequences, from where to where


def seen_keys(rank: int, source: int, size: int, local_seq_len: int, options: Options) -> list[Keys]:
    """Which keys of `source` another ring rank's queries see; in sequences that are alike, the same of all."""
    found: list[Keys] = []
    for tile in tiles_of(rank, source, size, local_seq_len, options) if rank != source else ():
        if found and found[-1][0] == tile.rows and tile.kv.start <= found[-1][1].stop:
            tile = tile._replace(kv=slice(found[-1][1].start, max(tile.kv.stop, found[-1][1].stop)))
            found.pop()
        found.append((tile.rows, tile.kv))
    return found


def tiles_of_others(rank: int, size: int, local_seq_len: int, options: Options) -> Iterator[Tile]:
    """What a ring rank's queries see of the keys that they need of others, those of one rank after those of another."""
    begin = 0
    for source in range(size):
        for rows, keys in seen_keys(rank, source, size, local_seq_len, options):
            for tile in tiles_of(rank, source, size, local_seq_len, options):
                if tile.rows == rows and keys.start <= tile.kv.start < keys.stop:
                    here = slice(begin + tile.kv.start - keys.start, begin + tile.kv.stop - keys.start)
                    yield tile._replace(kv=here, kv_rows=ALL)
            begin += keys.stop - keys.start


def visible(mask: Mask, queries: Tokens, keys: Tokens) -> Iterator[Tile]:
    """What tokens at the positions `queries` see of those at `keys`; both rise. A query is in one tile at most."""
    high = np.searchsorted(keys, queries, side="right")
    first = mask.first(queries)
    for row, low in enumerate(np.searchsorted(keys, first)):
        rows = ALL if len(first) == 1 else slice(row, row + 1)
        for start, stop, windowed, causal in stairs(low, high):
            yield Tile(rows, slice(start, stop), slice(int(low[start]), int(high[stop - 1])), causal, windowed)


def stairs(low: Tokens, high: Tokens) -> Iterator[tuple[int, int, bool, bool]]:
    """Runs of queries whose first and last keys stay or move on by one: (start, stop, first moves, last moves).

    low, high [n]: the keys that each query sees, from low up to and without high.
    """
    sees = low < high
    steps = np.stack([np.diff(low), np.diff(high)])
    alike = ((steps == 0) | (steps == 1)).all(0) & sees[1:] & sees[:-1]
    kind = np.where(alike, 2 * steps[0] + steps[1], -1)  # of the step from a query to the next
    ends = np.append(np.flatnonzero(kind[1:] != kind[:-1]) + 1, len(kind))  # where a run of equal steps ends
    start = 0
    while start < len(low):
        stop = start + 1
        if not sees[start]:
            hidden = np.flatnonzero(sees[start:])
            start = start + int(hidden[0]) if len(hidden) else len(low)
            continue
        if start < len(kind) and kind[start] >= 0:
            stop = int(ends[np.searchsorted(ends, start, side="right")]) + 1
        windowed, causal = divmod(int(kind[start]), 2) if stop > start + 1 else (0, 0)
        yield start, stop, bool(windowed), bool(causal)
        start = stop
