"""The house rules: which way imports run, that every file is listed, what every strategy's card says, and that
adding one is what docs/strategy.md says."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import strategies
from conf.meshes import STRATEGIES, heads, sequence
from tests import instruments
from tests.cases import CASES, Case
from tests.ranks import on_ranks
from tests.test_ledger import SIZES

ROOT = Path(__file__).parents[1]
ALLOWED = {  # a folder -> the folders of this project that it may import, beside itself
    "conf": set(),
    "strategies/ops": {"conf"},
    "strategies": {"conf", "strategies/ops"},
    "models": {"conf"},
    "bench/instruments": {"conf", "strategies", "strategies/ops"},
    "bench/workloads": {"conf", "strategies", "strategies/ops", "models", "bench/instruments"},
    "bench/simulation": {"conf", "models", "strategies/ops", "bench/instruments", "bench/workloads"},
    "bench/ranks": {"conf", "models", "strategies/ops", "bench/instruments", "bench/workloads", "bench/simulation"},
    "bench/app": {
        "conf",
        "models",
        "bench/instruments",
        "bench/workloads",
        "bench/simulation",
        "bench/ranks",
        "analysis",
    },
    "analysis": {"conf"},
}
ONLY_FROM_ANALYSIS = {"analysis", "analysis.accounts"}  # the prediction that a row is printed beside, and its error
MAY_INHERIT = {
    "Zero": "Single",
    "TPSP": "TP",
    "Odysseus": "TPSP",
    "MeshAttention": "Ring",
    "USP": "Ulysses",
    "TPUSP": "TPSP",
    "UPipe": "Ulysses",
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


def folder_of(path: str) -> str | None:
    """The folder of ALLOWED that a file or a module is in, the innermost; None for other people's."""
    inside = [folder for folder in ALLOWED if path == folder or path.startswith(f"{folder}/")]
    return max(inside, key=len, default=None)


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_run_one_way(folder):
    for file in (ROOT / folder).rglob("*.py"):
        if folder_of(str(file.relative_to(ROOT))) != folder:
            continue
        for module in imports(file):
            where = folder_of(module.replace(".", "/"))
            assert where in {None, folder, *ALLOWED[folder]}, f"{file.relative_to(ROOT)} imports {module}"
            if folder == "bench/app" and where == "analysis":
                assert module in ONLY_FROM_ANALYSIS


def test_who_asks_and_who_reads_needs_no_torch():
    """Nor does the parent of the ranks, until it must count GPUs: whoever asks need not wait for torch."""
    for folder in ("conf", "analysis"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not any(module.partition(".")[0] in ("torch", "strategies") for module in imports(file)), file
    code = "import sys, bench.app.sweep, conf.compose; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_model_knows_no_rank():
    for file in (ROOT / "models").glob("*.py"):
        assert "torch.distributed" not in file.read_text()


def test_strategies_inherit_only_where_the_papers_do():
    for name in STRATEGIES:
        strategy = strategies.load(name)
        (parent,) = strategy.__bases__
        assert parent.__name__ == MAY_INHERIT.get(strategy.__name__, "Strategy")


def test_every_strategy_is_a_file_and_every_file_a_strategy():
    files = {file.stem for file in (ROOT / "strategies").glob("*.py")} - {"__init__", "base"}
    assert files == set(STRATEGIES)


def listed() -> set[str]:
    """The .py files of folders in the trees of README.md and docs/files.md."""
    found, folders = set(), {}
    for page in ("README.md", "docs/files.md"):
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
        for line in "".join(block for language, block in blocks if not language).splitlines():
            depth = len(line) - len(line.lstrip())
            if first := re.match(r"\s*(\w+)/", line):
                folders[depth] = first[1]
            if inside := "/".join(folders[each] for each in sorted(folders) if each < depth):
                found |= {f"{inside}/{name}" for name in re.findall(r"\w+\.py", line)}
    return found


def test_every_file_is_listed():
    folders = ("conf", "strategies", "strategies/ops", "models", "analysis")
    files = {file.relative_to(ROOT) for folder in folders for file in (ROOT / folder).glob("*.py")}
    assert listed() == {str(file) for file in files if not file.name.startswith("__")}


LINES = ["paper", "tokens", "weights", "attention", "mlp", "embedding, head", "communication", "needs"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_card_has_every_line(name):
    card = inspect.getmodule(strategies.load(name)).__doc__
    assert card.startswith(f"{name}: ")
    assert [label for label in LINES if re.search(rf"^{label}\s", card, re.MULTILINE)] == LINES


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_card_says_what_the_mesh_needs(name):
    """In words what conf/meshes.py has as rules."""
    needs = re.search(r"^needs\s+(.*)", inspect.getmodule(strategies.load(name)).__doc__, re.MULTILINE | re.DOTALL)[1]
    assert ("n_heads %" in needs) == (heads in STRATEGIES[name].needs)
    assert ("seq_len %" in needs) == (sequence in STRATEGIES[name].needs)


KIND_OF = {"AG": "all_gather", "RS": "reduce_scatter", "AR": "all_reduce", "A2A": "all_to_all"}


HOPS = r"(?:(\d) x )?\S+-1 hops of (\([^)]*\)(?: and of \([^)]*\))?)"


def card_calls(name: str, case: Case) -> dict[tuple[str, str], int]:
    """The card's communication line as calls per block: '2 AG(D) + RS(D)' -> two all_gathers, one reduce_scatter."""
    card = inspect.getmodule(strategies.load(name)).__doc__
    line = re.search(r"^communication\s+(.*?)^needs", card, re.MULTILINE | re.DOTALL)[1]
    forward, backward = re.search(r"forward: (.*);\s+backward: (.*)", " ".join(line.split())).groups()
    if "the same with" in backward:  # usp: forward's, and more
        backward = backward.replace("the same with", forward.split(" + ")[0] + ",")
    calls = {}
    for phase, text in (("forward", forward), ("backward", backward)):
        for count, kind in re.findall(r"(\d*) ?\b(AG|RS|AR|A2A)\(", text):
            calls[phase, KIND_OF[kind]] = calls.get((phase, KIND_OF[kind]), 0) + int(count or 1)
        hops = sum(int(times or 1) * of.count("(") for times, of in re.findall(HOPS, text))
        if "in each stage" in text:
            calls[phase, "all_to_all"] *= SIZES["n_heads"] // case.ulysses
        if hops and case.ring > 1:
            calls[phase, "p2p"] = hops * (case.ring - 1)
    return calls


def counted_calls(rank: int, case: Case) -> dict[tuple[str, str], int]:
    """What one block more adds to the ledger, as calls."""
    calls: dict[tuple[str, str], int] = {}
    for n_layers, sign in ((2, 1), (1, -1)):
        for entry in instruments.ledger(case, {**SIZES, "n_kv_heads": 8, "n_layers": n_layers}, 4, 32):
            key = entry.phase, entry.kind
            calls[key] = calls.get(key, 0) + sign * entry.calls
    return {key: count for key, count in calls.items() if count}


FIRST_OF_FOUR = {case.strategy: case for case in reversed(CASES) if case.world_size == 4 and case.dp in (1, 4)}
FIRST_OF_FOUR["mesh_attention"] = Case("mesh_attention", ring=4, inner=2, kv="all_gather")
FIRST_OF_FOUR |= {"usp": Case("usp", ulysses=2, ring=2), "tp_usp": Case("tp_usp", tp=2, ulysses=2, ring=2)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "single"])
def test_the_card_says_what_is_sent(name):
    case = FIRST_OF_FOUR[name]
    assert on_ranks(case.world_size, counted_calls, case)[0] == card_calls(name, case)


@pytest.mark.slow
def test_adding_a_strategy_is_what_the_page_says(tmp_path):
    """Follows docs/strategy.md to the letter, in a copy: its files, its line in the registry, its commands."""
    page = (ROOT / "docs/strategy.md").read_text()
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*_cache", "__pycache__"))
    files = re.findall(r"`([\w/.]+)`[^`\n]*:\n+```python\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in files] == [
        "strategies/gather_all.py",
        "conf/meshes.py",
        "analysis/accounts/gather_all.py",
    ]
    for name, text in files:
        target = copy / name
        target.write_text(target.read_text() + text if target.exists() else text)
    environment = {**os.environ, "PYTHONPATH": str(copy)}

    def run(command: str) -> str:
        arguments = [sys.executable, *command.split()[1:]]
        result = subprocess.run(arguments, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    (commands,) = re.findall(r"```bash\n(python -m bench .*?)```", page, re.DOTALL)
    sweep, *others = commands.strip().splitlines()
    losses = set(re.findall(r"\d+\.\d{4} → \d+\.\d{4}", run(sweep)))
    assert len(losses) == 1, "the new strategy does not train like single"
    table, report, sources = (run(command) for command in others)
    assert "gather_all" in table
    assert "≠" not in (copy / report.strip()).read_text()
    assert "gather_all" in (copy / sources.strip()).read_text()
    run("python -m bench strategy=gather_all exchanges=true seq_len=64 steps=1 warmup=0 name=seen")
    page = (copy / run("python -m analysis sources gather_all --run runs/seen").strip()).read_text()
    assert "q, k, v: all_gather over ring" in page
