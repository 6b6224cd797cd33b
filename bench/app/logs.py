"""log=tensorboard|wandb|mlflow: a row, when it is done, as a run of what people keep their numbers in.

A run has the keys of its configuration, the numbers of its row, and by step losses, times and bytes. It stays on this
machine, beside the row: wandb is offline (`wandb sync` sends it later), unless WANDB_MODE says otherwise; MLflow writes
mlflow.db, unless MLFLOW_TRACKING_URI names a server.
"""

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.app.records import Row
from conf.columns import MEASURED
from conf.keys import Config, keys
from conf.labels import title
from conf.words import Invalid

Steps = Mapping[int, Mapping[str, float]]
AT_ONCE = 100  # params, of which MLflow takes no more


def check(configs: Iterable[Config]) -> None:
    """Is the package there of what these configurations ask for? Raises Invalid."""
    for name in sorted({config.log for config in configs} & LOGS.keys()):
        if importlib.util.find_spec(name) is None:
            raise Invalid(f"log={name} needs the package {name}; pip install {name} would do")


def logged(row: Row, sweep: Path) -> str | None:
    """Log a row that ran. What goes wrong, in a sentence: the row is on disk all the same."""
    log = LOGS.get(str(row["log"]))
    if log is None or row["status"] == "invalid" or row.get("kept"):
        return None
    try:
        log(sweep, row, asked(row), numbers(row), by_step(row))
    except Exception as error:  # of a library of others, and of its disk or its server
        said = " ".join(str(error).split())
        return f"log={row['log']}: the row of {title(row, [])} is not logged ({type(error).__name__}: {said})"
    return None


def asked(row: Row) -> dict[str, Any]:
    """What its configuration says, by column."""
    return {key.column: row[key.column] for key in keys().values() if row.get(key.column) is not None}


def numbers(row: Row) -> dict[str, float]:
    """Of the columns that are measured, those with a number."""
    found = {column.name: row.get(column.name) for column in MEASURED if column.in_csv}
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}


def by_step(row: Row) -> Steps:
    """By step, warm-up included, which has no times; of several rounds the last one's."""
    warmup = row["warmup"] if row.get("steps_ms") else 0
    series = {
        "loss": row.get("losses") or [],
        "step_ms": [None] * warmup + (row.get("steps_ms") or []),
        "step_bytes": row.get("steps_bytes") or [],
    }
    steps = range(max(map(len, series.values())))
    of_each = ({name: values[i] for name, values in series.items() if i < len(values)} for i in steps)
    return {i: {name: value for name, value in each.items() if value is not None} for i, each in enumerate(of_each)}


def to_tensorboard(sweep: Path, row: Row, config: dict, numbers: dict, steps: Steps) -> None:
    """runs/NAME/tensorboard/RUN_ID; `tensorboard --logdir runs/NAME/tensorboard` shows all, and compares their keys."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def scalars(values: Mapping[str, float]) -> Summary:
        return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])

    folder = sweep / "tensorboard" / row["run_id"]
    for older in folder.glob("events.*"):  # of a row that this one replaces
        older.unlink()
    writer, now = EventFileWriter(str(folder)), time.time()
    plain = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in config.items()
    }
    writer.add_event(Event(wall_time=now, summary=hparams_pb({**plain, "status": row["status"]}, row["run_id"])))
    for step, values in steps.items():
        writer.add_event(
            Event(wall_time=now, step=step, summary=scalars({f"by step/{k}": v for k, v in values.items()}))
        )
    writer.add_event(Event(wall_time=now, summary=scalars({f"row/{k}": v for k, v in numbers.items()})))
    writer.close()


def to_wandb(sweep: Path, row: Row, config: dict, numbers: dict, steps: Steps) -> None:
    """runs/NAME/wandb/offline-run-*: a project for the sweep."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    for older in sweep.glob(f"wandb/offline-run-*-{row['run_id']}"):  # of a row that this one replaces
        shutil.rmtree(older)
    run = wandb.init(
        project=sweep.name,
        name=title(row, []),
        id=row["run_id"],
        resume="allow",  # where it was synced, it is the same run again
        dir=sweep,
        config=config,
        tags=[row["status"]],
        settings=wandb.Settings(silent=True, console="off"),
    )
    for step, values in steps.items():
        run.log(dict(values), step=step)
    run.summary.update(numbers)
    run.finish()


def to_mlflow(sweep: Path, row: Row, config: dict, numbers: dict, steps: Steps) -> None:
    """runs/NAME/mlflow.db: an experiment for the sweep; `mlflow ui --backend-store-uri sqlite:///...` shows it."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    beside = f"sqlite:///{(sweep / 'mlflow.db').resolve()}"
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or beside)
    found = client.get_experiment_by_name(sweep.name)
    experiment = found.experiment_id if found else client.create_experiment(sweep.name)
    for older in client.search_runs([experiment], f"tags.run_id = '{row['run_id']}'"):  # that this one replaces
        client.delete_run(older.info.run_id)
    run_id = client.create_run(
        experiment, run_name=title(row, []), tags={"run_id": row["run_id"], "status": row["status"]}
    ).info.run_id
    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, step) for step, values in steps.items() for name, value in values.items()]
    metrics += [Metric(name, value, now, 0) for name, value in numbers.items()]
    params = [Param(name, str(value)) for name, value in config.items()]
    for first in range(0, max(len(params), len(metrics)), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        client.log_batch(run_id, metrics=metrics[part], params=params[part])
    client.set_terminated(run_id, "FINISHED" if row["status"] == "ok" else "FAILED")


LOGS: dict[str, Callable[[Path, Row, dict, dict, Steps], None]] = {
    "tensorboard": to_tensorboard,
    "wandb": to_wandb,
    "mlflow": to_mlflow,
}
