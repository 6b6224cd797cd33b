"""ring: keys and values around the ring, in backward again, and their gradients (Liu et al. 2023).

With ring.backward=q queries go around in backward, with dO, lse and the rows' sums of dO * O, and dq comes home behind
them (BurstAttention): fewer bytes from rho = 3/4 + 2 / (K e) on, where all is sent in e bytes. With ring.inner=c rings
of c ranks lie inside one of r / c (LoongTrain): as many bytes, most of them between neighbours. With ring.kv=all_gather
keys and values are gathered, and their gradients reduce-scattered (Llama 3, section 3.3.2). With needed each rank is
sent the H keys that its queries see: in contiguous parts of m tokens rank r needs those from where the document of its
first token begins up to that, and of a window of W the last W - 1 of these.
"""

from typing import Any

from analysis.accounts.account import Account
from analysis.accounts.letters import Amount, Letters
from analysis.accounts.published import BURST, LOONGTRAIN, ODYSSEUS, USP, Published
from analysis.accounts.sent import Sent, all_gather, reduce_scatter


def hops(s: Letters) -> list[Sent]:
    """Of r - 1 blocks of k and v, whichever way they come; what is a gradient may travel in another dtype."""
    if s.needed:
        return needed(s)
    kv, e_g = 2 * s.kv, s.e_g / s.e
    if s.gather_kv:
        return [
            *(all_gather(phase, s.r, s.r * kv, "k, v", axis="ring") for phase in (*s.forwards, "backward")),
            reduce_scatter("backward", s.r, s.r * kv * e_g, "dk, dv", axis="ring"),
        ]
    if s.queries:
        backward = [("q, dO", 2 * s.q), ("lse, row sums", 2 * s.numbers), ("dq", s.q * e_g)]
    else:
        backward = [("k, v", kv), ("dk, dv", kv * e_g)]
    blocks = [*((phase, "k, v", kv) for phase in s.forwards), *(("backward", *block) for block in backward)]
    return [line for block in blocks for line in around(s, *block)]


def around(s: Letters, phase: str, of: str, size: Amount) -> list[Sent]:
    """A block of each rank around the ring; or around inner rings, and from each to the next."""
    axes = [("ring", s.r - 1)]
    if s.inner is not None:
        axes = [("inner", s.r / s.inner * (s.inner - 1)), ("outer", s.r / s.inner - 1)]
    return [Sent(phase, "p2p", of, n, n * size, axis=axis, beside="attention") for axis, n in axes]


def needed(s: Letters) -> list[Sent]:
    """The keys that others' queries see, forward and backward; and the gradients of those that ours see of theirs."""
    if s.seen is None or s.r == 1:
        return []
    sent, returned = (2 * s.seen[keys] * s.token_kv for keys in ("sent", "received"))
    around: dict[str, Any] = {"axis": "ring", "beside": "attention"}
    return [
        *(Sent(phase, "all_to_all", "k, v", s.seen["sends"], sent, **around) for phase in (*s.forwards, "backward")),
        Sent("backward", "all_to_all", "dk, dv", s.seen["returns"], returned / s.e * s.e_g, **around),
    ]


ACCOUNT = Account(
    attention=(hops,),
    rows={
        "": {},
        "ring.kv=all_gather": {"gather_kv": True},
        "ring.backward=q": {"queries": True},
        "ring.inner=c": {"inner": "c"},
        "ring.kv=needed": {"needed": True, "seen": {"sent": "H", "received": "H", "sends": 1, "returns": 1}},
    },
    published=(
        Published(
            ODYSSEUS,
            "P2Ps; RS + 2 AG",
            activations="4*B*L*d",
            weights="4*d**2 + 3*d*i",
            differs="4 L d are k and v, forward and backward; their gradients travel too (2 L d more, 4 in fp32), and "
            "all of it shrinks with h_kv / h",
        ),
        Published(
            USP,
            "P2P",
            activations="4*B*L*d",
            differs="as above: the gradients of k and v are left out",
        ),
        Published(
            BURST,
            "P2Ps",
            activations="5*B*L*d + 2*B*L*h",
            variant="ring.backward=q",
            differs="2 L d are k and v forward, 3 L d + 2 L h q, dO, dq, lse and the row sums backward, as the paper "
            "counts them with h_kv = h; with fewer kv heads ring.backward=kv sends less",
        ),
        Published(LOONGTRAIN, "P2Ps", activations="6*B*L*d", variant="ring.inner=c", differs="for h_kv = h"),
    ),
    colour="#009e73",
    marker="s",
)
