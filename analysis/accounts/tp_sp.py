"""tp_sp: what was gathered is gathered again for the weights' gradient, not kept (Korthikanti et al. 2022, 4.2.2)."""

from analysis.accounts.account import Account
from analysis.accounts.letters import Amount, Letters
from analysis.accounts.published import MEGATRON, ODYSSEUS, USP, Published
from analysis.accounts.sent import Sent, all_gather, reduce_scatter
from analysis.accounts.tp import vocab_loss


def around_attention(s: Letters) -> list[Sent]:
    """Tokens are gathered before it and split after it."""
    return [
        *(all_gather(phase, s.tp, s.D, "D") for phase in s.forwards),
        *(reduce_scatter(phase, s.tp, s.D, "D") for phase in s.forwards),
        *backward(s, 1),
    ]


def backward(s: Letters, n: Amount) -> list[Sent]:
    """The output's gradient; beside the gradient of the input its second half, and beside that of the weights its sum.

    In n pieces.
    """
    return [
        all_gather("backward", s.tp, s.D, "D", n),
        all_gather("backward", s.tp, s.D, "D", n, beside="products"),
        reduce_scatter("backward", s.tp, s.D, "D", n, beside="products"),
    ]


def around_mlp(s: Letters) -> list[Sent]:
    """The same in n pieces, but for what is run again: recomputation stops when backward has what it needs."""
    n, last = s.pieces(s.mlp_chunks, s.tp)
    lines = [all_gather("forward", s.tp, s.D, "D", n), reduce_scatter("forward", s.tp, s.D, "D", n)]
    if s.mlp_chunks > 1:  # each piece gathers again for itself
        lines += [all_gather("recompute", s.tp, s.D, "D", n)]
    if s.recompute and s.mlp_chunks == 1:  # for the block: its input, not its output
        lines += [all_gather("recompute", s.tp, s.D, "D")]
    if s.recompute and s.mlp_chunks > 1:  # for the block: all pieces but the last, with which backward begins
        others = (1 - last) * s.D
        lines += [
            all_gather("recompute", s.tp, others, "D", n - 1),
            reduce_scatter("recompute", s.tp, others, "D", n - 1),
        ]
    return [*lines, *backward(s, n)]


def ends(s: Letters) -> list[Sent]:
    """The embeddings' sum, split; the head's input gathered, in backward again, and in chunks once more."""
    n, _ = s.pieces(s.loss_chunks, s.tp)
    again = [all_gather("recompute", s.tp, s.D, "D", n)] if s.loss_chunks > 1 else []
    return [
        reduce_scatter("forward", s.tp, s.D, "D"),
        all_gather("forward", s.tp, s.D, "D", n),
        *again,
        all_gather("backward", s.tp, s.D, "D"),
        *backward(s, n)[1:],
        *vocab_loss(s, n),
    ]


ACCOUNT = Account(
    linears=(around_attention, around_mlp),
    ends=ends,
    published=(
        Published(
            ODYSSEUS,
            "6 RS + 4 AG",
            activations="10*B*L*d",
            weights="0",
            differs="the two are swapped: 6 AG + 4 RS, since backward gathers the saved shard again for the weights' "
            "gradient",
        ),
        Published(USP, "6 AG + 4 RS", activations="10*B*L*d", weights="0"),
        Published(
            MEGATRON,
            "4 AG + 4 RS",
            activations="8*B*L*d",
            weights="0",
            memory="s b h 34/t",
            differs="section 4.2.2 adds the 2 AG of backward and hides them behind computation; they are sent all the "
            "same",
        ),
    ),
    colour="#d55e00",
    marker="^",
)
