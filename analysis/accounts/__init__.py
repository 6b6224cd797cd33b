"""An account of every strategy: what it sends and keeps, derived by hand from its paper. Plain arithmetic, no torch.

account.py says what an account is; letters.py, sent.py and weights.py are what they are written with.
"""

import importlib
from pathlib import Path

from analysis import UserError
from analysis.accounts.account import Account
from analysis.accounts.letters import Letters
from analysis.accounts.sent import Sent, total
from conf.keys import Config


def account_of(name: str) -> Account | None:
    """The account of a strategy; None where nobody has written one. Raises UserError for one that cannot be read."""
    if not (Path(__file__).parent / f"{name}.py").exists():
        return None
    try:
        return importlib.import_module(f"analysis.accounts.{name}").ACCOUNT
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file_of(name)}: {said}") from error


def file_of(name: str) -> str:
    return f"analysis/accounts/{name}.py"


def none_of(name: str) -> str:
    """What to answer where an account is asked for and there is none."""
    return f"{name} has no account: {file_of(name)} would be it"


def predicted(config: Config, rank: int | None = None) -> list[Sent] | None:
    """What a rank of a resolved configuration sends in a step, or the busiest; None without an account."""
    account = account_of(config.strategy.name)
    if account is None:
        return None
    letters = Letters.of(config, rank)
    if config.workload == "attention":
        return account.of_attention(letters, config.direction == "forward_backward")
    return account.of_step(letters)


def step_flops(config: Config, rank: int | None = None) -> int | None:
    """The FLOPs of a rank of a resolved configuration, or of the one that does most; None without an account."""
    account = account_of(config.strategy.name)
    if account is None:
        return None
    letters = Letters.of(config, rank)
    if config.workload == "attention":
        return round(account.flops_of_attention(letters, config.direction == "forward_backward"))
    return round(account.flops_of_step(letters))


def step_bytes(config: Config, rank: int | None = None) -> int | None:
    """The bytes that a rank of a resolved configuration sends in a step, or the busiest; None without an account."""
    lines = predicted(config, rank)
    return None if lines is None else round(total(lines))
