"""Models and data sets by name: repositories laid out in local caches, as huggingface_hub and datasets leave them.

No test asks the network: HF_HUB_OFFLINE says so, and where one has to be asked, nobody answers.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.app.row import resolved_here
from bench.workloads import data, tokenized
from bench.workloads.build import global_batch
from conf import hub
from conf.words import Invalid
from tests.jobs import QUICK, job
from tests.reference import make_checkpoint

ROOT = Path(__file__).parents[1]
COMMIT = "5f0b02c75b57c5855da9ae460ce51323ea669d8a"
END = 3
TEXTS = ["Zwei Wege, ", "", "die sich trennten.", None, "x" * 40, *(f"text {i}" for i in range(60))]
LLAMA = ["model=hf", "model.path=org/llama"]
pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (the extra hf)")


def repository(caches: Path, kind: str, name: str) -> Path:
    """Of the hub, in its cache: where its files go."""
    folder = caches / "hub" / f"{kind}--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def jsonl(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(TEXTS)))


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> Path:
    """A Llama with a tokenizer, one letter a token, and a data set, once in each of the two caches that there are."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    caches = tmp_path_factory.mktemp("hf")
    model = repository(caches, "models", "org/llama")
    make_checkpoint(str(model), vocab_size=256, eos_token_id=[END, 5])
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(model / "tokenizer.json"))
    jsonl(repository(caches, "datasets", "org/whole") / "data" / "train.jsonl")
    return caches


@pytest.fixture
def offline(caches, tmp_path, monkeypatch) -> Path:
    """What a process needs, to look there alone: set here too, though these libraries have read it by now."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(caches),
        "HF_HUB_CACHE": str(caches / "hub"),
        "HF_DATASETS_CACHE": str(caches / "datasets"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(caches / "hub"))
    hub.fetched.cache_clear()
    tokenized.once.cache_clear()
    yield caches
    hub.fetched.cache_clear()


def bench(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench", *QUICK, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def record() -> dict:
    (file,) = Path("runs/default").glob("*/record.json")
    return json.loads(file.read_text())


def test_a_model_by_name_is_the_one_in_the_cache(offline):
    """It trains as its folder does; the name stays in the row, and the commit is said."""
    by_name = bench(*LLAMA)
    assert by_name.returncode == 0, by_name.stdout + by_name.stderr
    named = record()
    assert named["model_path"] == "org/llama"
    assert named["reason"] == f"org/llama is its commit {COMMIT[:7]}"
    shutil.rmtree("runs")
    folder = hub.folder("org/llama")
    assert folder == str(offline / "hub" / "models--org--llama" / "snapshots" / COMMIT)
    assert bench("model=hf", f"model.path={folder}").returncode == 0
    assert record()["losses"] == named["losses"]


def test_a_folder_of_that_name_comes_first(offline, tmp_path):
    make_checkpoint(str(tmp_path / "org" / "llama"), num_hidden_layers=3, vocab_size=256)
    resolved = resolved_here(job(*LLAMA).config)
    assert resolved.config.model.n_layers == 3
    assert resolved.notes == []


def test_shapes_alone_need_no_weights(offline, caches):
    """mode=simulate of a model of which nothing but config.json was downloaded; training says what is not there."""
    folder = repository(caches, "models", "org/sizes")
    folder.mkdir(parents=True)
    shutil.copy(Path(hub.folder("org/llama"), "config.json"), folder)
    sizes = ["model=hf", "model.path=org/sizes"]
    assert resolved_here(job(*sizes, "mode=simulate").config).config.model.dim == 64
    with pytest.raises(Invalid, match=r"model\.path: .*snapshots.*: no \*\.safetensors file there"):
        resolved_here(job(*sizes).config)


ABSENT = "model.path: org/other: no such folder, not in the Hugging Face cache, and the hub is not reached"


def test_what_is_nowhere_is_a_sentence(offline):
    with pytest.raises(Invalid) as refused:
        resolved_here(job("model=hf", "model.path=org/other").config)
    assert str(refused.value) == ABSENT


@pytest.mark.slow
def test_a_network_without_an_answer_is_one_too(offline):
    """Nothing listens there; what is in the cache is found all the same."""
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    refused = bench("model=hf", "model.path=org/other", "mode=simulate", **nobody)
    assert ABSENT in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr
    found = bench(*LLAMA, "mode=simulate", **nobody)
    assert found.returncode == 0, found.stdout + found.stderr


def test_without_the_package_it_is_said(offline, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Invalid, match="needs the package huggingface_hub; pip install huggingface_hub would do"):
        resolved_here(job(*LLAMA).config)


def test_data_needs_a_model_that_has_a_tokenizer(offline):
    with pytest.raises(Invalid, match="model=tiny has none; model=hf would do"):
        resolved_here(job("data=hf", "data.path=org/name").config)
    with pytest.raises(Invalid, match=r"data\.path is missing: data=hf"):
        resolved_here(job(*LLAMA, "data=hf").config)


@pytest.fixture
def reads(offline) -> None:
    for package in tokenized.PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed (the extra hf)")


def packed() -> list[int]:
    """By hand: a letter is a token, a text a document, and after each comes the end."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = []
    for text in filter(None, TEXTS):
        tokens += [*(letters.index(letter) for letter in text.replace(" ", "Ġ")), END]
    return tokens


@pytest.mark.parametrize("where", ["folder", "whole", "read"])
def test_texts_are_tokens_packed_one_after_the_other(where, reads, tmp_path):
    """From a folder, from a data set that was downloaded as a whole, and from one that datasets has read before."""
    import datasets

    path = f"org/{where}"
    if where == "folder":
        jsonl(tmp_path / path / "train.jsonl")
    if where == "read":
        jsonl(tmp_path / "source" / "train.jsonl")
        datasets.load_dataset(str(tmp_path / "source"), cache_dir=str(tmp_path / "made"))
        (made,) = (file.parent for file in (tmp_path / "made").rglob("source-train.arrow"))
        kept = Path(datasets.config.HF_DATASETS_CACHE, "org___read", *made.parts[-3:])
        shutil.copytree(made, kept)
        (kept / "source-train.arrow").rename(kept / "read-train.arrow")
    config = resolved_here(job(*LLAMA, "data=hf", f"data.path={path}").config).config
    source, wanted = data.load(config), packed()
    assert data.needed(config) <= source.size < len(wanted)  # no more than a run needs
    read = source.read(0, int(source.size))
    np.testing.assert_array_equal(read, wanted[: len(read)])
    assert read[-1] == END  # whole documents


def test_documents_end_where_texts_do(reads):
    """documents=eos takes the model's own end: no token sees another text, and none is learnt after one."""
    config = resolved_here(job(*LLAMA, "data=hf", "data.path=org/whole", "documents=eos").config).config
    assert config.documents.eos == END
    tokens, labels, mask = global_batch(data.load(config), 0, config)
    begin, ends = 0, []
    for text in filter(None, TEXTS):
        begin += len(text) + 1
        ends.append(begin - 1)
    inside = [end for end in ends if end < config.seq_len]
    assert np.flatnonzero(tokens[0] == END).tolist() == inside
    assert np.flatnonzero(labels[0] == data.IGNORED).tolist() == inside
    begins = mask.begin(np.arange(config.seq_len))[0]
    assert sorted(set(begins.tolist())) == [0, *(end + 1 for end in inside if end + 1 < config.seq_len)]


@pytest.mark.slow
def test_every_rank_trains_on_them(reads):
    """Two ranks and one lose the same, and no rank asks for a network or a tokenizer."""
    words = [*LLAMA, "data=hf", "data.path=org/whole", "documents=eos"]
    assert bench(*words, "strategy=ring").returncode == 0
    around = record()
    shutil.rmtree("runs")
    assert bench(*words, "strategy=single", "world_size=1").returncode == 0
    assert record()["losses"] == pytest.approx(around["losses"], rel=1e-5)
    assert around["status"] == "ok"


def test_what_has_changed_is_read_again(reads, tmp_path):
    """By the next command; one command, and its ranks, have the same from its beginning to its end."""
    file = tmp_path / "org" / "mine" / "train.jsonl"
    jsonl(file)
    ask = job(*LLAMA, "data=hf", "data.path=org/mine")
    before = data.samples(data.load(resolved_here(ask.config).config), 0, ask.config)
    file.write_text(file.read_text().replace("Zwei", "Drei"))
    assert (data.samples(data.load(resolved_here(ask.config).config), 0, ask.config) == before).all()
    tokenized.once.cache_clear()  # as a new command begins
    assert (data.samples(data.load(resolved_here(ask.config).config), 0, ask.config) != before).any()


WRONG = {
    "data.path=org/other": "data.path=org/other: no such folder, not in the Hugging Face cache, and the hub is not",
    "data.path=org/whole data.split=trai": "data.path=org/whole: Bad split: trai. Available splits: ['train']",
    "data.path=org/whole data.subset=de": "BuilderConfig 'de' not found. Available: ['default']",
    "data.path=org/whole data.column=txt": "data.column=txt is not one of text, n; did you mean text?",
    "data.path=org/whole data.column=n": "data.column=n holds int, and text is needed",
    "data.path=org/whole steps=400": "would do",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_read_is_a_sentence(words, reads):
    with pytest.raises(Invalid) as refused:
        resolved_here(job(*LLAMA, "data=hf", *words.split()).config)
    assert WRONG[words] in str(refused.value)


@pytest.mark.parametrize("content", [None, "{"], ids=["no tokenizer.json", "a torn one"])
def test_a_model_without_a_tokenizer_reads_nothing(content, reads, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(hub.folder("org/llama"), folder)
    (folder / "tokenizer.json").unlink()
    if content:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(Invalid, match=r"^model\.path: .*tokenizer\.json: (No such file|no tokenizer)"):
        resolved_here(job("model=hf", f"model.path={folder}", "data=hf", "data.path=org/whole").config)
