"""single: one process sends nothing and keeps everything."""

from analysis.accounts.account import Account

ACCOUNT = Account(colour="#000000", marker="x")
