"""Where people keep their numbers: TensorBoard, wandb and MLflow, Parquet, and a DataFrame. All of it on this machine.

What was logged is read back with the tracker's own reader, and is what record.json has.
"""

import json
import os
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import analysis
from analysis import UserError
from bench.app import logs, parquet, records
from bench.app.sweep import run_all, run_one
from conf.columns import columns
from conf.words import Invalid
from tests.jobs import job

ROOT = Path(__file__).parents[1]
SWEEP = ["steps=3", "warmup=2", "seq_len=32"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """No variable of somebody's server, and a folder of one's own."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "default"


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed (an extra of pyproject.toml)")


def in_tensorboard(folder: Path) -> dict[str, tuple[dict, dict, dict]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    found = {}
    for run in (folder / "tensorboard").iterdir():
        events = EventAccumulator(str(run)).Reload()
        read = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        steps = {tag.removeprefix("by step/"): of for tag, of in read.items() if tag.startswith("by step/")}
        numbers = {tag.removeprefix("row/"): of[0] for tag, of in read.items() if tag.startswith("row/")}
        start = parse_session_start_info_plugin_data(events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content)
        config = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
        found[run.name] = config, numbers, steps
    return found


def records_of(file: Path) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format after a head of 7 bytes: blocks of 32 KiB with pieces of records."""
    content, at, record = file.read_bytes(), 7, b""
    while at < len(content):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, size, piece = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if piece in (1, 4):  # whole, or the last
            yield record
            record = b""


def in_wandb(folder: Path) -> dict[str, tuple[dict, dict, dict]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for file in folder.glob("wandb/offline-run-*/run-*.wandb"):
        assert file.stem.removeprefix("run-") not in found
        config, numbers, steps = {}, {}, {}
        for record in map(Record.FromString, records_of(file)):
            told = (*record.run.config.update, *record.config.update)  # with the run, or after it on a busy machine
            config |= {each.key or each.nested_key[0]: json.loads(each.value_json) for each in told}
            numbers |= {each.key or each.nested_key[0]: json.loads(each.value_json) for each in record.summary.update}
            line = {each.key or each.nested_key[0]: json.loads(each.value_json) for each in record.history.item}
            for name in line.keys() & {"loss", "step_ms", "step_bytes"}:
                steps.setdefault(name, {})[line["_step"]] = line[name]
        found[file.stem.removeprefix("run-")] = config, numbers, steps
    return found


def in_mlflow(folder: Path) -> dict[str, tuple[dict, dict, dict]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = {}
    for run in client.search_runs([client.get_experiment_by_name(folder.name).experiment_id]):
        names = ("loss", "step_ms", "step_bytes")
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
        steps = {name: {m.step: m.value for m in history} for name, history in histories.items()}
        found[run.data.tags["run_id"]] = run.data.params, run.data.metrics, steps
    return found


READERS = {"tensorboard": in_tensorboard, "wandb": in_wandb, "mlflow": in_mlflow}


@pytest.mark.parametrize("log", READERS)
def test_a_row_is_a_run_with_its_numbers_by_step(log, here):
    needs(log)
    jobs = [job(*SWEEP, f"log={log}", f"strategy={name}", "rerun=all") for name in ("ulysses", "ring")]
    run_all(jobs)
    run_all(jobs[:1])  # again: the same run, not one more
    rows = {row["run_id"]: row for row in records.load_all(here)}
    found, deadline = READERS[log](here), time.monotonic() + 30
    while not all(config for config, *_ in found.values()) and time.monotonic() < deadline:
        time.sleep(0.5)  # wandb's own process writes its file, on a busy machine later
        found = READERS[log](here)
    assert found.keys() == rows.keys()
    for run_id, row in rows.items():
        config, numbers, steps = found[run_id]
        assert {name: str(config[name]) for name in ("strategy", "seq_len")} == {
            "strategy": row["strategy"],
            "seq_len": str(float(row["seq_len"]) if log == "tensorboard" else row["seq_len"]),
        }
        for name in ("peak_bytes", "comm_bytes", "step_ms_median", "loss_last"):
            assert numbers[name] == pytest.approx(row[name], rel=1e-6), name
        assert len(row["losses"]) == len(row["steps_bytes"]) == 5
        assert len(row["steps_ms"]) == 3
        assert steps["loss"] == pytest.approx(dict(enumerate(row["losses"])), rel=1e-6)
        assert steps["step_ms"] == pytest.approx(dict(enumerate(row["steps_ms"], 2)), rel=1e-6)
        assert steps["step_bytes"] == pytest.approx(dict(enumerate(row["steps_bytes"])), rel=1e-6)


def test_what_is_not_asked_for_is_not_imported(here):
    packages = {*READERS, "datasets", "tokenizers", "huggingface_hub"}
    code = (
        "import sys; from bench.app.sweep import run_one; from tests.jobs import job; "
        f"run_one(job('mode=simulate', 'seq_len=32')); print({packages} & sys.modules.keys())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "set()"
    assert {path.name for path in here.iterdir()}.isdisjoint({"wandb", "tensorboard", "mlflow.db"})


def test_a_package_that_is_not_there_is_said_before_the_first_rank(here, monkeypatch):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Invalid, match="log=wandb needs the package wandb; pip install wandb would do"):
        run_one(job("log=wandb"))
    assert not here.exists()


def test_a_tracker_that_fails_costs_no_row(here, monkeypatch, capsys):
    def full(*_) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(logs, "check", lambda configs: None)
    monkeypatch.setitem(logs.LOGS, "mlflow", full)
    row = run_one(job(*SWEEP, "log=mlflow", "mode=simulate"))
    assert row["status"] == "ok"
    assert "is not logged (OSError: no space left)" in capsys.readouterr().out
    assert records.load_all(here)[0]["run_id"] == row["run_id"]


def test_memory_by_step_is_at_least_what_the_model_takes(here):
    """Resident, so with what Python and torch take; and a model of 80 MB more shows."""
    small, large = (run_one(job(*SWEEP, "world_size=1", f"model.vocab_size={v}")) for v in (256, 40_256))
    more = large["peak_bytes"] - small["peak_bytes"]
    grown = large["steps_bytes"][-1] - small["steps_bytes"][-1]
    assert more >= 4 * 40_000 * 128 * 4 * 2  # weights, gradients, two moments; embedding and head
    assert 0.5 * more < grown < 2 * more


@pytest.fixture
def sweep(here) -> Path:
    """A row that trained, one that was simulated and one that was refused, with a number that no int64 can be."""
    run_all(
        [
            job(*SWEEP, "strategy=ring"),
            job(*SWEEP, "mode=simulate", "cluster=h100", "model=llama3_8b", "model.n_layers=2"),
            job(*SWEEP, f"seq_len={10**30}"),
        ]
    )
    return here


def test_a_sweep_is_a_data_frame_with_units(sweep):
    rows = analysis.load(sweep)
    assert list(rows.columns) == ["label", *(column.name for column in columns())]
    assert rows.status.tolist() == ["ok", "ok", "invalid"]
    assert rows.attrs["units"]["step_ms_median"] == "ms"
    assert rows.attrs["units"]["peak_bytes"] == "B"
    assert rows.attrs["meanings"]["steps"].startswith("timed steps")
    assert (rows.peak_bytes.dtype, rows.batch_size.dtype, rows.noisy.dtype) == ("float64", "Int64", "boolean")
    stored = {row["run_id"]: row for row in records.load_all(sweep)}
    for row in rows.itertuples():
        assert row.losses == stored[row.run_id].get("losses")
        assert row.model == stored[row.run_id]["model"]
    trained = rows.iloc[0]
    assert trained.peak_bytes == stored[trained.run_id]["peak_bytes"]


def test_what_cannot_be_read_is_a_warning_and_nothing_at_all_an_error(sweep, tmp_path):
    first, *_ = sorted(sweep.glob("*/comm.csv"))
    first.write_text("torn\n1\n")
    with pytest.warns(UserWarning, match="comm.csv"):
        assert len(analysis.load(sweep)) == 3
    with pytest.raises(UserError, match="no such folder"):
        analysis.load(tmp_path / "nowhere")


def test_the_reference_results_are_data_frames_without_a_warning():
    for folder in (ROOT / "runs" / "reference").iterdir():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(analysis.load(folder)) > 0, folder


def test_parquet_has_what_the_csv_has(sweep):
    needs("pyarrow")
    import pandas as pd
    from pyarrow.parquet import read_schema

    as_csv, found = pd.read_csv(sweep / "results.csv"), pd.read_parquet(sweep / parquet.NAME)
    assert set(found.columns) - set(as_csv.columns) == {"losses", "steps_ms", "steps_bytes", "round_ms"}
    assert found.run_id.tolist() == as_csv.run_id.tolist()
    for name in ("peak_bytes", "comm_bytes", "step_ms_median", "predicted_step_ms", "batch_size"):
        pd.testing.assert_series_equal(found[name], as_csv[name], check_dtype=False)
    assert found.seq_len.isna().tolist() == [False, False, True]  # of 31 digits
    assert found.losses[0].tolist() == records.load_all(sweep)[0]["losses"]
    field = read_schema(sweep / parquet.NAME).field("peak_bytes")
    assert field.metadata == {b"unit": b"B", b"meaning": b"at most, the sum of its five parts"}


def test_without_pyarrow_there_is_a_csv_alone(here, monkeypatch):
    monkeypatch.setattr(parquet, "available", lambda: False)
    run_one(job(*SWEEP, "mode=simulate"))
    assert (here / "results.csv").exists()
    assert not (here / parquet.NAME).exists()
