"""ring: keys and values around the ring, in backward again, and their gradients (Liu et al. 2023).

With ring.kv=all_gather they are gathered, and their gradients reduce-scattered (Llama 3, section 3.3.2). With needed
each rank is sent the H keys that its queries see: in contiguous parts of m tokens rank r needs those from where the
document of its first token begins up to that, and of a window of W the last W - 1 of these.
"""

from typing import Any

from analysis.accounts.account import Account
from analysis.accounts.letters import Letters
from analysis.accounts.published import ODYSSEUS, USP, Published
from analysis.accounts.sent import Sent


def hops(s: Letters) -> list[Sent]:
    """Of r - 1 blocks of k and v, whichever way they come; dk and dv may travel in another dtype."""
    if s.needed:
        return needed(s)
    kv = (s.r - 1) * 2 * s.kv
    fetched, summed, calls = ("all_gather", "reduce_scatter", 1) if s.gather_kv else ("p2p", "p2p", s.r - 1)
    around: dict[str, Any] = {"axis": "ring", "beside": "" if s.gather_kv else "attention"}
    return [
        *(Sent(phase, fetched, "k, v", calls, kv, **around) for phase in (*s.forwards, "backward")),
        Sent("backward", summed, "dk, dv", calls, kv / s.e * s.e_g, **around),
    ]


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
    ),
    colour="#009e73",
    marker="s",
)
