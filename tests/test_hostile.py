"""Hostile values and files: the answer is a configuration that can stand or one sentence, soon, and nothing more.

No code runs that a file holds, and nothing is written but in runs/ and save_path.
"""

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.app.row import resolved_here
from conf.compose import REFUSED, configuration, sentence
from conf.keys import Config, keys

ROOT = Path(__file__).parents[1]
SECONDS = 5  # of this process' time: others may have the cores
pytestmark = pytest.mark.timeout(120)  # of a hang


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path, monkeypatch):
    """Every test runs in a folder that stays empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert not list(folder.iterdir())


def answer(ask: Callable[[], Any]) -> str:
    """The sentence with which something is refused, or ''."""
    started = time.process_time()
    try:
        ask()
        said = ""
    except REFUSED as error:
        said = sentence(error)
        assert said
        assert said.isprintable()  # so it is one line
        assert len(said) < 450
    assert time.process_time() - started < SECONDS
    return said


def words(*overrides: str) -> Callable[[], Any]:
    return lambda: resolved_here(configuration(overrides))


@cache
def composed(*overrides: str) -> Config:
    return configuration(overrides)


LONG = {"NINES": "9" * 400, "DIGITS": "9" * 5000, "NAME": "n" * 300, "PATH": "a/" * 2500, "WORD": "w" * 20_000}
NEVER = "is not one of"
NO_INT = "could not be converted to Integer"
NO_FLOAT = "could not be converted to Float"
BETAS = "must be two numbers from 0 up to 1"
FOLDER = "is no name of a folder in runs/"
HYDRA = "only hydra/launcher, hydra/sweeper and their keys can be chosen"
VALUES = {  # words -> what the sentence says; "" for what can stand
    # Sizes and degrees.
    "world_size=1000000000000 mesh.dp=1 mesh.tp=2": "world_size=1000000000000 must be at most 1048576",
    "world_size=1048576 strategy=zero": "mode=simulate would do",
    "world_size=1048576 mode=simulate strategy=usp seq_len=1073741824": "",
    "world_size=1048575 mode=simulate strategy=usp": "seq_len=512 must be a multiple of 2 * mesh.ring = 2097150",
    "world_size=1048573 mode=simulate strategy=odysseus": "2097146 would do",
    "world_size=1048573 mode=simulate strategy=tp_usp": "2097146 would do",
    "world_size=-1": "world_size=-1 must be at least 1",
    "world_size=1.5": NO_INT,
    "world_size=true": NO_INT,
    "world_size=null": "is not Optional",
    "world_size=nan": NO_INT,
    "world_size=1e3": NO_INT,
    "world_size=0x10": NO_INT,
    "world_size=NINES": "no key takes so large a number",
    "world_size=DIGITS": "is no key=value",
    "mesh.ulysses=1000000000000": "mesh.ulysses=1000000000000 must be at most 1048576",
    "mesh.dp=1048576 mesh.tp=1048576 strategy=tp": "world_size=4 is not mesh.dp * mesh.tp = 1099511627776",
    "mesh.ring=-3": "mesh.ring=-3 must be at least 1",
    "mesh.tp=0": "mesh.tp=0 must be at least 1",
    "mesh.dp=${mesh}": "mesh.dp: Interpolation to parent node",
    "seq_len=1000000000000": "seq_len=1000000000000 must be at most",
    "seq_len=1073741823 strategy=ring": "1073741816 or 1073741824 would do",
    "seq_len=-64": "seq_len=-64 must be at least 1",
    "seq_len=${seq_len}": "Recursive interpolation",
    "seq_len=${batch_size}x": "seq_len='1x' is no whole number",
    "seq_len=${oc.dict.keys:model}": "is no whole number",
    "seq_len=${eval:1}": "Unsupported interpolation type eval",
    "seq_len=${..steps}": "seq_len: ",
    "seq_len=\U0001f600": "is no key=value",
    "seq_len=range(1,1e9)": "is a sweep",
    "batch_size=1000000000000": "batch_size=1000000000000 must be at most",
    "batch_size=1073741824 data=random": "",
    "batch_size=0": "must be at least 1",
    "model.n_kv_heads=1000000000000": "model.n_kv_heads=1000000000000 must be at most 65536",
    "model.dim=1000000000000": "must be at most",
    "model.dim=1048575": "1048568 or 1048576 would do",
    "model.n_layers=1000000000000": "must be at most 10000",
    "model.n_layers=0": "must be at least 1",
    "model.n_heads=1000000000000": "must be at most 65536",
    "model.n_heads=65536 model.dim=1048576": "",
    "model.head_dim=1000000001": "must be at most",
    "model.head_dim=-2": "must be at least 1",
    "model.ffn_dim=0": "must be at least 1",
    "model.vocab_size=1000000000000": "must be at most",
    "model.vocab_size=1": "data=text has tokens from 0 to 122",
    "model.rope_theta=0": "must be more than 0",
    "model.rope_theta=inf": "is not finite",
    "model.rope_theta=1e300": "must be at most",
    "model.norm_eps=nan": "model.norm_eps=nan is not finite",
    "model.norm_eps=1e30": "must be at most 1",
    "model.rope_scaling=3": "model.rope_scaling.factor=... would do",
    "model.rope_scaling={factor:1}": "model.rope_scaling.factor=... would do",
    "model.rope_scaling.factor=2": "a key of a section that is null",
    "model=llama3_8b model.rope_scaling=null mode=simulate": "",
    "model=llama3_8b model.rope_scaling.factor=nan": "model.rope_scaling.factor=nan is not finite",
    "model=llama3_8b model.rope_scaling.factor=1e300": "must be at most",
    "model=llama3_8b model.rope_scaling.low_freq_factor=0": "must be more than 0",
    "model=llama3_8b model.rope_scaling.high_freq_factor=1": "must be less than high_freq_factor = 1.0",
    "model=llama3_8b model.rope_scaling.original_max_position=1000000000000": "must be at most",
    "model=llama3_8b model.rope_scaling.nothing=1": "there is no key model.rope_scaling.nothing",
    "ulysses.chunks=1000000000000": "must be at most",
    "ulysses.chunks=65536": "must divide a rank's heads",
    "mlp.chunks=0": "must be at least 1",
    "loss.chunks=1000000000000": "must be at most",
    # Other numbers.
    "optim.lr=-inf": "optim.lr=-inf is not finite",
    "optim.lr=1e400": "is not finite",
    "optim.lr=NINES": "no key takes so large a number",
    "optim.lr=DIGITS": "is no key=value",
    "optim.lr=int(1e308)": "no key takes so large a number",
    "optim.lr=true": NO_FLOAT,
    "optim.lr={}": NO_FLOAT,
    "optim.betas=[nan,0.9]": BETAS,
    "optim.betas=[0.9,inf]": BETAS,
    "optim.betas=[]": BETAS,
    "optim.betas=[-0.1,0.5]": BETAS,
    "optim.betas=[[1],2]": "optim.betas=[[1], 2.0] holds what is no number",
    "optim.betas=[a,b]": NO_FLOAT,
    "optim.betas={a:1}": "Cannot merge",
    "optim.betas=[NINES,0]": "no key takes so large a number",
    "optim.weight_decay=inf": "is not finite",
    "optim.eps=1e7": "must be at most 1000000",
    "optim.grad_clip=0": "must be more than 0",
    "steps=1000000000000": "must be at most",
    "steps=???": "is no whole number",
    "steps=": NO_INT,
    "steps=1.0": NO_INT,
    "steps=[1]": NO_INT,
    "steps=int(inf)": "is no key=value",
    f"steps={'[' * 300}": "is no key=value",
    f"steps={'[' * 3000}": "is no key=value",
    f"steps={'[' * 600}{']' * 600}": "is no key=value",
    "warmup=-1": "must be at least 0",
    "warmup=1000000000000": "must be at most",
    "rounds=1000000000000": "must be at most 10000",
    "seed=-1": "must be at least 0",
    "seed=9223372036854775807": "",
    "seed=9223372036854775808": "must be at most 9223372036854775807",
    "timeout_s=inf": "timeout_s=inf is not finite",
    "timeout_s=nan": "is not finite",
    "timeout_s=-5": "must be more than 0",
    "timeout_s=1e9": "must be at most 604800",
    "cluster=h100 cluster.mem_gb=0": "must be more than 0",
    "cluster=h100 cluster.mem_gb=1e300": "must be at most",
    "cluster=h100 cluster.gpus_per_node=0": "must be at least 1",
    "cluster=h100 cluster.device_names=3": "is not a ListConfig",
    "cluster.mem_gb=3": "a key of a section that is null",
    "launch.ranks_per_host=1000000000000": "must be at most",
    # Names of things.
    "name=": FOLDER,
    "name=.": FOLDER,
    "name=..": FOLDER,
    "name=/tmp/x": FOLDER,
    "name=../../x": FOLDER,
    "name=NAME": FOLDER,
    "name='a\nb'": FOLDER,
    f"name='{'日' * 100}'": FOLDER,
    "name=null": "is not Optional",
    "name=${oc.env:HOME}": FOLDER,
    "name=a\0b": "is no key=value",
    "model=../../../tmp/x": NEVER,
    "model=/etc/passwd": NEVER,
    "model=${strategy}": NEVER,
    "model=[tiny]": NEVER,
    "model=glob(*)": NEVER,
    "model@strategy=tiny": "there is no key model@strategy",
    "+model@hydra.launcher=tiny": "there is no key model@hydra.launcher",
    "model._target_=os.system": "there is no key model._target_",
    "+model._target_=os.system": "there is no key model._target_",
    "+_target_=os.system": "there is no key _target_",
    "+defaults=[x]": "there is no key defaults",
    "strategy=__init__": NEVER,
    "strategy=os.system": NEVER,
    "~strategy": "cannot be taken away",
    "precision=FP32": NEVER,
    "device=cuda:99": NEVER,
    "compile=maybe": "is not a valid bool",
    "attention.kernel=../x": NEVER,
    "zero_stage=4": NEVER,
    "workload=os.system": NEVER,
    "launch=ssh": NEVER,
    "WORD=1": "characters, and at most 10000 are read",
    "NAME=1": "there is no key nnn",
    "\U0001f600=1": "is no key=value",
    "\0=1": "is no key=value",
    # Paths.
    "data.path=/proc/self/mem": "data.path=/proc/self/mem is empty",
    "data.path=/dev/zero": "data.path: /dev/zero: a device",
    "data.path=NAME": "no such file or folder",
    "data.path=PATH": "no such file or folder",
    "data.path=WORD": "characters, and at most 10000 are read",
    "data.path='a\0b'": "no such file or folder",
    "data.path='\ud800'": "no such file or folder",
    "data.path='a\nb'": r"data.path=a\nb: no such file or folder",
    "data.path=''": "no such file or folder",
    "data.path={a:1}": "Cannot convert 'dict' to string",
    "data.path=${oc.env:NO_SUCH_VARIABLE}": "data.path: ",
    "data.path=${data.path}": "data.path: Recursive interpolation",
    "data=tokens data.path=/proc/self/mem": "data.path: /proc/self/mem: ",
    "data=tokens data.path=/dev/zero": "data.path: /dev/zero: a device",
    "data=tokens data.path=/": "data.path: /: a folder",
    "save_path=/proc/x": "save_path: /proc/x: /proc cannot be written",
    "save_path=/proc/self/mem/x": "/proc/self/mem is no folder",
    "save_path=/dev/null": "save_path: /dev/null: /dev/null is no folder",
    "save_path=/NAME": "File name too long",
    "save_path=/PATH": "File name too long",
    "save_path='a\0b'": "it has a NUL",
    "save_path=''": "save_path: '' is no path",
    "model=hf model.path=/dev/zero": "model.path: /dev/zero/config.json: Not a directory",
    "model=hf model.path=/PATH": "File name too long",
    "model=hf model.path='a\0b'": "it has a NUL",
    "model=hf model.path=''": "model.path is missing",
    # What is Hydra's.
    "hydra.run.dir=/tmp/x": "results go to runs/<name>/; name=mine would do",
    "hydra.sweep.dir=/tmp/x": "results go to runs/<name>/; name=mine would do",
    "hydra.output_subdir=/tmp/x": HYDRA,
    "hydra.job.chdir=true": HYDRA,
    "hydra.searchpath=[/tmp]": HYDRA,
    "+hydra.callbacks.x._target_=os.system": HYDRA,
    "hydra.launcher._target_=os.system": HYDRA,
    "hydra.launcher={_target_:os.system}": HYDRA,
    "hydra.sweeper.params.name=../x": HYDRA,
    "hydra.sweeper.storage=sqlite:////tmp/x": HYDRA,
    "hydra.launcher.temp_folder=/tmp/x": HYDRA,
    "hydra={run:{dir:/tmp}}": HYDRA,
    "hydra/launcher=../../x": HYDRA,
    "hydra/job_logging=default": HYDRA,
    "~hydra": HYDRA,
}


def spelled(said: str) -> str:
    for short, long in LONG.items():
        said = said.replace(short, long)
    return said


@pytest.mark.parametrize("said", VALUES, ids=lambda said: ascii(said)[:60])
def test_hostile_values(said):
    found = answer(words(*spelled(said).split(" ")))
    assert VALUES[said] in found
    assert bool(VALUES[said]) == bool(found)


def test_every_number_has_bounds():
    """A key that is added has them too."""
    for path, key in keys().items():
        bounds, kinds = key.declared.metadata, {key.hint, *get_args(key.hint)}
        if {int, float} & kinds and path != "optim.betas" and not key.choices:
            assert bounds["most"] is not None, path
            assert bounds["least"] is not None or bounds["above"] is not None, path


# Files. Each is made in `elsewhere`, and the sentence must name it.


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


class Bomb:
    """As a pickle it writes a file, where none may be written."""

    def __reduce__(self):
        return open, ("ran", "w")


BOMB = pickle.dumps(Bomb())
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 256,
}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 8192}


def asked(**changes: Any) -> Callable[[], Any]:
    """What runs with these files, without composing it again."""

    def ask() -> None:
        config = Config.of(asdict(composed("model=hf" if "model" in changes else "data=tokens", "seq_len=64")))
        for path, value in changes.items():
            name = "model" if path == "model" else "data"
            getattr(config, name).path = str(value)
        if "text" in changes:
            config.data.name = "text"
        resolved_here(config)

    return ask


@pytest.mark.parametrize(
    ("content", "says"),
    {
        "": "not valid JSON",
        "{": "not valid JSON",
        "[1]": "holds a list",
        "null": "holds a NoneType",
        "NaN": "holds a float",
        '"text"': "holds a str",
        "[" * 100_000: "too many brackets",
        '{"a":' * 100_000: "too many brackets",
        '{"hidden_size": ' + "9" * 5000 + "}": "not valid JSON",
        "\udcff\udcfe": "not valid JSON",
        "\0": "not valid JSON",
    }.items(),
    ids=lambda value: ascii(value)[:20],
)
def test_hostile_json(content, says, elsewhere):
    (elsewhere / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    said = answer(asked(model=elsewhere))
    assert said.startswith(f"model.path: {elsewhere}/config.json: ")
    assert says in said


WRONG_FIELDS = [  # a field of config.json, what it is, what the sentence says of it
    ("model_type", None, "is missing"),
    ("model_type", [], "is []"),
    ("hidden_act", ["silu"], "is ['silu']"),
    ("attention_bias", "yes", "is 'yes'"),
    ("hidden_size", None, "is missing"),
    ("hidden_size", "128", "='128' is no whole number"),
    ("hidden_size", 0, "=0 must be at least 1"),
    ("hidden_size", -1, "=-1 must be at least 1"),
    ("hidden_size", 10**12, "must be at most"),
    ("hidden_size", 10**400, "must be at most"),
    ("hidden_size", 64.0, "is no whole number"),
    ("hidden_size", True, "is no whole number"),
    ("hidden_size", [64], "is no whole number"),
    ("hidden_size", {}, "is no whole number"),
    ("hidden_size", float("nan"), "is no whole number"),
    ("num_hidden_layers", 10**12, "must be at most 10000"),
    ("num_attention_heads", 0, "must be at least 1"),
    ("num_attention_heads", None, "is missing"),
    ("num_key_value_heads", 0, "must be at least 1"),
    ("num_key_value_heads", "4", "is no whole number"),
    ("head_dim", 0, "must be at least 1"),
    ("head_dim", "x", "is no whole number"),
    ("intermediate_size", "x" * 5000, "is no whole number"),
    ("vocab_size", -5, "must be at least 1"),
    ("rope_theta", 0, "must be more than 0"),
    ("rope_theta", "x", "is no number"),
    ("rope_theta", float("inf"), "is not finite"),
    ("rope_theta", 10**400, "must be at most"),
    ("rms_norm_eps", "x", "is no number"),
    ("rms_norm_eps", -1, "must be at least 0"),
    ("tie_word_embeddings", "no", "is neither true nor false"),
    ("tie_word_embeddings", 1, "is neither true nor false"),
    ("rope_scaling", [1], "is [1]"),
    ("rope_scaling", "x", "is 'x'"),
    ("rope_scaling", {"rope_type": "yarn"}, "rope_type is 'yarn'"),
    ("rope_scaling", {"rope_type": ["llama3"]}, "rope_type is ['llama3']"),
    ("rope_scaling", {"rope_type": "llama3"}, "factor is missing"),
    ("rope_scaling", {**SCALED, "factor": 0}, "rope_scaling.factor=0 must be more than 0"),
    ("rope_scaling", {**SCALED, "factor": "8"}, "factor='8' is no number"),
    ("rope_scaling", {**SCALED, "factor": None}, "factor=None is no number"),
    ("rope_scaling", {**SCALED, "factor": float("nan")}, "factor=nan is not finite"),
    ("rope_scaling", {**SCALED, "rope_theta": []}, "rope_theta=[] is no number"),
    ("rope_scaling", {**SCALED, "original_max_position_embeddings": 10**12}, "original_max_position_embeddings="),
]


@pytest.mark.parametrize(("field", "value", "says"), WRONG_FIELDS, ids=lambda value: ascii(value)[:30])
def test_hostile_config_json(field, value, says, elsewhere):
    (elsewhere / "config.json").write_text(json.dumps({**LLAMA, field: value}))
    said = answer(asked(model=elsewhere))
    assert said.startswith(f"model.path: {elsewhere}/config.json: ")
    assert field in said or field == "rope_scaling"
    assert says in said


def tensors(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file."""
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + data


def index(places: Any) -> dict[str, bytes]:
    return {"model.safetensors.index.json": json.dumps(places).encode()}


NORM = {"model.norm.weight": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}}
TORN = "torn or not a safetensors file"
WEIGHTS = {  # files beside config.json, what the sentence says
    "none": ({}, "no *.safetensors file there"),
    "pickle": ({"pytorch_model.bin": BOMB}, "pytorch_model.bin is not read, for a pickle can run any code"),
    "pickle of another name": ({"consolidated.00.pth": BOMB}, "consolidated.00.pth is not read"),
    "pickle in disguise": ({"model.safetensors": BOMB}, TORN),
    "index {}": (index({}), "weight_map is no object"),
    "index list": (index([1]), "holds a list"),
    "index of list": (index({"weight_map": ["a"]}), "weight_map is no object"),
    "index of numbers": (index({"weight_map": {"a": 1}}), "weight_map is no object"),
    "index that leads out": (index({"weight_map": {"a": "../x.safetensors"}}), "a file of the same folder is needed"),
    "index that leads away": (index({"weight_map": {"a": "/etc/passwd"}}), "a file of the same folder is needed"),
    "index of a pickle": (
        {**index({"weight_map": {"a": "x.bin"}}), "x.bin": BOMB},
        TORN,
    ),
    "index of nothing": (index({"weight_map": {"a": "x.safetensors"}}), "x.safetensors: No such file or directory"),
    "empty": ({"model.safetensors": b""}, TORN),
    "garbage": ({"model.safetensors": b"garbage" * 100}, TORN),
    "long header": ({"model.safetensors": struct.pack("<Q", 2**60) + b"{}"}, TORN),
    "header of a list": ({"model.safetensors": tensors([1])}, TORN),
    "header of brackets": ({"model.safetensors": tensors(b"[" * 100_000)}, TORN),
    "header of text": ({"model.safetensors": tensors({"a": "b"})}, TORN),
    "header beyond the file": ({"model.safetensors": tensors(NORM)}, TORN),
    "integers": ({"model.safetensors": tensors(NORM, b"0" * 16)}, "has tensors of I64, and floats are needed"),
    "no tensors": ({"model.safetensors": tensors({})}, "is missing"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_hostile_weights(case, elsewhere):
    files, says = WEIGHTS[case]
    for name, content in {"config.json": json.dumps(LLAMA).encode(), **files}.items():
        (elsewhere / name).write_bytes(content)
    said = answer(asked(model=elsewhere))
    assert said.startswith(f"model.path: {elsewhere}")
    assert says in said


def npy(header: str | bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    written = header if isinstance(header, bytes) else header.encode()
    length = struct.pack("<H" if version[0] == 1 else "<I", len(written))
    return b"\x93NUMPY" + version + length + written + data


def array(shape: str, descr: str = "'<i8'") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n", b"\0" * 64)


UNREADABLE = "cannot be read as .npy"
ARRAYS = {
    "empty": (b"", UNREADABLE),
    "garbage": (b"garbage" * 100, UNREADABLE),
    "pickle": (BOMB, UNREADABLE),
    "npz": (b"PK\x03\x04" + b"\0" * 100, UNREADABLE),
    "objects": (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", BOMB), "an array of Python objects"),
    "code for a header": (npy("__import__('os').mkdir('ran')"), UNREADABLE),
    "brackets for a header": (npy("[" * 60_000), UNREADABLE),
    "no header": (npy(b""), UNREADABLE),
    "header of version 2": (npy("{}", version=b"\x02\x00"), UNREADABLE),
    "header that is not there": (b"\x93NUMPY\x01\x00\xff\xff", UNREADABLE),
    "less than it says": (array("(1000,)"), "is shorter than it says"),
    "more than there is": (array("(10**30,)".replace("10**30", "9" * 30)), "is shorter than it says"),
    "negative": (array("(-1,)"), "is shorter than it says"),
    "2-D": (array("(2, 4)"), "2-D int64, and 1-D integers are needed"),
    "0-D": (array("()"), "0-D int64"),
    "floats": (array("(8,)", "'<f8'"), "1-D float64, and 1-D integers are needed"),
    "booleans": (array("(8,)", "'|b1'"), "1-D bool"),
    "durations": (array("(8,)", "'<m8[s]'"), "1-D timedelta64[s]"),
    "fields": (array("(4,)", "[('a', '<i8')]"), "and 1-D integers are needed"),
    "type that is none": (array("(8,)", "'<i9'"), UNREADABLE),
    "no tokens": (array("(0,)"), "is empty"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_hostile_arrays(case, elsewhere):
    content, says = ARRAYS[case]
    (elsewhere / "tokens.npy").write_bytes(content)
    said = answer(asked(data=elsewhere / "tokens.npy"))
    assert str(elsewhere / "tokens.npy") in said
    assert "data.path" in said
    assert says in said


@pytest.mark.parametrize("values", [[-7] * 500, [256] * 500, [2**63] * 500, [-(2**63)] * 500])
def test_tokens_that_are_none(values, elsewhere):
    np.save(elsewhere / "tokens.npy", np.array(values))
    assert "data=tokens has tokens from" in answer(asked(data=elsewhere / "tokens.npy"))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path)


def nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [fifo, loop, nowhere, device, folder])
def test_what_is_no_file(make, elsewhere):
    """A fifo would be waited for, /dev/zero read for ever."""
    path = elsewhere / "x"
    make(path)
    assert answer(asked(data=path)).startswith("data.path: ")
    assert answer(asked(text=path)).startswith("data.path")
    (elsewhere / "config.json").symlink_to(path)
    assert answer(asked(model=elsewhere)).startswith(f"model.path: {elsewhere}/config.json: ")
    (elsewhere / "config.json").unlink()
    (elsewhere / "config.json").write_text(json.dumps(LLAMA))
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (elsewhere / name).symlink_to(path)
        assert answer(asked(model=elsewhere)).startswith(f"model.path: {elsewhere}")
        (elsewhere / name).unlink()


def test_text_folders(elsewhere):
    """What is no file in a folder of text is passed over."""
    for make in (fifo, loop, nowhere, device, folder):
        make(elsewhere / make.__name__)
    assert "is empty" in answer(asked(text=elsewhere))
    (elsewhere / "folder" / "b").write_text("words " * 1000)
    assert answer(asked(text=elsewhere)) == ""


def test_a_hundred_gigabytes_are_not_read(elsewhere):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, head in (("text", b""), ("tokens.npy", array(f"({10**10},)"))):
        (elsewhere / name).write_bytes(head)
        os.truncate(elsewhere / name, 100 * 10**9)
    for name in ("config.json", "model.safetensors.index.json", "model.safetensors"):
        (elsewhere / "hf").mkdir(exist_ok=True)
        (elsewhere / "hf" / name).touch()
        os.truncate(elsewhere / "hf" / name, 100 * 10**9)
    assert answer(asked(text=elsewhere / "text")) == ""
    assert answer(asked(data=elsewhere / "tokens.npy")) == ""
    assert answer(asked(text=elsewhere / "hf")) == ""
    config = Config.of(asdict(composed("data=tokens", "seq_len=64")))
    config.data.path, config.seq_len, config.steps = str(elsewhere / "tokens.npy"), 2**28, 2
    assert answer(lambda: resolved_here(config)) == ""
    assert "larger than 64 MiB" in answer(asked(model=elsewhere / "hf"))
    (elsewhere / "hf" / "config.json").unlink()
    (elsewhere / "hf" / "config.json").write_text(json.dumps(LLAMA))
    assert "larger than 64 MiB" in answer(asked(model=elsewhere / "hf"))
    (elsewhere / "hf" / "model.safetensors.index.json").unlink()
    assert TORN in answer(asked(model=elsewhere / "hf"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KiB


# Whatever comes to mind, for every key.

NUMBERS = st.one_of(
    st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.sampled_from([0, -1, 2**31, 2**63])
)
TEXTS = st.one_of(st.text(), st.text(st.characters(categories=["Cc", "Cs", "So"])), st.sampled_from(["", "???"]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)
SAME_FOLDER = [HealthCheck.function_scoped_fixture]


@settings(max_examples=1500, suppress_health_check=SAME_FOLDER)
@given(st.sampled_from([*keys(), "mesh", "model", "cluster", "model.rope_scaling", "optim"]), JSON)
def test_any_record_is_a_configuration_or_invalid(path, value):
    """As a record.json or a config has it: plain values of any type for any key, or for a section."""
    values = asdict(composed("mode=simulate", "cluster=h100", "model=llama3_8b"))
    *outer, name = path.split(".")
    holder = values
    for each in outer:
        holder = holder[each]
    holder[name] = value
    answer(lambda: resolved_here(Config.of(values)))


@settings(max_examples=60, suppress_health_check=SAME_FOLDER)
@given(st.sampled_from([*keys()]), st.one_of(NUMBERS.map(str), TEXTS, JSON.map(json.dumps)), st.booleans())
def test_any_words_are_a_configuration_or_a_sentence(path, value, quoted):
    quotes = "'" if quoted and "'" not in value else ""
    answer(words(f"{path}={quotes}{value}{quotes}"))


# The command itself.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["hydra.run.dir=../outside"], "results go to runs/<name>/"),
        (["-m", "hydra.sweep.dir=../outside", "steps=1,2"], "results go to runs/<name>/"),
        (["-m", "name=../outside", "steps=1,2"], FOLDER),
        (["-m", "seed=range(1,1000000000)"], "more than 10000 configurations"),
        (["--config-dir=../elsewhere", "+evil=x"], "there is no option --config-dir"),
        (["--experimental-rerun=../elsewhere/job.pickle"], "there is no option --experimental-rerun"),
        (["steps=" + "9" * 5000], "is no key=value"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_the_command_answers_in_a_sentence(arguments, says, elsewhere):
    (elsewhere / "job.pickle").write_bytes(BOMB)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "bench", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("bench: ")
    assert len(result.stderr.splitlines()) == 1
    assert says in result.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    assert not (elsewhere.parent / "outside").exists()
