"""One colour and one marker a strategy, in every picture: its account's, in Okabe and Ito's palette.

The palette is safe for colour-blind readers. A peer has the colour of the strategy that it answers to, and a marker of
its own.
"""

from analysis import UserError
from analysis.accounts import account_of
from analysis.accounts.account import Account
from conf import meshes

SPARE = "<>ph1X234"  # markers that no account has


def colour(strategy: str) -> str:
    peer = meshes.PEERS.get(strategy)
    account = known(peer.ours if peer else strategy)
    return account.colour if account and account.colour else "#444444"


def marker(strategy: str) -> str:
    account, names = known(strategy), [*meshes.names(), strategy]
    return account.marker if account and account.marker else SPARE[names.index(strategy) % len(SPARE)]


def known(strategy: str) -> Account | None:
    """Its account, if it can be read: who needs its formulas says why not."""
    try:
        return account_of(strategy)
    except UserError:
        return None
