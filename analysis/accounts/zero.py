"""zero: nothing but weights travels, as Rajbhandari et al. 2020 count it in section 7 (weights.py)."""

from analysis.accounts.account import Account
from analysis.accounts.published import ODYSSEUS, ZERO, Published

ACCOUNT = Account(
    rows={"": {}, "zero_stage=2": {"stage": 2}, "zero_stage=1": {"stage": 1}, "zero_stage=0": {"stage": 0}},
    published=(
        Published(
            ODYSSEUS,
            "RS + 2 AG",
            activations="0",
            weights="4*d**2 + 3*d*i",
            differs="4 d² + 3 d i is the number of parameters: RS + 2 AG sends three times that",
        ),
        Published(ZERO, "RS + 2 AG", activations="0", weights="3*P"),
    ),
    colour="#7f7f7f",
    marker="+",
)
