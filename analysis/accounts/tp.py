"""tp: Megatron's f and g around attention and around the MLP (Shoeybi et al. 2019, section 3)."""

from analysis.accounts.account import Account
from analysis.accounts.letters import WIDE, Letters
from analysis.accounts.published import MEGATRON, ODYSSEUS, USP, Published
from analysis.accounts.sent import Sent, all_reduce


def linears(s: Letters) -> list[Sent]:
    """Recomputed is attention's output, not the MLP's: recomputation stops when backward has what it needs."""
    again = [all_reduce("recompute", s.tp, s.D, "D")] if s.recompute else []
    return [all_reduce("forward", s.tp, 2 * s.D, "D", 2), *again, all_reduce("backward", s.tp, 2 * s.D, "D", 2)]


def ends(s: Letters) -> list[Sent]:
    """The embeddings' sum; the gradient of the head's input."""
    n, _ = s.pieces(s.loss_chunks, 1)
    return [
        all_reduce("forward", s.tp, s.D, "D"),
        all_reduce("backward", s.tp, s.D, "D", n),
        *vocab_loss(s, n),
    ]


def vocab_loss(s: Letters, pieces: int) -> list[Sent]:
    """Three fp32 numbers a token: the highest logit; the sum of exponentials and the label's logit. In pieces twice."""
    phases = ("forward", "recompute") if s.loss_chunks > 1 else ("forward",)
    return [all_reduce(phase, s.tp, 3 * s.tokens * WIDE, "3 T", 2 * pieces) for phase in phases]


ACCOUNT = Account(
    linears=(linears,),
    ends=ends,
    whole_norms=True,
    published=(
        Published(
            ODYSSEUS,
            "2 AllReduce",
            activations="8*B*L*d",
            weights="0",
            memory="activations full, weights 1/N",
            differs="2 AllReduce is one direction, 4 are both (8 L d counts both); activations are full between the "
            "matrices only: 10 of Megatron's 34 bytes per element",
        ),
        Published(USP, "4 AllReduce", activations="8*B*L*d", weights="0", memory="activations not split"),
        Published(MEGATRON, "4 AllReduce", activations="8*B*L*d", weights="0", memory="s b h (10 + 24/t)"),
    ),
    colour="#e69f00",
    marker="v",
)
