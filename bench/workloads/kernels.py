"""workload=kernels: what a rank computes, by size: the model's matrix products, attention, and what is between them.

Shapes are the model's, a tp rank's part of them, at seq_len tokens and half, a quarter, .. of it. All ranks compute at
the same time, with as many threads each as in a training step: they share the memory, as they do there. FLOPs are those
of bench/instruments/flops.py, bytes those of conf/series.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # is there by its name then
from torch.utils._python_dispatch import TorchDispatchMode

from bench.instruments.timing import in_turn, repeated
from bench.workloads.training import PRECISIONS
from conf.keys import Config, ModelConfig
from conf.measurement import Timed, Work
from conf.series import moved
from models.llama import Llama, RMSNorm, Rotary, SwiGLU, rope_tables
from strategies.base import Strategy
from strategies.ops.kernels import accumulator, merge
from strategies.ops.mesh import Axis
from strategies.single import Single
from strategies.zero import Zero

LENGTHS = 6  # of tokens, each half of the one before
Kernel = tuple[Work, Callable[[], object]]


def measured(config: Config, strategy: Strategy) -> Iterator[Timed]:
    """All kernels of a length in turn, on all ranks the same.

    In a loop of its own each would find its data in the caches, and not as it does in a step.
    """
    for tokens in lengths(config.seq_len):
        works, runs = zip(*kernels(config, strategy, tokens), strict=True)
        if dist.is_initialized():
            dist.barrier()
        us = in_turn(runs, config.steps, config.warmup, config.device)
        yield from map(Timed, works, us)
    yield from times_of_the_host(config, strategy)


def kernels(config: Config, strategy: Strategy, tokens: int) -> Iterator[Kernel]:
    """Each with its inputs."""
    model, dtype = of_a_rank(config.model, strategy.mesh.tp.size), strategy.options.compute_dtype
    yield from products(model, tokens, dtype, config.device)
    yield from attention(model, tokens, strategy)
    yield from between(model, tokens, dtype, config.device)
    yield optimizer(model.dim * tokens, PRECISIONS[config.precision][0], config.device)


def of_a_rank(model: ModelConfig, tp: int) -> ModelConfig:
    """A tp rank's part of the heads and of the columns."""
    heads, kv_heads = (max(1, n // tp) for n in (model.n_heads, model.n_kv_heads))
    ffn_dim, vocab_size = (-(-n // tp) for n in (model.ffn_dim, model.vocab_size))
    return replace(model, n_heads=heads, n_kv_heads=kv_heads, ffn_dim=ffn_dim, vocab_size=vocab_size)


def lengths(longest: int) -> list[int]:
    return sorted({max(1, longest >> n) for n in range(LENGTHS)})


def products(model: ModelConfig, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Kernel]:
    """y = x W^T of each matrix of a block and of the head, and both products of its backward."""
    q, kv = model.n_heads * model.dim_of_head, model.n_kv_heads * model.dim_of_head
    d, f = model.dim, model.ffn_dim
    for n_in, n_out in dict.fromkeys([(d, q), (d, kv), (q, d), (d, f), (f, d), (d, model.vocab_size)]):
        x, weight, grad = (random(device, dtype, *shape) for shape in ((tokens, n_in), (n_out, n_in), (tokens, n_out)))
        runs = {
            "x W": partial(F.linear, x, weight),
            "gradient of x": partial(torch.mm, grad, weight),
            "gradient of W": partial(torch.mm, grad.t(), x),
        }
        for what, run in runs.items():
            size = (x.numel() + weight.numel() + grad.numel()) * dtype.itemsize
            shape = f"{what}, {tokens} x {n_in} x {n_out}"
            yield Work("products", name(dtype), size, shape, tokens, flops=2 * tokens * n_in * n_out), run


def attention(model: ModelConfig, tokens: int, strategy: Strategy) -> Iterator[Kernel]:
    """The strategy's kernel, on a block that sees itself (causal) and on one that visits (full)."""
    kernel, dtype, device = strategy.options.kernel, strategy.options.compute_dtype, strategy.mesh.device
    heads, kv_heads, head_dim = model.n_heads, model.n_kv_heads, model.dim_of_head
    q, k, v, grad = (random(device, dtype, 1, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads, heads))
    for causal in (True, False):
        out, lse = kernel.forward(q, k, v, causal)
        scores = heads * (tokens * (tokens + 1) // 2 if causal else tokens * tokens)
        shape = f"{tokens} {'causal' if causal else 'full'}, {heads} heads ({kv_heads}) of {head_dim}"
        size = 2 * (q.numel() + k.numel()) * dtype.itemsize
        flops = head_dim * scores
        forward = Work("attention_forward", name(dtype), size, shape, tokens, causal, 4 * flops)
        yield forward, partial(kernel.forward, q, k, v, causal)
        backward = Work("attention_backward", name(dtype), 2 * size, shape, tokens, causal, 10 * flops)
        yield backward, partial(kernel.backward, grad, q, k, v, out, lse, causal)


def between(model: ModelConfig, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Kernel]:
    """Norm, rotary embedding and activation, forward and backward; ring's merge, a residual addition, a copy."""
    x, y = (random(device, dtype, 1, tokens, model.dim) for _ in range(2))
    q = random(device, dtype, 1, tokens, model.n_heads, model.dim_of_head)
    gate, up = (random(device, dtype, 1, tokens, model.ffn_dim) for _ in range(2))
    rope = rope_tables(torch.arange(tokens, device=device), model, dtype)
    norm = RMSNorm(model.dim, model.norm_eps).to(device, dtype)
    yield from both_ways("norm", norm, x)
    yield from both_ways("rotary", Rotary(), q, rope)
    yield from both_ways("swiglu", SwiGLU(), gate, up)
    out = accumulator(q.clone())
    lse = random(device, out.dtype, 1, model.n_heads, tokens)
    yield of_bytes("merge", q), partial(merge, out, lse, q, lse.clone())
    yield of_bytes("other", x), partial(torch.add, x, y)
    yield of_bytes("copy", x), partial(y.copy_, x)


def both_ways(kind: str, module: nn.Module, *inputs: object) -> Iterator[Kernel]:
    """Forward, as it is in training; and backward again and again from one forward."""
    leaves = [each.detach().requires_grad_() if isinstance(each, Tensor) else each for each in inputs]
    wanted = [each for each in (*leaves, *module.parameters()) if isinstance(each, Tensor)]
    out = module(*leaves)
    grad = torch.ones_like(out)
    yield of_bytes(kind, out), partial(module, *leaves)
    backward = partial(torch.autograd.grad, out, wanted, grad, retain_graph=True)
    yield of_bytes(kind, out, backward=True), backward


def of_bytes(kind: str, out: Tensor, backward: bool = False) -> Work:
    size = moved(f"{kind} backward" if backward else kind, out.numel(), out.element_size())
    shape = f"{'backward, ' if backward else ''}{' x '.join(map(str, out.shape[1:]))}"
    return Work(kind, name(out.dtype), size, shape, out.shape[1])


def optimizer(elements: int, dtype: torch.dtype, device: str) -> Kernel:
    """AdamW as a training step has it, on so many weights."""
    weight = nn.Parameter(random(device, dtype, elements))
    weight.grad = torch.ones_like(weight)
    adamw = torch.optim.AdamW([weight], fused=True)
    return Work("optimizer", name(dtype), moved("optimizer", elements, dtype.itemsize), str(elements)), adamw.step


SOME = 1e-3  # us: a difference of two times is below that by noise alone, and no time that passed is none


def times_of_the_host(config: Config, strategy: Strategy) -> Iterator[Timed]:
    """For one operation and for what is around it in training: modules, views, autograd; and, where there are several
    ranks, for FSDP2's own Python around one message of weights or of their gradients, the operations in it apart.

    Forward and backward of a model with nothing to compute, by the host's clock: a GPU is not waited for.
    """
    dtype = name(strategy.options.compute_dtype)
    us, calls = host_us(config, Single(strategy.mesh, strategy.options))
    yield Timed(Work("call", dtype, 0, "1"), a_call := [each / calls.n for each in us])
    if config.world_size > 1:
        us, calls = host_us(config, Zero(replace(strategy.mesh, zero=made_up(config.device)), strategy.options))
        rest = [each - calls.n * median(a_call) for each in us]
        yield Timed(Work("group", dtype, 0, "1"), [max(SOME, each) / calls.messages for each in rest])


def host_us(config: Config, strategy: Strategy) -> tuple[list[float], "Calls"]:
    dtype = strategy.options.compute_dtype
    small = replace(config.model, dim=64, n_layers=2, n_heads=1, n_kv_heads=1, head_dim=64, ffn_dim=64, vocab_size=64)
    with torch.device(config.device):
        model = Llama(small, strategy, dtype).to(dtype)
        tokens, positions = torch.zeros(1, 1, dtype=torch.int64), torch.arange(1)
    strategy.shard(model)

    def step() -> None:
        model(tokens, tokens, positions).backward()

    step()
    with Calls() as calls:
        step()
    us = []
    for _ in range(config.warmup + config.steps):
        if config.device == "cuda":
            torch.cuda.synchronize()
        us += repeated(step, 1, 0, "cpu")
    return us[config.warmup :], calls


def made_up(device: str) -> Axis:
    """Two ranks whose messages take no time (torch's fake process group)."""
    group = dist.new_group([0, 1], backend="fake", group_desc="zero")
    mesh = DeviceMesh.from_group(group, device, [0, 1], mesh_dim_names=("zero",))
    return Axis("zero", 2, dist.get_rank() % 2, mesh)


class Calls(TorchDispatchMode):
    """Counts operations that are no views, and messages apart."""

    n, messages = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.messages += func.namespace == "c10d"
        self.n += not func.is_view and func.namespace != "c10d"
        return func(*args, **(kwargs or {}))


def random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
