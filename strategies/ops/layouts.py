"""Which tokens a rank of the ring owns, and which part of a visiting block its queries may see.

layout       rank r of P owns                       work under a causal mask
contiguous   chunk r                                rank r computes r + 1 of P blocks: uneven
zigzag       chunks r and 2P - 1 - r, of 2P         even (zhuzilin/ring-flash-attention; Llama 3, section 3.3.2)
striped      tokens r, r + P, r + 2P, ...           even up to one diagonal (Brandon et al. 2023)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from strategies.ops.mesh import Axis

ALL = slice(None)


class Tile(NamedTuple):
    """A part of the local queries against a part of the visiting keys: causal (equally long) or full."""

    q: slice
    kv: slice
    causal: bool


def ring_split(x: Tensor, dim: int, layout: str, axis: Axis) -> Tensor:
    """This ring rank's tokens of x along `dim`, in the layout's order."""
    size, rank = axis.size, axis.rank
    if size == 1:
        return x
    if layout == "contiguous":
        return x.chunk(size, dim)[rank]
    if layout == "striped":
        return x.unflatten(dim, (-1, size)).select(dim + 1, rank)
    chunks = x.chunk(2 * size, dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim)


def visible(layout: str, rank: int, source: int, local_seq_len: int) -> Tile | None:
    """What the queries of `rank` see of the block that `source` owns; None where the causal mask leaves nothing."""
    if source == rank:
        return Tile(ALL, ALL, causal=True)  # every layout keeps a rank's own tokens in order
    if layout == "contiguous":
        return Tile(ALL, ALL, causal=False) if source < rank else None
    if layout == "striped":
        if source < rank:
            return Tile(ALL, ALL, causal=True)
        return Tile(slice(1, None), slice(None, -1), causal=True) if local_seq_len > 1 else None
    half = local_seq_len // 2
    if source < rank:  # its early chunk is before both of ours, its late chunk after both
        return Tile(ALL, slice(None, half), causal=False)
    return Tile(slice(half, None), ALL, causal=False)  # our late chunk is after both of its chunks
