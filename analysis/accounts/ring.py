"""ring: keys and values around the ring, in backward again, and their gradients (Liu et al. 2023).

With ring.kv=all_gather they are gathered, and their gradients reduce-scattered (Llama 3, section 3.3.2).
"""

from typing import Any

from analysis.accounts.account import Account
from analysis.accounts.letters import Letters
from analysis.accounts.published import ODYSSEUS, USP, Published
from analysis.accounts.sent import Sent


def hops(s: Letters) -> list[Sent]:
    """Of r - 1 blocks of k and v, whichever way they come; dk and dv may travel in another dtype."""
    kv = (s.r - 1) * 2 * s.kv
    fetched, summed, calls = ("all_gather", "reduce_scatter", 1) if s.gather_kv else ("p2p", "p2p", s.r - 1)
    around: dict[str, Any] = {"axis": "ring", "beside": "" if s.gather_kv else "attention"}
    return [
        *(Sent(phase, fetched, "k, v", calls, kv, **around) for phase in (*s.forwards, "backward")),
        Sent("backward", summed, "dk, dv", calls, kv / s.e * s.e_g, **around),
    ]


ACCOUNT = Account(
    attention=(hops,),
    rows={"": {}, "ring.kv=all_gather": {"gather_kv": True}},
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
