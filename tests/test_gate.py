"""A gate against silent change: a fixed set of simulated configurations sends, computes and holds what it did.

A change that is meant renews runs/reference/gate/results.csv in the same commit (CONTRIBUTING.md).
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

from conf.columns import MEASURED

ROOT = Path(__file__).parents[1]
HELD = ["status", *(c.name for c in MEASURED if c.in_csv and c.name.startswith(("comm_", "calls_", "flops_", "peak_")))]
HELD += ["param_bytes", "grad_bytes", "optimizer_bytes", "activation_bytes", "other_bytes", "after_forward_bytes"]


def rows_of(folder: Path) -> dict[str, dict]:
    with open(folder / "results.csv", newline="") as file:
        rows = {row["run_id"]: row for row in csv.DictReader(file)}
    return {
        run_id: {column: row[column] for column in HELD} | {"command": row["command"]} for run_id, row in rows.items()
    }


def test_nothing_that_is_counted_has_changed(tmp_path):
    command = [sys.executable, "-m", "bench", "-m", "sweep=gate"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found, known = rows_of(tmp_path / "runs" / "gate"), rows_of(ROOT / "runs" / "reference" / "gate")
    assert found.keys() == known.keys()
    for run_id, row in known.items():
        assert found[run_id] == row, row["command"]
