"""What has been published about the same costs, as it stands there, and why a formula differs where it does.

Volumes are per transformer block, forward and backward, in elements sent by a rank; O(Ld) is taken as B L d. Factors of
(P-1)/P, which every source leaves out, do not count as a difference.
"""

from dataclasses import dataclass

ODYSSEUS = "Fang 2024, Odysseus, README, table"
USP = "Fang and Zhao 2024, USP, table 2"
MEGATRON = "Korthikanti et al. 2022, section 4"
ZERO = "Rajbhandari et al. 2020, ZeRO, section 7"


@dataclass(frozen=True)
class Published:
    """One row of a published table: collectives, elements of activations and of weights, and what it says of memory."""

    source: str
    collectives: str
    activations: str  # an expression in the letters of the cost table, read by sympy
    weights: str
    memory: str
    differs: str  # why ours is another, in one line; empty where it is not


PUBLISHED = {
    "zero": [
        Published(
            ODYSSEUS,
            "RS + 2 AG",
            "0",
            "4*d**2 + 3*d*i",
            "1/N",
            "4 d² + 3 d i is the number of parameters: RS + 2 AG sends three times that",
        ),
        Published(ZERO, "RS + 2 AG", "0", "3*P", "1/N", ""),
    ],
    "tp": [
        Published(
            ODYSSEUS,
            "2 AllReduce",
            "8*B*L*d",
            "0",
            "activations full, weights 1/N",
            "2 AllReduce is one direction, 4 are both (8 L d counts both); activations are full between the matrices "
            "only: 10 of Megatron's 34 bytes per element",
        ),
        Published(USP, "4 AllReduce", "8*B*L*d", "0", "activations not split", ""),
        Published(MEGATRON, "4 AllReduce", "8*B*L*d", "0", "s b h (10 + 24/t)", ""),
    ],
    "tp_sp": [
        Published(
            ODYSSEUS,
            "6 RS + 4 AG",
            "10*B*L*d",
            "0",
            "1/N",
            "the two are swapped: 6 AG + 4 RS, since backward gathers the saved shard again for the weights' gradient",
        ),
        Published(USP, "6 AG + 4 RS", "10*B*L*d", "0", "1/N", ""),
        Published(
            MEGATRON,
            "4 AG + 4 RS",
            "8*B*L*d",
            "0",
            "s b h 34/t",
            "section 4.2.2 adds the 2 AG of backward and hides them behind computation; they are sent all the same",
        ),
    ],
    "ulysses": [
        Published(
            ODYSSEUS,
            "8 All2All; RS + 2 AG",
            "8*B*L*d/N",
            "4*d**2 + 3*d*i",
            "1/N",
            "8 L d / N holds for h_kv = h, 4 (1 + h_kv / h) L d / N in general; the weights' is the number of "
            "parameters, three times that is sent",
        ),
        Published(
            USP,
            "8 All2All",
            "8*B*L*d/N",
            "",
            "1/N",
            "holds for h_kv = h; the paper's 9.37 d² parameters of a Llama block forget the gate matrix (12.06 in 7B)",
        ),
    ],
    "ring": [
        Published(
            ODYSSEUS,
            "P2Ps; RS + 2 AG",
            "4*B*L*d",
            "4*d**2 + 3*d*i",
            "1/N",
            "4 L d are k and v, forward and backward; their gradients travel too (2 L d more, 4 in fp32), and all "
            "of it shrinks with h_kv / h",
        ),
        Published(USP, "P2P", "4*B*L*d", "", "1/N", "as above: the gradients of k and v are left out"),
    ],
    "odysseus": [
        Published(
            ODYSSEUS,
            "3 RS + 2 AG; RS + 2 AG (MLP)",
            "5*B*L*d",
            "3*d*i",
            "1/N",
            "swapped: 3 AG + 2 RS; 3 d i is the MLP's parameters, 9 d i are sent; and L > i does not make it cheapest: "
            "against TP-SP the bound is L > 1.8 i, against Ulysses + ZeRO-3 it is L < 12 d / (5 - 8/N)",
        ),
    ],
}
