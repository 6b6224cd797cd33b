"""ulysses: heads for tokens and back: q, k, v, out, and their gradients (Jacobs et al. 2023, section 3)."""

from analysis.accounts.account import Account, kept_by_kernel
from analysis.accounts.letters import Amount, Letters, unless_alone
from analysis.accounts.published import ODYSSEUS, USP, Published
from analysis.accounts.sent import Sent, all_to_all


def exchanges(s: Letters) -> list[Sent]:
    """q, k and v together or each by itself, and out; for each chunk of the heads."""
    of, calls = ("q, k, v, out", 2) if s.packed else ("q; k; v; out", 4)
    size = 2 * s.q + 2 * s.kv
    return [all_to_all(phase, s.u, size, of, s.head_chunks * calls) for phase in (*s.forwards, "backward")]


def kept(s: Letters) -> Amount:
    """The output twice: as attention made it, for its backward, and as it came home, for the projection's."""
    return kept_by_kernel(s) + unless_alone(s.u, s.q)


ACCOUNT = Account(
    attention=(exchanges,),
    kept_in_attention=kept,
    rows={"": {}, "ulysses.packed": {"packed": True}, "ulysses.chunks=2": {"head_chunks": 2}},
    published=(
        Published(
            ODYSSEUS,
            "8 All2All; RS + 2 AG",
            activations="8*B*L*d/N",
            weights="4*d**2 + 3*d*i",
            differs="8 L d / N holds for h_kv = h, 4 (1 + h_kv / h) L d / N in general; the weights' is the number of "
            "parameters, three times that is sent",
        ),
        Published(
            USP,
            "8 All2All",
            activations="8*B*L*d/N",
            differs="holds for h_kv = h; the paper's 9.37 d² parameters of a Llama block forget the gate matrix "
            "(12.06 in 7B)",
        ),
    ),
    colour="#0072b2",
    marker="o",
)
