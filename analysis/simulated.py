"""Rows of mode=simulate that an analysis needs: those that are there, and those that `python -m bench` has to make."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis.reading import read_csv
from conf.keys import Config, run_id
from conf.resolve import resolve

KERNEL = "attention.kernel=sdpa"  # said, as what `auto` means depends on what is installed, and a row's id on that


def run(words: Sequence[str], name: str) -> None:
    """One configuration, whose row goes to runs/NAME. That it ends well is for its row to say."""
    command = ["bench", "-m", *words, f"name={name}"]
    print("python -m", *command, file=sys.stderr)
    subprocess.run([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)


def identity(config: Config) -> str:
    """Under which run_id its row is. Raises Invalid."""
    return run_id(resolve(config).config)


def rows_in(folder: Path) -> dict[str, dict]:
    """run_id -> row, of those that end in numbers."""
    return {row["run_id"]: row for row in read_csv(folder, []) if row["status"] in ("ok", "oom")}


def rows(wanted: Mapping[str, Sequence[str]], name: str, runs: Path = Path("runs")) -> dict[str, dict]:
    """run_id -> row of what is wanted: run_id -> the words that make it. What has no row in runs/NAME is run first."""
    known = rows_in(runs / name)
    for words in [words for identity, words in wanted.items() if identity not in known]:
        run(words, name)
    return rows_in(runs / name)
