"""An account of every strategy: what it sends and keeps, derived by hand from its paper. Plain arithmetic, no torch.

account.py says what an account is; letters.py, sent.py and weights.py are what they are written with.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from math import isclose
from pathlib import Path
from typing import Any

from analysis import UserError
from analysis.accounts.account import Account
from analysis.accounts.comparison import compared
from analysis.accounts.letters import Letters, part
from analysis.accounts.sent import Sent, total
from conf import seen
from conf.keys import Config
from conf.mask import Mask

WORK = seen.PAIR + seen.PAIR_BACKWARD  # of a pair
EXACT = 1e-12  # of whole numbers, as far as floating point has them


def account_of(name: str) -> Account | None:
    """The account of a strategy; None where nobody has written one. Raises UserError for one that cannot be read."""
    if not (Path(__file__).parent / f"{name}.py").exists():
        return None
    try:
        return importlib.import_module(f"analysis.accounts.{name}").ACCOUNT
    except Exception as error:
        raise at_fault(name, error) from error


def at_fault(name: str, error: Exception) -> UserError:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{file_of(name)}: {said}")


def file_of(name: str) -> str:
    return f"analysis/accounts/{name}.py"


def none_of(name: str) -> str:
    """What to answer where an account is asked for and there is none."""
    return f"{name} has no account: {file_of(name)} would be it"


def answer(
    config: Config, rank: int | None, question: Callable[[Account, Letters], Any], mask: Mask | None = None
) -> Any:
    """Of the account, for a rank of a resolved configuration, or the one that has most to do; None without an account.

    Raises UserError for an account that has no answer.
    """
    name = config.strategy.name
    account, letters = account_of(name), Letters.of(config, rank, mask)
    try:
        return None if account is None else question(account, letters)
    except Exception as error:
        raise at_fault(name, error) from error


def predicted(config: Config, rank: int | None = None, mask: Mask | None = None) -> list[Sent] | None:
    """What a rank, or the busiest, sends in a step. mask: where documents end by tokens."""
    if config.workload == "attention":
        backward = config.direction == "forward_backward"
        return answer(config, rank, lambda account, s: account.of_attention(s, backward), mask)
    return answer(config, rank, lambda account, s: account.of_step(s), mask)


def step_bytes(config: Config, rank: int | None = None, mask: Mask | None = None) -> int | None:
    """The bytes of that."""
    lines = predicted(config, rank, mask)
    return None if lines is None else round(total(lines))


def step_flops(config: Config, rank: int | None = None, mask: Mask | None = None) -> int | None:
    """What a rank, or the one that does most, computes in a step."""
    if config.workload == "attention":
        backward = config.direction == "forward_backward"
        return answer(config, rank, lambda account, s: round(account.flops_of_attention(s, backward)), mask)
    return answer(config, rank, lambda account, s: round(account.flops_of_step(s)), mask)


def work_max_by_mean(config: Config, mask: Mask) -> float:
    """Of attention, forward and backward: what the rank that has most computes, over the ranks' mean."""
    if seen.special(config):
        return seen.work_max_by_mean(config, mask)
    s = Letters.of(config)
    sequences = [max(1, part(config.micro_batch_size, s.dp, {"dp": rank}, "dp")) for rank in range(s.dp)]
    mean = sum(sequences) / s.dp * s.h / (s.tp * s.u) * s.L * (s.L + 1) / 2 / s.r
    account = account_of(config.strategy.name) or Account()
    return float(account.flops_of_attention(s, True) / (WORK * s.K * mean))


def differences(config: Config, rank: int, comm: Iterable[Mapping], flops: int, mask: Mask | None = None) -> list[str]:
    """What a rank has counted and its account does not say, a sentence each; nothing without an account."""
    lines, derived = predicted(config, rank, mask), step_flops(config, rank, mask)
    if lines is None or derived is None:
        return []
    wrong = [str(each) for each in compared(lines, comm) if not each.exact]
    if not isclose(flops, derived, rel_tol=EXACT):
        wrong.append(f"{derived:,} FLOP were derived and {flops:,} counted")
    return wrong
