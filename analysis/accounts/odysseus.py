"""odysseus: TP-SP's attention, also around a ring, and an MLP for which weights travel instead (Fang 2024)."""

from analysis.accounts.account import Account
from analysis.accounts.letters import Letters
from analysis.accounts.published import ODYSSEUS, Published
from analysis.accounts.ring import hops
from analysis.accounts.tp_sp import around_attention, ends
from analysis.accounts.weights import Group, attention_weights, mlp_weights, norm


def groups(s: Letters) -> list[Group]:
    """The MLP is whole on every rank, and sharded over all of them."""
    rest = [*attention_weights(s), norm(s), norm(s)]
    return [Group(rest, s.sharing, s.layers), Group(mlp_weights(s, 1), s.sharing * s.tp, s.layers, "world")]


ACCOUNT = Account(
    linears=(around_attention,),
    attention=(hops,),
    ends=ends,
    groups=groups,
    rows={"": {"tp": "N", "r": 1}, "with a ring": {}},
    published=(
        Published(
            ODYSSEUS,
            "3 RS + 2 AG; RS + 2 AG (MLP)",
            activations="5*B*L*d",
            weights="3*d*i",
            differs="swapped: 3 AG + 2 RS; 3 d i is the MLP's parameters, 9 d i are sent; and L > i does not make it "
            "cheapest: against TP-SP the bound is L > 1.8 i, against Ulysses + ZeRO-3 it is L < 12 d / (5 - 8/N)",
        ),
    ),
    colour="#8c6d00",
    marker="*",
)
