"""usp: Ulysses' exchanges, and inside them the ring's hops (Fang and Zhao 2024, section 3)."""

from dataclasses import replace

from analysis.accounts.account import Account
from analysis.accounts.letters import Letters
from analysis.accounts.ring import hops
from analysis.accounts.sent import Sent
from analysis.accounts.ulysses import exchanges, kept


def hops_of_chunks(s: Letters) -> list[Sent]:
    """One chunk of the heads after the other goes around the ring: as many bytes, in more calls."""
    return [replace(line, calls=s.head_chunks * line.calls) for line in hops(s)]


ACCOUNT = Account(attention=(exchanges, hops_of_chunks), kept_in_attention=kept, colour="#56b4e9", marker="D")
