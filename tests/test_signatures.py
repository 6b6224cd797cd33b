"""FlashAttention's packages are called as their own sources declare their functions: no GPU has to say so.

The declarations are those of flash-attn and hopper/ of Dao-AILab/flash-attention (commits 0053002 and 01d6dd1), and of
the wheel flash-attn-4 4.0.0b36. Where a package is installed, or can be downloaded, they are held against its source.
"""

import ast
import inspect
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from conf import kernels
from conf.kernels import PACKAGES, installed, kernel_that_runs
from conf.words import Invalid
from strategies.ops.flash_attention import FlashAttention2, FlashAttention3, FlashAttention4
from strategies.ops.kernels import Math, SdpaCpu

SOURCES = Path(__file__).parent / "signatures"
KERNELS = {"flash_attn": FlashAttention2, "flash_attn_3": FlashAttention3, "flash_attn_4": FlashAttention4}


FILES = {"flash_attn": "flash_attn/flash_attn_interface.py", "flash_attn_4": "flash_attn/cute/interface.py"}


def declared(source: str) -> dict[str, inspect.Signature]:
    """Of each private function that a source declares, its parameters: their names, order and defaults."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in WANTED:
            plain = f"def f({ast.unparse(without_types(node.args))}): pass"
            scope: dict = {}
            exec(plain, scope)
            found[node.name] = inspect.signature(scope["f"])
    return found


FORWARD = ("_flash_attn_forward", "fwd", "_flash_attn_fwd")
WANTED = (*FORWARD, "_flash_attn_backward", "bwd", "_flash_attn_bwd")


def without_types(arguments: ast.arguments) -> ast.arguments:
    for argument in (*arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    return arguments


class Stub:
    """A package whose functions take what theirs take, and nothing else, and compute it as ours does."""

    def __init__(self, name: str) -> None:
        self.signatures, self.calls = declared((SOURCES / f"{name}.py").read_text()), []

    def __getattr__(self, function: str):
        def called(*args, **kwargs):
            bound = self.signatures[function].bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            self.calls.append(given)
            n, m = given["q"].shape[1], given["k"].shape[1]
            left, right = given["window_size_left"], given["window_size_right"]
            unbounded = None if function in ("_flash_attn_fwd", "_flash_attn_bwd") else -1  # 4 takes -1 as it stands
            windowed = left != unbounded
            causal = given.get("causal", given.get("is_causal"))
            assert not windowed or left == m - n
            assert right == (0 if causal else unbounded)
            assert given.get("return_lse", True)
            assert given["softmax_scale"] == given["q"].shape[-1] ** -0.5
            if function in FORWARD:
                return *SdpaCpu().forward(given["q"], given["k"], given["v"], causal, windowed), None, None
            lse = given.get("softmax_lse", given.get("lse"))
            tensors = given["dout"], given["q"], given["k"], given["v"], given["out"], lse
            grads = SdpaCpu().backward(*tensors, causal, windowed)
            for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
                if given[name] is not None:
                    given[name].copy_(grad)
            return (*grads, None) if function == "_flash_attn_bwd" else None

        return called


@pytest.fixture
def stub(request, monkeypatch):
    """The package's modules, or operators, made of what its source declares."""
    name, made = request.param, Stub(request.param)
    functions = {function: getattr(made, function) for function in made.signatures}
    path = FILES.get(name, "flash_attn_3/_C").removesuffix(".py").split("/")
    for depth in range(1, len(path) + 1):
        module = ModuleType(".".join(path[:depth]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(functions)
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(**functions), raising=False)
    return name, made


@pytest.mark.parametrize("stub", KERNELS, indirect=True)
@pytest.mark.parametrize(("causal", "windowed"), [(False, False), (True, False), (False, True), (True, True)])
def test_calls_are_as_the_package_declares(stub, causal, windowed):
    name, package = stub
    kernel = KERNELS[name]()
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 5, 4, 8, generator=generator) for _ in "qg")
    k, v = (torch.randn(2, 9, 2, 8, generator=generator) for _ in "kv")
    out, lse = kernel.forward(q, k, v, causal, windowed)
    want, want_lse = SdpaCpu().forward(q, k, v, causal, windowed)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    got = kernel.backward(grad, q, k, v, out, lse, causal, windowed)
    for ours, theirs in zip(got, SdpaCpu().backward(grad, q, k, v, out, lse, causal, windowed), strict=True):
        assert torch.equal(ours, theirs)
    assert len(package.calls) == 2


@pytest.mark.parametrize("stub", KERNELS, indirect=True)
def test_backward_takes_what_was_merged(stub):
    """Of a block of earlier keys and the own one: each returns its part of the gradient of both together."""
    kernel, judge = KERNELS[stub[0]](), Math()
    q, k, v, grad = (torch.randn(2, n, heads, 8, dtype=torch.double) for n, heads in ((4, 4), (10, 2), (10, 2), (4, 4)))
    out, lse = judge.forward(q, k, v, causal=True)
    want_q, *want_kv = judge.backward(grad, q, k, v, out, lse, causal=True)
    (q_earlier, *earlier), (q_own, *own) = (
        kernel.backward(grad, q, k[:, keys], v[:, keys], out, lse, causal)
        for keys, causal in ((slice(0, 6), False), (slice(6, 10), True))
    )
    torch.testing.assert_close(q_earlier + q_own, want_q)
    for want, parts in zip(want_kv, zip(earlier, own, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), want)


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_installed_declares_the_same(name):
    if not installed(name):
        pytest.skip(f"{PACKAGES[name][0]} is not installed")
    if name == "flash_attn_3":
        import flash_attn_3._C  # noqa: F401

        operators = {each: getattr(torch.ops.flash_attn_3, each).default._schema for each in ("fwd", "bwd")}
        theirs = {each: [argument.name for argument in schema.arguments] for each, schema in operators.items()}
    else:
        source = metadata.distribution(PACKAGES[name][0]).locate_file(FILES[name]).read_text()
        theirs = {each: list(signature.parameters) for each, signature in declared(source).items()}
    for function, signature in declared((SOURCES / f"{name}.py").read_text()).items():
        assert [p for p in signature.parameters if p not in theirs[function]] == [], function


@pytest.mark.slow
def test_what_pip_has_declares_the_same(tmp_path):
    """Of the one that is Python alone."""
    wheel = "flash-attn-4==4.0.0b36"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=0", "--quiet"]
    if subprocess.run([*pip, f"--dest={tmp_path}", wheel], capture_output=True, timeout=120).returncode:
        pytest.skip(f"pip cannot download {wheel} here")
    (file,) = tmp_path.glob("*.whl")
    source = zipfile.ZipFile(file).read(FILES["flash_attn_4"]).decode()
    assert declared(source) == declared((SOURCES / "flash_attn_4.py").read_text())


@pytest.mark.parametrize(
    ("generation", "head_dim", "missing", "picked"),
    [
        (9, 256, "", "flash_attn_3"),
        (9, 256, "flash_attn_3", "flash_attn_4"),
        (10, 128, "", "flash_attn_4"),
        (10, 192, "", "flash_attn"),
        (12, 256, "", "flash_attn"),
        (8, 128, "", "flash_attn"),
        (8, 128, "flash_attn", "sdpa"),
        (9, 100, "", "math"),
    ],
)
def test_auto_is_the_first_that_runs_there(monkeypatch, generation, head_dim, missing, picked):
    monkeypatch.setattr(kernels, "installed", lambda kernel: kernel != missing)
    assert kernel_that_runs("auto", "cuda", "bfloat16", head_dim, generation) == picked


def test_what_does_not_run_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(kernels, "installed", lambda kernel: True)
    with pytest.raises(Invalid, match=r"flash_attn_3 needs CUDA, a Hopper GPU, .*these run: flash_attn_4, flash_attn"):
        kernel_that_runs("flash_attn_3", "cuda", "bfloat16", 128, 10)


def test_a_placeholder_is_no_package(monkeypatch):
    versions = {"flash-attn": "2.8.3.post2", "flash-attn-3": "0.0.0", "flash-attn-4": "4.0.0b36"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    assert [name for name in KERNELS if installed(name)] == ["flash_attn", "flash_attn_4"]
