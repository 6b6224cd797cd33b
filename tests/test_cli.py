"""The command line and the records, as a user meets them."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from analysis.mismatches import mismatches
from analysis.reading import load
from bench.app import records
from bench.app import sweep as app
from bench.app.row import resolved_here
from conf.clock import COLLECTIVES
from conf.columns import COMM_COLUMNS, csv_columns, described
from conf.compose import configuration
from conf.keys import Config, run_id
from conf.labels import labels
from conf.meshes import names
from conf.words import Invalid
from tests.jobs import QUICK, job

ROOT = Path(__file__).parents[1]

WRONG = {  # overrides -> what the one sentence says
    "strategy=ring seq_len=500 world_size=8": "seq_len=500 must be a multiple of 2 * mesh.ring = 16; 496 or 512 would",
    "strategy=ring ring.layout=striped seq_len=63": "seq_len=63 must be a multiple of mesh.ring = 2; 62 or 64 would do",
    "strategy=usp world_size=8 seq_len=72": "multiple of 2 * mesh.ring * mesh.ulysses = 16; 64 or 80 would do",
    "strategy=tp world_size=3": "mesh.tp=3 must divide model.n_heads = 8",
    "strategy=ulysses world_size=16": "8 would do",
    "strategy=ulysses mesh.tp=2": "mesh.tp=2: strategy ulysses has no tp axis, only dp and ulysses",
    "strategy=tp_usp world_size=12 mesh.tp=2 mesh.ulysses=4": "the context-parallel size, world_size / (mesh.dp * "
    "mesh.tp) = 6, must be divisible by mesh.ulysses=4; 3 or 6 would do",
    "strategy=tp_usp world_size=16 mesh.tp=4 mesh.ulysses=4": "mesh.ulysses * mesh.tp=16 must divide model.n_heads = 8",
    "strategy=tp_usp world_size=6 mesh.tp=2 mesh.ulysses=3 model.n_heads=6 model.n_kv_heads=3 model.head_dim=8": (
        "mesh.tp=2 must divide model.n_heads = 6 and divide, or be a multiple of, model.n_kv_heads = 3; 1 or 3 would do"
    ),
    "strategy=usp mesh.ring=3": "world_size=2 is no multiple of mesh.ring = 3; 3 would do",
    "strategy=usp mesh.ring=2 mesh.ulysses=2 mesh.dp=1": "world_size=2 is not mesh.dp * mesh.ulysses * mesh.ring = 4",
    "strategy=ulysses ring.inner=2": "ring.inner=2: strategy ulysses has no ring axis; null would do",
    "strategy=zero ring.backward=q": "ring.backward=q: strategy zero has no ring axis; kv would do",
    "strategy=ring ring.kv=all_gather ring.backward=q": "with ring.kv=all_gather nothing goes around the ring; kv",
    "strategy=tsp ring.inner=2": "ring.inner=2: with ring.kv=all_gather nothing goes around the ring; null would do",
    "strategy=ring world_size=8 ring.inner=3": "ring.inner=3 must divide mesh.ring = 8; 2 or 4 would do",
    "strategy=mesh_attention world_size=8 ring.inner=6": "ring.inner=6 must divide mesh.ring = 8; 4 or 8 would do",
    "strategy=ring ring.cycles=all": "ring.cycles=all is a placement of hops that is simulated alone, and mode=real",
    "strategy=ring mode=simulate world_size=8 ring.inner=2 ring.cycles=all": "takes all links, and ring.inner=2 some",
    "strategy=ring mode=simulate world_size=4 ring.cycles=all": "mesh.ring=4: its links make no rings that share none",
    "strategy=single world_size=2": "world_size=2 must be 1 for single; 1 would do",
    "model.n_heads=6": "model.dim=128 is no multiple of model.n_heads=6 and model.head_dim is null; 126 or 132",
    "model.n_heads=0": "model.n_heads=0 must be at least 1",
    "model.n_kv_heads=3": "model.n_kv_heads=3 must divide model.n_heads=8; 2 or 4 would do",
    "model.head_dim=15": "model.head_dim=15 must be even",
    "model.head_dim=1": "pairs dims; 2 would do",
    "optim.betas=[1]": "optim.betas=[1.0] must be two numbers from 0 up to 1",
    "optim.lr=nan": "optim.lr=nan is not finite",
    "optim.eps=-1": "optim.eps=-1.0 must be at least 0",
    "model=llama3_8b model.rope_scaling.factor=0": "model.rope_scaling.factor=0.0 must be more than 0",
    "precision=fp8": "precision=fp8 is not one of fp32, bf16, bf16_mixed",
    "ring.layout=zigzak": "did you mean zigzag?",
    "seq_len=0": "seq_len=0 must be at least 1",
    "model=hf": "model.path is missing",
    "model=hf model.path=/nowhere": "model.path: /nowhere/config.json: No such file or directory",
    "data=tokens": "data.path is missing",
    "data.path=/nowhere": "data.path=/nowhere: no such file or folder",
    "device=cuda strategy=ring world_size=64 seq_len=128": "device=cuda: world_size=64 needs 64 GPUs",
    "attention.kernel=flash_attn": "these run: sdpa, math",
    "attention.kernel=flash_attn_3": "needs CUDA, a Hopper GPU",
    "mode=simulat": "did you mean simulate?",
    "mode=simulate world_size=3": "mesh.ulysses",
    "mode=simulate rounds=2": "mode=simulate measures no time",
    "mode=simulate attention.kernel=flash_attn_4": "flash_attn_4 has no implementation on fake tensors; sdpa",
    "mode=emulate save_path=/tmp/x": "save_path=/tmp/x: mode=emulate",
    "mode=simulate search=max_seq_len": "cluster=h100 would do",
    "attention.window=0": "attention.window=0 must be at least 1",
    "documents=eos": "documents.eos is missing",
    "documents=eos documents.eos=256": "documents.eos=256 is no token of the model; 255 is the last that would do",
    "documents=eos documents.eos=1 workload=attention": "workload=attention has no tokens; lengths or histogram would",
    "documents=lengths": "documents.path is missing",
    "documents=lengths documents.path=/nowhere": "documents.path: /nowhere: No such file or directory",
    "documents=sentences": "documents=sentences is not one of none, eos, lengths, histogram",
    "ring.kv=needed": "ring.kv=needed: strategy ulysses has no ring axis; rotate would do",
    "strategy=torch_cp documents=histogram": "documents=histogram: torch_cp knows no mask but the causal one",
    "strategy=torch_cp attention.window=9": "attention.window=9: torch_cp knows no mask but the causal one",
    "strategy=ring ring.layout=balanced ring.chunk=100": "seq_len=64 must be a multiple of mesh.ring and",
    "offload=activations": "recompute=none; recompute=block would do",
    "offload=activations recompute=selective": "recompute=selective; recompute=block would do",
    "offload=all recompute=block": "offload=all is not one of none, activations",
    "mode=emulate full_depth=true": "full_depth=true is for mode=simulate, and mode=emulate",
    "exposed_comm=true mode=simulate": "exposed_comm=true needs real collectives",
    "exchanges=true mode=simulate": "mode=real device=cpu workload=step world_size=4 would do",
    "exchanges=true strategy=fsdp2": "exchanges=true looks on while 2 to 8 ranks",
    "compile=true mode=simulate": "compile=true: mode=simulate computes nothing",
    "strategy=ulysses world_size=2 ulysses.chunks=3": "ulysses.chunks=3 must divide a rank's heads",
    "strategy=upipe world_size=2 ulysses.stages=3": "ulysses.stages=3 must divide a rank's heads in attention, 4",
    "ulysses.stages=2": "strategy ulysses has all of its heads at once; null or strategy=upipe would do",
    "profile=true mode=simulate": "mode=simulate draws what a cluster's clock tells; cluster=h100 would do",
    "strategy=fsdp2 mode=simulate": "mode=simulate has no race; mode=real or zero would do",
    "strategy=fsdp2 workload=attention": "fsdp2 has no attention of its own; workload=step would do",
    "strategy=torch_tp world_size=4 model.n_kv_heads=2": "must divide model.n_kv_heads = 2, which torch does not copy",
    "mode=emulate device=cuda": "device=cuda: mode=emulate needs 1 GPUs",
    "model.vocab_size=100": "data=text has tokens from 0 to",
}


@pytest.mark.parametrize("overrides", WRONG)
def test_a_mistake_is_named_with_what_would_do(overrides):
    with pytest.raises(Invalid) as refused:
        resolved_here(job(*overrides.split()).config)
    sentence = str(refused.value)
    assert WRONG[overrides] in sentence
    assert "\n" not in sentence


def test_more_steps_than_tokens(tmp_path):
    np.save(tmp_path / "few.npy", np.arange(200) % 256)
    np.save(tmp_path / "fewer.npy", np.arange(100))
    with pytest.raises(Invalid, match=r"steps=2 needs 193 tokens.*has 100; a smaller seq_len would do"):
        resolved_here(job("data=tokens", f"data.path={tmp_path}/fewer.npy").config)
    with pytest.raises(Invalid, match=r"steps=5 needs 385 tokens.*has 200; steps=2 would do"):
        resolved_here(job("data=tokens", f"data.path={tmp_path}/few.npy", "steps=5").config)
    resolved_here(job("data=tokens", f"data.path={tmp_path}/few.npy").config)


def bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sed_len=3"], "bench: there is no key sed_len; did you mean seq_len?"),
        (["steps=abc"], "bench: Error merging override steps=abc: Value 'abc' of type 'str' could not be converted to"),
        (
            ["-m", "strategy=tp,fing"],
            "bench: strategy=fing is not one of ddp, deepspeed_ulysses, fsdp2, mesh_attention, odysseus, ring, single,",
        ),
    ],
)
def test_hydra_refuses_in_one_sentence(arguments, says, tmp_path):
    result = bench(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(says)
    assert len(result.stderr.splitlines()) == 1


MISUNDERSTOOD = {  # words -> how the one sentence begins; nothing runs
    "+foo=1": "there is no key foo",
    "+ring.foo=1": "there is no key ring.foo",
    "-m +foo=1,2": "there is no key foo",
    "~seq_len": "seq_len cannot be taken away",
    "mesh=foo": "mesh=foo: mesh holds mesh.dp, mesh.tp, mesh.ulysses, mesh.ring; mesh.dp=... would do",
    "model=null": "model=null is not one of hf, llama2_3b_gqa,",
    "model.dim=null": "Error merging override model.dim=null: field 'model.dim' is not Optional",
    "stategy=ring": "there is no key stategy; did you mean strategy?",
    "seqlen=4": "there is no key seqlen; did you mean seq_len?",
    "strategy=ring,ulysses": "strategy=ring,ulysses is a sweep; python -m bench -m strategy=ring,ulysses would do",
    "sweep=quickstart": "sweep=quickstart is a sweep; python -m bench -m sweep=quickstart would do",
    "name=../../x": "name='../../x' is no name of a folder in runs/",
    "name=..": "name='..' is no name of a folder in runs/",
    "cluster.mem_gb=3": "a key of a section that is null cannot be changed; cluster=h100,",
    "cluster=null": "cluster=null is not one of none, a100,",
    "cluster={name:x}": "cluster={'name': 'x'} is not one of none, a100,",
    "-m model=tiny,null": "model=null is not one of hf,",
    "model=1": "model=1 is not one of hf,",
    "model.name=llama3_8b": "model.name=llama3_8b: model=... chooses it",
    "=5": "'=5' ",
    "seed": "'seed' is no key=value",
    "seq_len=64 -m sweep=nope": "sweep=nope is not one of ",
    "hydra.run.dir=x": "hydra.run.dir=x: results go to runs/<name>/; name=mine would do",
    "-m hydra.sweep.dir=x strategy=tp": "hydra.sweep.dir=x: results go to runs/<name>/; name=mine would do",
    "--cfg job -m sweep=layouts": "-m runs a sweep, and the other options run nothing; python -m bench --cfg job",
}


@pytest.mark.parametrize("words", MISUNDERSTOOD)
def test_what_cannot_be_meant_is_a_sentence_and_runs_nothing(words, tmp_path):
    result = bench(*words.split(), cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"bench: {MISUNDERSTOOD[words]}")
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("runs/*/*/record.json"))


def test_a_character_that_is_none_is_written_and_read(tmp_path):
    """A path with a byte that is no UTF-8: its row is there, and the next is written beside it."""
    for _ in range(2):
        result = bench("-m", "data.path='/x\udcff'", cwd=tmp_path)
        assert (result.returncode, result.stderr) == (1, "")
        assert "no such file or folder" in result.stdout
    assert len((tmp_path / "runs" / "default" / "results.csv").read_text().splitlines()) == 2
    sweep = load(tmp_path / "runs" / "default")
    assert list(mismatches(sweep)) == []


def test_no_rounds_are_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path)
    (row,) = app.run_all([job("rounds=0")])
    assert (row["status"], row["reason"]) == ("invalid", "rounds=0 must be at least 1")


def test_what_was_swept_is_visible_without_being_listed(tmp_path, monkeypatch):
    """In the line of each run, in the table at the end and in results.csv."""
    monkeypatch.setattr(records, "RUNS", tmp_path)
    swept = {"ring.grad_dtype": ("fp32", "same"), "model.n_layers": ("1", "2"), "optim.lr": ("0.001", "0.002")}
    jobs = [
        job("strategy=ring", "mode=simulate", *(f"{key}={values[n]}" for key, values in swept.items())) for n in (0, 1)
    ]
    with app.console.capture() as captured:
        app.run_all(jobs)
    text = captured.get()
    with open(tmp_path / "default" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for key, values in swept.items():
        assert all(f"{key}={value}" in text for value in values), text
        assert key in text.partition("┏")[2]  # a heading of the table
        column = key.replace("ring.", "ring_").rpartition(".")[2]
        assert sorted(row[column] for row in rows) == sorted(values)


def test_a_run_id_is_of_what_is_not_as_by_default():
    """So a key that did not exist, and is as by default, leaves the ids of old rows as they are."""
    config = resolved_here(job("strategy=ring", "zero_stage=1").config).config
    older = asdict(config)
    for key in ("compile", "seed", "placement", "ulysses"):  # as if they had been added since
        del older[key]
    assert run_id(Config.of(older)) == run_id(config)
    ids = {run_id(replace(config, **change)) for change in ({}, {"seed": 1}, {"zero_stage": 3}, {"compile": True})}
    assert len(ids) == 4
    assert run_id(replace(config, name="other", rounds=5, rerun="all")) == run_id(config)


def test_no_two_rows_have_one_name(tmp_path, monkeypatch):
    """Refused ones too, and beside those that ran."""
    monkeypatch.setattr(records, "RUNS", tmp_path)
    differ = [
        *("seq_len=63 optim.grad_clip=null", "seq_len=63", "seq_len=63 attention.kernel=math", "seq_len=63 mesh.dp=1"),
        *("optim.lr=0.1", "optim.lr=0.10000000000000002", "mesh.dp=2", "mesh.dp=2 world_size=4 mesh.ring=1"),
    ]
    rows = app.run_all([job("strategy=ring", "mode=simulate", *words.split()) for words in differ])
    assert len({row["run_id"] for row in rows}) == len(differ)
    names = [(name, row["seq_len"]) for name, row in zip(labels(rows), rows, strict=True)]
    assert len(set(names)) == len(differ), names
    again = app.run_all([job("strategy=ring", "mode=simulate", "rerun=all", words) for words in ("optim.lr=0.1",)])
    assert not any("rerun" in name for name in labels([*rows, *again]))


def test_a_row_that_was_refused_goes_when_its_configuration_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path)
    words = ["strategy=single", "world_size=1", f"data.path={tmp_path}/later.txt"]
    assert app.run_all([job(*words)])[0]["status"] == "invalid"
    (tmp_path / "later.txt").write_text("words " * 100)
    assert app.run_one(job(*words))["status"] == "ok"
    assert [row["status"] for row in records.load_all(tmp_path / "default")] == ["ok"]


def test_a_sweep_of_an_older_version_goes_on(tmp_path, monkeypatch):
    """Its rows are found by what they are, whatever the id under which they were stored."""
    monkeypatch.setattr(records, "RUNS", tmp_path)
    jobs = [job("strategy=ring", "mode=simulate", f"seq_len={n}") for n in (64, 128)]
    first = app.run_all(jobs[:1])[0]
    folder = tmp_path / "default" / first["run_id"]
    old = {**json.loads((folder / "record.json").read_text()), "run_id": "0123456789ab"}
    del old["config"]["compile"], old["compile"]
    (folder / "record.json").write_text(json.dumps(old))
    folder.rename(folder.with_name("0123456789ab"))
    rows = app.run_all(jobs)
    assert [row.get("kept", False) for row in rows] == [True, False]
    with open(tmp_path / "default" / "results.csv", newline="") as file:
        assert [row["compile"] for row in csv.DictReader(file)] == ["False", "False"]


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("bench strategy=uly", "strategy=ulysses"),
        ("bench ring.la", "ring.layout="),
        ("bench -m sweep=q", "sweep=quickstart"),
    ],
)
def test_tab_completes(line, completed, tmp_path):
    """What a shell does after `eval "$(bench -sc install=bash)"`."""
    command = Path(sys.executable).with_name("bench")
    if not command.exists():
        pytest.skip("the command is not installed: pip install --editable .")
    script = f"""
eval "$({command} -sc install=bash)"
COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
$(complete -p bench | sed 's/.*-F \\([^ ]*\\).*/\\1/') bench
echo "${{COMPREPLY[@]}}"
"""
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert completed in result.stdout.split(), result.stdout + result.stderr


def test_help_explains_keys_and_groups(tmp_path):
    text = bench("--help", cwd=tmp_path).stdout
    assert f"strategy: {', '.join(sorted(names()))}" in text
    assert "seq_len: 512" in text


@pytest.mark.slow
def test_a_single_run_is_a_row_that_its_command_reproduces(tmp_path):
    result = bench(*QUICK, "strategy=usp", "world_size=4", "name=one", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "one"
    with open(folder / "results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == csv_columns()
    record = json.loads((folder / row["run_id"] / "record.json").read_text())
    assert row["status"] == "ok"
    assert (row["dp"], row["tp"], row["ulysses"], row["ring"]) == ("1", "1", "2", "2")
    assert len(record["losses"]) == 3
    assert float(row["loss_first"]) == record["losses"][0]
    assert row["comm_bytes"] == row["analytic_comm_bytes"]
    parts = ("param", "grad", "optimizer", "activation", "other")
    assert int(row["peak_bytes"]) == sum(int(row[f"{part}_bytes"]) for part in parts)
    with open(folder / row["run_id"] / "comm.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == COMM_COLUMNS
    assert sum(int(line["sent_bytes"]) for line in lines) == int(row["comm_bytes"])
    by_phase = [int(row[f"comm_bytes_{phase}"]) for phase in ("forward", "backward", "optimizer")]
    assert sum(by_phase) == int(row["comm_bytes"])
    assert int(row["comm_bytes_params"]) + int(row["comm_bytes_activations"]) == int(row["comm_bytes"])
    calls = sum(int(row[f"calls_{kind}"]) for kind in COLLECTIVES)
    assert calls == sum(int(line["calls"]) for line in lines)

    assert row["command"].startswith("python -m bench ")
    again = bench(*row["command"].split()[3:], cwd=tmp_path)
    assert again.returncode == 0
    repeated = json.loads((folder / row["run_id"] / "record.json").read_text())
    assert repeated["losses"] == record["losses"]


def test_a_single_run_that_cannot_begin_is_a_sentence_and_leaves_nothing(tmp_path):
    result = bench("strategy=tp_sp", "seq_len=511", cwd=tmp_path)
    said = "bench: seq_len=511 must be a multiple of mesh.tp = 4; 508 or 512 would do\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", said)
    assert not list(tmp_path.iterdir())


def test_in_a_sweep_it_is_a_row_whose_reason_is_said_once(tmp_path):
    """And without a success it ends with 1."""
    result = bench("-m", "strategy=tp_sp,ulysses", "seq_len=511", cwd=tmp_path)
    assert result.returncode == 1
    with open(tmp_path / "runs" / "default" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["invalid", "invalid"]
    assert rows[0]["reason"] == "seq_len=511 must be a multiple of mesh.tp = 4; 508 or 512 would do"
    assert [result.stdout.count(row["reason"]) for row in rows] == [1, 1]
    assert "left" not in result.stdout  # of the time, of which nothing is known


def test_how_long_the_rest_takes_is_told_by_what_ran(tmp_path, monkeypatch):
    """What is refused takes no time, and what ran says how much the others will; of the last nothing is left."""
    monkeypatch.setattr(records, "RUNS", tmp_path)
    slept = {"invalid": 0.0, "ok": 1.0}

    def run(job, *_):
        status = "invalid" if job.config.seq_len % 2 else "ok"
        time.sleep(slept[status])
        return {"run_id": "", "status": status, "reason": "", **described(job.config), "peak_bytes": 0, "comm_bytes": 0}

    monkeypatch.setattr(app, "run", run)
    monkeypatch.setattr(app, "cores", lambda: 1)
    told = {  # lengths -> what the lines say that begin with a place: of a real run that began it is another's to say
        ("simulate", (61, 63, 64, 66, 68)): [None, None, "2", "1", None],
        ("real", (61, 64, 66, 63)): [None, "1"],
    }
    for (mode, lengths), left in told.items():
        with app.console.capture() as captured:
            app.run_part([job(f"mode={mode}", f"seq_len={n}") for n in lengths])
        places = [re.match(r"\[\d/\d(, about (\d) s left)?\]", line) for line in captured.get().splitlines()]
        assert [found[2] for found in places if found] == left


def test_a_note_of_many_rows_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path)
    with app.console.capture() as captured:
        app.run_all([job("strategy=zero", "mode=simulate", f"seq_len={n}") for n in (64, 128, 256)])
    (said,) = [line for line in captured.get().splitlines() if "without a sequence" in line]
    assert said == "zero · dp=2 · seq_len=64 and 2 more: batch_size=1 leaves 1 of mesh.dp=2 without a sequence"


def test_a_gpu_is_called_cuda_here():
    assert configuration(["device=gpu"]) == configuration(["device=cuda"])


def test_sources_leave_the_pages_of_reports_alone(tmp_path):
    page = tmp_path / "runs" / "quickstart" / "report" / "sources.html"
    page.parent.mkdir(parents=True)
    page.write_text("the report's")
    command = [sys.executable, "-m", "analysis", "sources", "tp_sp", "ulysses"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "runs/sources/tp_sp-ulysses.html\n"
    assert (tmp_path / "runs" / "sources" / "tp_sp-ulysses.html").exists()
    assert page.read_text() == "the report's"


def test_attention_alone_is_a_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [
        job("name=alone", "workload=attention", "strategy=usp", "mesh.ring=2", "rounds=2"),
        job("name=alone", "workload=attention", "strategy=tp", "direction=forward", "rounds=2"),
        job("name=alone", "workload=attention", "strategy=zero", "rounds=2"),
    ]
    ring, tp, zero = app.run_all(jobs)
    assert [ring["status"], tp["status"], zero["status"]] == ["ok", "ok", "invalid"]
    assert zero["reason"] == "batch_size=1 must be at least mesh.dp = 2 for workload=attention; 2 would do"
    assert len(ring["round_ms"]) == 2
    assert ring["share_of_ideal"] > 0
    assert ring["losses"] == []
    kv = 64 // 2 * 4 * 16 * 2 * 4  # tokens, kv heads, head_dim, k and v, bytes
    assert ring["comm_bytes"] == ring["analytic_comm_bytes"] == 3 * kv  # one hop forward, two backward
    assert tp["comm_bytes"] == 0  # its heads are where they are needed
    assert tp["backward_ms"] < tp["forward_ms"]
    pairs = 64 * 65 // 2
    assert tp["flops_per_rank"] == 4 * 4 * 16 * pairs
    again = app.run_all(jobs)
    assert [row.get("kept", False) for row in again] == [True, True, False]


def test_flops_are_counted_causally():
    """6 N_matmul per token and 14 K a pair and head, over S (S + 1) / 2 pairs."""
    from tests import instruments
    from tests.cases import Case

    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "vocab_size": 80}
    batch, seq_len, head_dim = 2, 48, 16
    flops = instruments.flops(0, Case("single"), sizes, batch, seq_len)
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96) + 64 * 80
    pairs = seq_len * (seq_len + 1) // 2
    assert flops == 6 * weights * batch * seq_len + 2 * 14 * batch * 4 * head_dim * pairs


@pytest.mark.slow
def test_ranks_share_the_work_of_one(tmp_path):
    """Sharding moves FLOPs, it makes none: ring's blocks under a causal mask add up to the whole."""
    from tests import instruments
    from tests.cases import Case
    from tests.ranks import on_ranks

    sizes = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 96, "vocab_size": 80}
    whole = instruments.flops(0, Case("single"), sizes, 4, 64)
    for case in (Case("zero", dp=4), Case("tp_sp", tp=4), Case("ulysses", ulysses=4), Case("usp", ulysses=2, ring=2)):
        assert sum(on_ranks(4, instruments.flops, case, sizes, 4, 64)) == whole, case


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_a_gradient_that_is_zero_is_not_called_wrong(tmp_path, monkeypatch, layout: str):
    """The first rank has the first query alone, which sees one key: its gradient is nothing but rounding."""
    monkeypatch.setattr(records, "RUNS", tmp_path)
    row = app.run_one(job("strategy=ring", "workload=attention", "seq_len=2", f"ring.layout={layout}"))
    assert (row["status"], row["reason"]) == ("ok", "")
    assert row["relative_error"] < 1e-5


def test_a_profile_shows_what_was_in_flight(tmp_path, monkeypatch, capfd):
    """A trace of every rank, whose lanes of communication hold every collective, with a duration."""
    monkeypatch.setattr(records, "RUNS", tmp_path)
    with app.console.capture() as captured:
        row = app.run_one(job("strategy=ring", "profile=true", "data=random"))
    folder = tmp_path / "default" / row["run_id"]
    assert f"{folder}/trace_rank*.json: " in captured.get()
    assert capfd.readouterr().err == ""  # nor what the profiler says of itself
    traces = sorted(folder.glob("trace_rank*.json"))
    assert len(traces) == row["world_size"]
    for file in traces:
        events = json.loads(file.read_text())["traceEvents"]
        sent = [e for e in events if e.get("ph") == "X" and str(e["tid"]).startswith("communication")]
        assert sum(e["name"] == "gloo:send" for e in sent) == row["calls_p2p"]
        assert all(e["dur"] > 0 for e in sent)
        assert {"forward", "backward", "optimizer"} <= {e["name"] for e in events}


def test_exposed_communication_is_a_part_of_the_step(tmp_path, monkeypatch):
    """It is a part of the step, and known only where the silent step was timed too."""
    monkeypatch.setattr(records, "RUNS", tmp_path)
    row = app.run_one(job("strategy=zero", "exposed_comm=true", "data=random"))
    assert row["status"] == "ok"
    assert row["exposed_comm_ms"] < row["step_ms_median"]
    assert app.run_one(job("strategy=zero", "data=random"))["exposed_comm_ms"] is None
