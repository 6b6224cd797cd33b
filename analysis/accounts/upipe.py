"""upipe: Ulysses' exchanges a stage at a time, and all of them again in backward (Ghadia et al. 2026)."""

from analysis.accounts.account import Account
from analysis.accounts.letters import WIDE, Amount, Letters
from analysis.accounts.published import Published
from analysis.accounts.sent import Sent, all_to_all


def exchanges(s: Letters) -> list[Sent]:
    """q and out in every stage, k and v in the first of those that share them; in backward their gradients, too."""
    once = [(phase, "q; out", "k; v", 2) for phase in s.forwards]
    return [
        line
        for phase, queries, keys, times in (*once, ("backward", "q; out; dout; dq", "k; v; dk; dv", 4))
        for line in (
            all_to_all(phase, s.u, times * s.q, queries, times * s.head_stages),
            all_to_all(phase, s.u, times * s.kv, keys, times * s.kv_stages),
        )
    ]


def kept(s: Letters) -> Amount:
    """The output once, as it came home: the projection's input, too. And the log-sum-exp of every head."""
    return s.q + s.tokens * s.h * WIDE


ACCOUNT = Account(
    attention=(exchanges,),
    kept_in_attention=kept,
    staged=True,
    published=(
        Published(
            "Ghadia et al. 2026, Untied Ulysses, abstract",
            "as Ulysses, in h / U stages",
            activations="",
            memory="87.5 % less in attention (64 heads on 8 ranks)",
            differs="that is 1 - U / h of what one exchange holds, which is so here too; of what attention's backward "
            "holds, input, output and their gradients stay whole",
        ),
    ),
    colour="#882255",
    marker="8",
)
