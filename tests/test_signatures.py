"""FlashAttention's packages are called as their own sources declare their functions: no GPU has to say so.

The declarations are those of flash-attn and hopper/ of Dao-AILab/flash-attention (commits 0053002 and 01afd16), and of
the wheel flash-attn-4 4.0.0b36. Where a package is installed, they are held against its source.
"""

import ast
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conf.kernels import PACKAGES
from strategies.ops.flash_attention import FlashAttention2, FlashAttention3, FlashAttention4
from strategies.ops.kernels import SdpaCpu

SOURCES = Path(__file__).parent / "signatures"
KERNELS = {"flash_attn": FlashAttention2, "flash_attn_3": FlashAttention3, "flash_attn_4": FlashAttention4}


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


WANTED = ("_flash_attn_forward", "_flash_attn_backward", "_flash_attn_fwd", "_flash_attn_bwd")


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
            windowed = left is not None and left >= 0
            causal = given.get("causal", given.get("is_causal"))
            assert not windowed or left == m - n
            assert right in ((0,) if causal else (None, -1))
            assert given["softmax_scale"] == given["q"].shape[-1] ** -0.5
            if function in ("_flash_attn_forward", "_flash_attn_fwd"):
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
    """The package's modules, made of what its source declares."""
    made = Stub(request.param)
    path = PACKAGES[request.param].split(".")
    for depth in range(1, len(path) + 1):
        module = ModuleType(".".join(path[:depth]))
        if depth == len(path):
            for function in made.signatures:
                setattr(module, function, getattr(made, function))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return request.param, made


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


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_installed_declares_the_same(name):
    try:
        spec = importlib.util.find_spec(PACKAGES[name])
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).exists():
        pytest.skip(f"{name} is not installed")
    recorded, installed = declared((SOURCES / f"{name}.py").read_text()), declared(Path(spec.origin).read_text())
    for function, signature in recorded.items():
        theirs = installed[function].parameters
        assert [p for p in signature.parameters if p not in theirs] == [], function
