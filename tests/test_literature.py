"""The page on what was found since 2024 is what its command prints, of rows that today's code would write."""

import csv
import shlex
from pathlib import Path

import pytest
import yaml

from analysis import UserError, literature
from analysis.accounts import step_bytes
from conf.compose import configuration
from conf.resolve import resolve

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "runs" / "reference" / "literature"


def test_the_page_is_what_the_command_prints():
    assert (ROOT / "docs" / "literature.md").read_text() == literature.printed(REFERENCE) + "\n"


def test_its_rows_are_those_of_todays_accounts():
    sweep = yaml.safe_load((ROOT / "conf" / "sweep" / "literature.yaml").read_text())
    fixed = [f"{key}={value}" for key, value in sweep.items() if not isinstance(value, dict)]
    fixed += [f"{section}.{key}={sweep[section][key]}" for section in ("loss", "ring") for key in sweep[section]]
    with open(REFERENCE / "results.csv", newline="") as file:
        for row in csv.DictReader(file):
            words = shlex.split(row["command"].partition("-m bench ")[2])
            words.remove("sweep=literature")
            config = resolve(configuration([*fixed, *words])).config
            assert round(step_bytes(config)) == int(row["comm_bytes"]), row["command"]


def test_a_sweep_without_a_method_is_told(tmp_path):
    lines = (REFERENCE / "results.csv").read_text().splitlines()
    (tmp_path / "results.csv").write_text("\n".join(line for line in lines if "strategy=upipe" not in line))
    with pytest.raises(UserError, match=r"upipe of llama2_7b on 32 ranks is not in the sweep; conf/sweep/literature"):
        literature.printed(tmp_path)
