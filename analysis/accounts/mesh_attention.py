"""mesh_attention: queries along rows, keys and values along columns (arXiv 2512.20968; StarTrail, arXiv 2407.00611).

Rows of c ranks, columns of r / c. With c = 1 it is ring with ring.kv=all_gather, with c = r queries travel alone. What
is sent is least near c = sqrt(r rho), rho = h_kv / h. To gather the rows' sums of dO * O, a number for each K of `out`,
would be enough for backward; the kernels here ask for `out`.
"""

from analysis.accounts import flops
from analysis.accounts.account import Account
from analysis.accounts.letters import Amount, Letters
from analysis.accounts.published import MESH_ATTENTION, Published
from analysis.accounts.sent import Sent, all_gather, all_to_all, reduce_scatter


def exchanges(s: Letters) -> list[Sent]:
    """Parts of the output, and their log-sum-exp, go to the owners of the queries, who merge them."""
    row, column = s.inner, s.r / s.inner
    q, kv, e_g = row * s.q, 2 * column * s.kv, s.e_g / s.e
    return [
        *(
            line
            for phase in s.forwards
            for line in (
                all_gather(phase, row, q, "q", axis="inner"),
                all_gather(phase, column, kv, "k, v", axis="outer"),
                all_to_all(phase, row, q, "out", 1, axis="inner"),
                all_to_all(phase, row, row * s.numbers, "lse", 1, axis="inner"),
            )
        ),
        all_gather("backward", row, 3 * q, "dO, q, out", axis="inner"),
        all_gather("backward", row, row * s.numbers, "lse", axis="inner"),
        all_gather("backward", column, kv, "k, v", axis="outer"),
        reduce_scatter("backward", row, q * e_g, "dq", axis="inner"),
        reduce_scatter("backward", column, kv * e_g, "dk, dv", axis="outer"),
    ]


def pairs(s: Letters) -> Amount:
    """A rank (i, j) sees all of as many blocks as rank c i + c - 1 - j of a ring."""
    return flops.pairs(s, None if s.at is None else s.inner * (s.at["outer"] + 1) - 1 - s.at["inner"])


ACCOUNT = Account(
    attention=(exchanges,),
    pairs=pairs,
    in_grid=True,
    rows={"": {"inner": "c"}},
    published=(
        Published(
            MESH_ATTENTION,
            "P2Ps in rings of rows and of columns",
            activations="",
            differs="its formula was not found. Its claim: up to 85.4 % less than ring on 256 GPUs, heads and passes "
            "unknown; with h_kv = h and c = 16 it is 88.2 % here",
        ),
    ),
    colour="#44aa99",
    marker="d",
)
