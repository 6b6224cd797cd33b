"""What has been published about the same costs, as it stands there, and why a formula differs where it does.

Volumes are per transformer block, forward and backward, in elements sent by a rank; O(Ld) is taken as B L d. Factors of
(P-1)/P, which every source leaves out, do not count as a difference.
"""

from dataclasses import dataclass

ODYSSEUS = "Fang 2024, Odysseus, README, table"
USP = "Fang and Zhao 2024, USP, table 2"
MEGATRON = "Korthikanti et al. 2022, section 4"
BURST = "Sun et al. 2024, BurstAttention, arXiv 2403.09347"
LOONGTRAIN = "Gu et al. 2024, LoongTrain, arXiv 2406.18485"
MESH_ATTENTION = "Chen et al. 2025, Mesh-Attention, arXiv 2512.20968"
TSP = "Shyam et al. 2026, TSP, abstract"
ZERO = "Rajbhandari et al. 2020, ZeRO, section 7"


@dataclass(frozen=True)
class Published:
    """One row of a published table: collectives, elements of activations and of weights, and what it says of memory."""

    source: str
    collectives: str
    activations: str  # in the letters of the cost table
    weights: str = ""
    memory: str = "1/N"
    differs: str = ""  # why ours is another, in one line
    variant: str = ""  # the row of the cost table that it is beside
