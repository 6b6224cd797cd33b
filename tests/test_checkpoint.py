"""Hugging Face checkpoints in and out: transformers is the judge of both."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from bench.app.row import resolved_here
from bench.ranks.worker import save
from conf.files import FileFault
from conf.huggingface import read_config
from conf.keys import Config
from conf.words import Invalid
from models import checkpoint
from models.checkpoint import Checkpoint
from strategies.ops.weights import local
from tests import reference
from tests.cases import Case, sized
from tests.jobs import job
from tests.ranks import on_ranks


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 12},  # not dim / n_heads
        {"num_key_value_heads": 1, "vocab_size": 101, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}, "rms_norm_eps": 1e-3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_checkpoint_is_the_model_that_transformers_loads(changes, tmp_path):
    folder = reference.make_checkpoint(str(tmp_path), **changes)
    vocab_size = read_config(folder)["vocab_size"]
    batch = reference.make_batch(2, vocab_size, None)
    ours = reference.run_case(reference.build(Case("single"), folder), *batch)
    reference.assert_equal(ours, reference.hugging_face(folder, *batch), 1e-5, "single")


def test_config_json_of_transformers_4_and_5_say_the_same(tmp_path, checkpoints):
    file = Path(checkpoints["gqa"]) / "config.json"
    new = json.loads(file.read_text())
    assert "rope_parameters" in new
    rope = new.pop("rope_parameters")
    old = {**new, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_config(str(tmp_path)) == read_config(checkpoints["gqa"])


def test_several_files_are_one_checkpoint(tmp_path):
    from transformers import LlamaForCausalLM

    whole = reference.make_checkpoint(str(tmp_path / "whole"))
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    one, many = Checkpoint(whole), Checkpoint(str(tmp_path / "parts"))
    for name in reference.names(whole):
        assert torch.equal(one.tensor(name), many.tensor(name))


def train_and_save(rank: int, case: Case, folder: str, target: str) -> None:
    training = reference.build(case, folder)
    for seed in range(2):
        training.backward(training.forward(training.place(*reference.make_batch(2, 67, None, seed))))
        training.update()
    save(training, Config(save_path=target), rank)


@pytest.mark.parametrize(
    "case",
    [Case("tp", tp=4), Case("odysseus", tp=4), Case("usp", ulysses=2, ring=2), Case("tp_sp", dp=2, tp=2)],
    ids=str,
)
@pytest.mark.parametrize("heads", ["gqa", "few_kv"])
def test_trained_weights_are_written_back(case, heads, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100_000)
    train_and_save(0, Case("single"), checkpoints[heads], str(tmp_path / "single"))
    on_ranks(4, train_and_save, case, checkpoints[heads], str(tmp_path / "sharded"))
    assert len(list((tmp_path / "single").glob("*.safetensors"))) > 1  # written in several files
    assert read_config(str(tmp_path / "sharded")) == read_config(checkpoints[heads])
    batch = reference.make_batch(1, 67, None)
    alone, sharded = (reference.hugging_face(str(tmp_path / kind), *batch) for kind in ("single", "sharded"))
    assert reference.distance(sharded.logits, alone.logits) < 1e-5
    assert reference.distance(sharded.logits, reference.hugging_face(checkpoints[heads], *batch).logits) > 1e-3


def held_while_loading(rank: int, folder: str) -> tuple[int, int, int]:
    """The most bytes that loading held at once, this rank's share, and the largest tensor."""
    from bench.instruments.memory import MemoryLog
    from bench.instruments.observe import Instruments

    mapped = Checkpoint.tensor

    def read(self, name: str):
        with _disable_current_modes():  # the log would take the mapped file, all of it, for memory
            return mapped(self, name).clone()

    Checkpoint.tensor, log = read, MemoryLog("cpu", {})
    with Instruments(log):
        training = reference.build(Case("ulysses", ulysses=4), folder)
    Checkpoint.tensor = mapped
    share = sum(local(p).nbytes for p in training.model.parameters())
    return log.peak().total, share, max(4 * shape.numel() for shape in training.shapes.values())


@pytest.mark.slow
def test_loading_holds_a_share_and_one_tensor(tmp_path):
    folder = reference.make_checkpoint(str(tmp_path), hidden_size=128, num_hidden_layers=6)
    for held, share, largest in on_ranks(4, held_while_loading, folder):
        assert held <= share + largest + 4096


def test_bfloat16_under_fp32_is_fine_and_said(tmp_path):
    from transformers import LlamaForCausalLM

    whole = reference.make_checkpoint(str(tmp_path / "fp32"), vocab_size=256)
    LlamaForCausalLM.from_pretrained(whole, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    resolved = resolved_here(job("model=hf", f"model.path={tmp_path}/bf16").config)
    assert resolved.notes == ["the bfloat16 checkpoint was read into fp32"]


def test_a_missing_tensor_a_torn_file_and_a_foreign_model_are_named(tmp_path):
    folder = Path(reference.make_checkpoint(str(tmp_path), vocab_size=256))
    with pytest.raises(Invalid, match=r"tensor model.layers.2.input_layernorm.weight is missing"):
        resolved_here(job("model=hf", f"model.path={folder}", "model.n_layers=3").config)
    with pytest.raises(FileFault, match=r"q_proj.weight is \(64, 64\), the model has \(128, 64\)"):
        Checkpoint(str(folder)).check(sized(**{**read_config(str(folder)), "head_dim": 16}))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Invalid, match=r"model.safetensors: torn or not a safetensors file"):
        resolved_here(job("model=hf", f"model.path={folder}").config)
    file.unlink()
    with pytest.raises(Invalid, match=r"no \*.safetensors file there"):
        resolved_here(job("model=hf", f"model.path={folder}").config)
    theirs = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**theirs, "model_type": "mistral"}))
    with pytest.raises(Invalid, match="model_type is 'mistral', and only 'llama' can be read"):
        resolved_here(job("model=hf", f"model.path={folder}").config)
