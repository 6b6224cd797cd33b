"""tsp: shards of the matrices around the ring, and their gradients home; keys and values gathered (Shyam et al. 2026).

A matrix's shards may differ by a row, and every hop carries as much as the largest.
"""

from collections.abc import Callable
from typing import Any

from analysis.accounts import weights
from analysis.accounts.account import Account
from analysis.accounts.letters import WIDE, Amount, Letters, part, whole
from analysis.accounts.published import TSP, Published
from analysis.accounts.ring import hops
from analysis.accounts.sent import Sent, all_reduce
from analysis.accounts.weights import Group, Weight, norm


def slices(s: Letters, share: Callable[[Amount], Amount]) -> list[Weight]:
    """q, k, v, o, gate, up and down, of which a rank has a share of the rows; of down, of the columns."""
    q, kv = s.h * s.K, s.h_kv * s.K
    rows = [(q, s.d), (kv, s.d), (kv, s.d), (s.d, q), (s.i, s.d), (s.i, s.d)]
    return [*(Weight(share(n), other, "ring") for n, other in rows), Weight(s.d, share(s.i), "ring")]


def travel(s: Letters, of: str, start: int, stop: int, again: bool = True) -> list[Sent]:
    """Some of them in one buffer, forward and backward, and their gradients behind them."""
    carried = sum(w.rows * w.columns for w in slices(s, lambda n: whole(n / s.r))[start:stop])
    phases = (*(s.forwards if again else ("forward",)), "backward")
    around: dict[str, Any] = {"weights": True, "axis": "ring", "beside": "shards"}
    return [
        *(Sent(phase, "p2p", of, s.r - 1, (s.r - 1) * carried * s.e, **around) for phase in phases),
        Sent("backward", "p2p", f"d {of}", s.r - 1, (s.r - 1) * carried * s.e_dw, **around),
    ]


def around_attention(s: Letters) -> list[Sent]:
    return [*travel(s, "Wq, Wk, Wv", 0, 3), *travel(s, "Wo", 3, 4)]


def around_mlp(s: Letters) -> list[Sent]:
    """Recomputation stops when backward has what it needs: before down."""
    return [*travel(s, "Wgate, Wup", 4, 6), *travel(s, "Wdown", 6, 7, again=False)]


def groups(s: Letters) -> list[Group]:
    """ZeRO has the rest of dp to spread a rank's shards over."""
    mine = slices(s, lambda n: part(n, s.r, s.at, "ring"))
    return [Group([*mine, norm(s), norm(s)], s.dp, s.layers, "dp")]


def norms(s: Letters) -> list[Sent]:
    """Those of blocks are whole on every rank of the ring, which sees the gradient of its own tokens."""
    n = 2 * s.layers
    in_buffer = whole(n * s.d / s.dp) * (s.dp if s.stage == 0 else 1)
    elements = n * s.shard(s.d, "dp") if s.stage >= 2 else in_buffer
    return [all_reduce("backward", s.r, elements * WIDE, "norms", weights=True, axis="ring")]


ACCOUNT = Account(
    linears=(around_attention, around_mlp),
    attention=(hops,),
    groups=groups,
    whole=weights.of_blocks,
    summed=norms,
    rows={"": {"gather_kv": True}},
    published=(
        Published(
            TSP,
            "broadcasts (attention's weights), an exchange of k and v, a ring (the MLP's weights)",
            activations="",
            memory="weights and activations 1/N",
            differs="attention's shards go around the ring, too: as many bytes, and each beside a product",
        ),
    ),
    colour="#332288",
    marker="H",
)
