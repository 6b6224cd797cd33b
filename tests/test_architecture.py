"""The house rules: which way imports run, what every strategy's card says, and that the README's steps work."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from strategies import STRATEGIES
from tests import instruments
from tests.cases import CASES, Case
from tests.ranks import on_ranks
from tests.test_ledger import SIZES

ROOT = Path(__file__).parents[1]
ALLOWED = {  # a folder -> the folders of this project that it may import
    "strategies/ops": {"strategies/ops"},
    "strategies": {"strategies", "strategies/ops"},
    "models": {"models"},
    "bench": {"bench", "models", "strategies", "strategies/ops", "analysis"},
    "analysis": {"analysis"},
}
ONLY_FROM_ANALYSIS = {"analysis.cost_table"}  # the prediction that a row is printed beside
MAY_INHERIT = {
    "Zero": "Single",
    "TPSP": "TP",
    "Odysseus": "TPSP",
    "USP": "Ulysses",
    "TPUSP": "TPSP",
}  # the papers say "X is Y plus"


def imports(file: Path) -> list[str]:
    """Every module that a file imports, lazily or not."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def folder_of(module: str) -> str | None:
    """The folder of this project that a module belongs to."""
    if module.startswith("strategies.ops"):
        return "strategies/ops"
    top = module.partition(".")[0]
    return top if top in ALLOWED else None


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_run_one_way(folder):
    for file in (ROOT / folder).rglob("*.py"):
        if folder == "strategies" and "ops" in file.parts:
            continue
        for module in imports(file):
            where = folder_of(module)
            assert where is None or where in ALLOWED[folder], f"{file.relative_to(ROOT)} imports {module}"
            if folder == "bench" and where == "analysis":
                assert module in ONLY_FROM_ANALYSIS


def test_the_model_knows_no_rank_and_analysis_no_torch():
    for file in (ROOT / "models").glob("*.py"):
        assert "torch.distributed" not in file.read_text()
    for file in (ROOT / "analysis").glob("*.py"):
        assert not any(module.partition(".")[0] == "torch" for module in imports(file))


def test_strategies_inherit_only_where_the_papers_do():
    for strategy in STRATEGIES.values():
        (parent,) = strategy.__bases__
        assert parent.__name__ == MAY_INHERIT.get(strategy.__name__, "Strategy")


LINES = ["paper", "tokens", "weights", "attention", "mlp", "embedding, head", "communication", "needs"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_card_has_every_line(name):
    card = inspect.getmodule(STRATEGIES[name]).__doc__
    assert card.startswith(f"{name}: ")
    assert [label for label in LINES if re.search(rf"^{label}\s", card, re.MULTILINE)] == LINES


KIND_OF = {"AG": "all_gather", "RS": "reduce_scatter", "AR": "all_reduce", "A2A": "all_to_all"}


def card_calls(name: str, case: Case) -> dict[tuple[str, str], int]:
    """The card's communication line as calls per block: '2 AG(D) + RS(D)' -> two all_gathers, one reduce_scatter."""
    card = inspect.getmodule(STRATEGIES[name]).__doc__
    line = re.search(r"^communication\s+(.*?)^needs", card, re.MULTILINE | re.DOTALL)[1]
    forward, backward = re.search(r"forward: (.*);\s+backward: (.*)", " ".join(line.split())).groups()
    if "the same with" in backward:  # usp: forward's, and more
        backward = backward.replace("the same with", forward.split(" + ")[0] + ",")
    calls = {}
    for phase, text in (("forward", forward), ("backward", backward)):
        for count, kind in re.findall(r"(\d*) ?\b(AG|RS|AR|A2A)\(", text):
            calls[phase, KIND_OF[kind]] = calls.get((phase, KIND_OF[kind]), 0) + int(count or 1)
        hops = text.count("(k, v)") + text.count("(dk, dv)")
        if hops and case.ring > 1:
            calls[phase, "p2p"] = hops * (case.ring - 1)
    return calls


def counted_calls(rank: int, case: Case) -> dict[tuple[str, str], int]:
    """What one block more adds to the ledger, as calls."""
    calls: dict[tuple[str, str], int] = {}
    for n_layers, sign in ((2, 1), (1, -1)):
        for entry in instruments.ledger(case, {**SIZES, "n_kv_heads": 8, "n_layers": n_layers}, 4, 32):
            key = entry["phase"], entry["kind"]
            calls[key] = calls.get(key, 0) + sign * entry["calls"]
    return {key: count for key, count in calls.items() if count}


FIRST_OF_FOUR = {case.strategy: case for case in reversed(CASES) if case.world_size == 4 and case.dp in (1, 4)}
FIRST_OF_FOUR |= {"usp": Case("usp", ulysses=2, ring=2), "tp_usp": Case("tp_usp", tp=2, ulysses=2, ring=2)}


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "single"])
def test_the_card_says_what_is_sent(name):
    case = FIRST_OF_FOUR[name]
    assert on_ranks(case.world_size, counted_calls, case)[0] == card_calls(name, case)


def test_adding_a_strategy_is_what_the_readme_says(tmp_path):
    """Follows the README's section to the letter, in a copy: its files, its line in the registry, its command."""
    section = (ROOT / "README.md").read_text().partition("## Add a strategy")[2].partition("\n## ")[0]
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*_cache", "__pycache__"))
    files = re.findall(r"`([\w/.]+)`[^`\n]*:\n+```(?:python|yaml)\n(.*?)```", section, re.DOTALL)
    assert [name for name, _ in files] == [
        "strategies/gather_all.py",
        "strategies/__init__.py",
        "conf/strategy/gather_all.yaml",
    ]
    for name, text in files:
        target = copy / name
        target.write_text(target.read_text() + text if target.exists() else text)
    (command,) = re.findall(r"```bash\n(python -m bench .*?)\n```", section)
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    arguments = [sys.executable, *command.split()[1:]]
    result = subprocess.run(arguments, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    losses = set(re.findall(r"\d+\.\d{4} → \d+\.\d{4}", result.stdout))
    assert len(losses) == 1, "the new strategy does not train like single"
