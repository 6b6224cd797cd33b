"""tp_usp: TP-SP's linears around USP's attention (Fang and Zhao 2024, section 4)."""

from analysis.accounts.account import Account
from analysis.accounts.tp_sp import around_attention, around_mlp, ends
from analysis.accounts.ulysses import exchanges, kept
from analysis.accounts.usp import hops_of_chunks

ACCOUNT = Account(
    linears=(around_attention, around_mlp),
    attention=(exchanges, hops_of_chunks),
    kept_in_attention=kept,
    ends=ends,
    colour="#cc79a7",
    marker="P",
)
