"""Every command of the README and of the pages that go on from it: as it is printed it can stand, and small where it
must be it runs; and the pages that are written from declarations are as these are."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton

from analysis import UserError, measured, reference, simulated, validate
from analysis import __main__ as analysis
from bench import __main__ as bench
from bench.app import command, slurm, sweep
from bench.app.job import Job
from conf.resolve import resolve

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("use", "modes", "clock", "packed", "records", "exchanges"))]
STEPS = "steps=1 warmup=0"
SMALL = {  # how a command begins -> words that make it small, in the place of its own that say the same keys
    "bench strategy=ring workload=attention": f"{STEPS} seq_len=512",
    "bench strategy=zero compile=true": f"{STEPS} world_size=1 model.n_layers=1",
    "bench strategy=": STEPS,
    "bench -m strategy=tp_sp,": f"{STEPS} seq_len=64,128",
    "bench -m sweep=layouts": f"{STEPS} seq_len=256 rounds=1",
    "bench model=hf": f"{STEPS} seq_len=64",
    "bench mode=simulate model=llama3_70b": "model.n_layers=4",
    "bench mode=simulate model=llama3_8b": "model.n_layers=2",
    "bench mode=emulate": f"{STEPS} device=cpu model.n_layers=1 model.vocab_size=256 model.dim=1024 "
    "model.ffn_dim=1024 seq_len=1024",
    "bench -m sweep=simulate": "model.n_layers=2 world_size=8,64 seq_len=16384 strategy=ulysses,ring",
    "bench -m sweep=longest": "cluster=h100 model=llama3_8b model.n_layers=2 world_size=8 strategy=ulysses "
    "recompute=block offload=none",
    "bench -m sweep=packed": "model=tiny world_size=4 seq_len=4096 ring.layout=contiguous,balanced ring.kv=needed",
    "bench -m sweep=calibrate": f"{STEPS} seq_len=256 device=cpu precision=fp32 model=tiny world_size=2",
    "bench -m mode=simulate": "model.n_layers=2",
    "torchrun": f"{STEPS} --nnodes=1 --rdzv-endpoint=127.0.0.1:0 world_size=2 mesh.ulysses=2 device=cpu seq_len=64 "
    "launch.interface=lo",
    "bench -m sweep=mesh8": f"{STEPS} strategy=tp_usp mesh.tp=2 mesh.ulysses=2 mesh.ring=2 seq_len=64 device=cpu "
    "launch=local launch.nodes=null launch.gpus_per_node=null",  # tests/test_slurm.py has a Slurm of its own
    "bench -m strategy=ulysses,ring": f"{STEPS} seq_len=64 strategy=ulysses world_size=2",
    "analysis advise model=llama3_70b": "model=llama3_8b world_size=4 seq_len=16384",
}


def commands() -> list[list[str]]:
    """Their words, in the pages' order, each once, without `python -m`. docs/strategy.md is for
    tests/test_architecture.py, ./run.sh for tests/test_laptop.py."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES).replace("\\\n", " ")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = (shlex.split(line, comments=True) for block in blocks for line in block.splitlines())
    found = [words[2:] if words[:2] == ["python", "-m"] else words for words in lines if words]
    once = dict.fromkeys(map(tuple, found))
    return [list(words) for words in once if words[0] in ("bench", "analysis", "torchrun")]


def small(words: list[str]) -> list[str]:
    """A command that takes seconds."""
    said = " ".join(words)
    changes = next((changes for begins, changes in SMALL.items() if said.startswith(begins)), "").split()
    instead = {change.partition("=")[0]: change for change in changes}
    kept = [instead.pop(word.partition("=")[0], word) for word in words]
    return [*kept, *instead.values()]


def standing(job: Job) -> dict[str, str]:
    """In the place of what runs a configuration. Raises Invalid."""
    resolve(job.config)
    return {"status": "ok"}


def ended(words: list[str], patched: pytest.MonkeyPatch) -> str:
    """Run a command -> why it did not end well, or nothing."""
    if words[0] == "torchrun":
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        found = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        return found.stderr if found.returncode else ""
    patched.setattr(sys, "argv", words)
    try:
        if words[0] == "bench":
            bench.main()
        elif analysis.run(analysis.parser().parse_args(words[1:])):
            return "it found something wrong"
    except (SystemExit, UserError) as end:
        return "" if isinstance(end, SystemExit) and end.code in (None, 0) else f"it ended with {end}"
    return ""


def stands(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Why it cannot stand as it is printed, on a machine that has what it asks for; or nothing.

    The sweeps of conf/sweep have configurations that cannot, on purpose, and are composed for minutes.
    """
    if "bench" not in words or any(word.startswith("sweep=") for word in words):
        return ""
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "run_one", standing)
        patched.setattr(sweep, "run_all", lambda jobs: [standing(job) for job in jobs])
        patched.setattr(slurm, "submit", lambda config: None)
        return ended(words[words.index("bench") :], patched)


def prepare(words: list[str], patched: pytest.MonkeyPatch) -> None:
    """What a command reads that no other of them has written, or that takes minutes to simulate."""
    if words == ["analysis", "compare", "runs/mine", "runs/other"]:
        shutil.copytree("runs/mine", "runs/other")
    if words == ["analysis", "published"]:
        shutil.copytree(ROOT / "runs/reference/published_memory", "runs/published_memory")
    if words[:2] == ["analysis", "validate"]:
        for module in (measured, validate):
            patched.setattr(module, "figures", lambda: (measured.pair_of(measured.lines()[0]),))
    if words == ["analysis", "validate", "runs/mesh2"]:
        mesh = "strategy=ulysses mesh.tp=1 mesh.ulysses=2 mesh.ring=1"
        assert not ended(f"bench -m sweep=mesh2 rounds=1 steps=1 seq_len=256 {mesh}".split(), patched)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_command_stands_as_printed_and_runs_when_small(tmp_path, monkeypatch, checkpoints):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "heed", lambda: None)  # signals stay pytest's
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(Singleton._instances, Plugins, raising=False)  # another test's, who had none of ours
    Path("numbers.txt").write_text("700 300\n24 1000 2072\n" * 20)  # lengths of documents, and a text of few letters
    files = {"=DIR": f"={checkpoints['mha']}", "=FILE": "=numbers.txt", "=OUT": "=out"}
    wrong, unused = [], set(SMALL)

    def simulate(words: list[str], name: str) -> None:
        """In this process, which has imported torch already."""
        with monkeypatch.context() as patched:
            ended(["bench", "-m", *words, f"name={name}"], patched)

    monkeypatch.setattr(simulated, "run", simulate)
    for printed in commands():
        words = [re.sub("=(DIR|FILE|OUT)$", lambda found: files[found[0]], word) for word in printed]
        unused -= {begins for begins in SMALL if " ".join(words).startswith(begins)}
        with monkeypatch.context() as patched:
            prepare(words, patched)
            fault = stands(words, monkeypatch) or ended(small(words), patched)
        if fault:
            wrong.append(f"{shlex.join(printed)}: {fault}")
    assert not wrong, "\n".join(wrong)
    assert not unused, f"the pages have no such commands: {unused}"


def test_keys_and_columns_are_written_as_they_are_declared():
    for name, page in reference.pages().items():
        assert (ROOT / "docs" / name).read_text() == page, "python -m analysis reference writes it anew"


def test_links_lead_to_files():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
