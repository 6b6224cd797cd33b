"""What Hydra's other launchers and sweepers may do here, and what a search is told of each configuration."""

from math import inf

from hydra.conf import HydraConf
from omegaconf import DictConfig

from bench.app.records import Row
from conf.columns import MEASURED
from conf.words import Invalid, one_of

ONE_AT_A_TIME = ("ranks", "basic")  # of launchers


def check(config: DictConfig) -> None:
    """Raises Invalid for a sweep that cannot be as asked for; config is what all its configurations share."""
    launcher, sweeper = (config.hydra.runtime.choices[f"hydra/{group}"] for group in ("launcher", "sweeper"))
    if launcher not in ONE_AT_A_TIME and config.mode != "simulate":
        raise Invalid(
            f"hydra/launcher={launcher}: mode={config.mode} is timed, and configurations that run at the same time "
            "would measure each other; hydra/launcher=ranks or mode=simulate would do"
        )
    if (launcher, sweeper) != ("ranks", "product") and config.launch.name != "local":
        raise Invalid(
            f"launch={config.launch.name}: hosts run a whole sweep in step; hydra/launcher=ranks with "
            "hydra/sweeper=product would do"
        )
    if config.objective is not None:
        check_objective(config.objective, config.mode)
    elif sweeper == "optuna":
        raise Invalid("objective=null: hydra/sweeper=optuna needs a column to look for; objective=peak_bytes would do")


def check_objective(name: str, mode: str) -> None:
    numbers = {column.name: column for column in MEASURED if column.holds is float and column.in_csv}
    if name not in numbers:
        raise Invalid(one_of("objective", name, numbers))
    if numbers[name].timed and mode == "simulate":
        raise Invalid(f"objective={name}: mode=simulate measures no time; predicted_step_ms or peak_bytes would do")


def told(row: Row, objective: str | None, hydra: DictConfig | HydraConf) -> float | None:
    """Its value; a row that has none is worse than all others."""
    if objective is None:
        return None
    worst = -inf if "maximize" in str(getattr(hydra.sweeper, "direction", "")) else inf
    value = row.get(objective) if row["status"] == "ok" else None
    return worst if value is None else float(value)
