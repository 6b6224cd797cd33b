"""What only a GPU can show: its kernels against fp64, and a training step like the CPU's. Run by ./run.sh gpu."""

from contextlib import nullcontext

import pytest
import torch

from bench.app import sweep as app
from bench.app.row import resolved_here
from bench.instruments.step import run_step
from bench.workloads.build import build
from conf.clock import KERNELS
from conf.kernels import PACKAGES
from conf.series import read
from strategies.ops.kernels import Math, merge, pick_kernel
from tests.jobs import job
from tests.ranks import standing_for
from tests.reference import distance

pytestmark = pytest.mark.cuda
WIDE = ["model.n_heads=2", "model.n_kv_heads=2"]  # head_dim 64, as the flash kernels want it


kernels = pytest.mark.parametrize("kernel", ["sdpa", *PACKAGES], indirect=True)


@pytest.fixture
def kernel(request):
    try:
        return pick_kernel(request.param, "cuda", torch.bfloat16, 64)
    except ValueError as reason:
        pytest.skip(str(reason))


def drawn(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Of so many tokens and heads each."""
    torch.manual_seed(0)
    return [torch.randn(2, *size, 64, device="cuda", dtype=torch.bfloat16) for size in sizes]


@kernels
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("keys", [256, 448])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("windowed", [True, False])
def test_kernel_is_as_near_to_fp64_as_bf16_allows(kernel, heads, keys, causal, windowed):
    n_heads, n_kv_heads = heads
    q, k, v, grad = drawn((256, n_heads), (keys, n_kv_heads), (keys, n_kv_heads), (256, n_heads))
    exact = [t.double() for t in (q, k, v)]
    want, want_lse = Math().forward(*exact, causal, windowed)
    wants = Math().backward(grad.double(), *exact, want, want_lse, causal, windowed)
    out, lse = kernel.forward(q, k, v, causal, windowed)
    assert lse.shape == want_lse.shape
    assert lse.dtype == torch.float32
    assert distance(out, want) < 1e-2
    assert distance(lse, want_lse) < 1e-3
    for got, expected in zip(kernel.backward(grad, q, k, v, out, lse, causal, windowed), wants, strict=True):
        if causal and windowed and keys == 256:  # each sees itself alone, and nothing of that depends on q and k
            assert (got.double() - expected).norm() < 2e-2 * grad.double().norm()
        else:
            assert distance(got, expected) < 2e-2


@kernels
def test_blocks_merge_on_the_gpu(kernel):
    """Forward, and backward of each block given what was merged."""
    q, k, v, grad = drawn(*[(512, 8)] * 4)
    exact = [t.double() for t in (q, k, v)]
    whole, whole_lse = Math().forward(*exact, causal=False)
    wants = Math().backward(grad.double(), *exact, whole, whole_lse, causal=False)
    halves = [(k[:, :256], v[:, :256]), (k[:, 256:], v[:, 256:])]
    out, lse = kernel.forward(q, *halves[0], causal=False)
    out = out.float()
    merge(out, lse, *kernel.forward(q, *halves[1], causal=False))
    assert distance(out, whole) < 1e-2
    blocks = [kernel.backward(grad, q, *half, out.bfloat16(), lse, causal=False) for half in halves]
    grad_q = blocks[0][0].float() + blocks[1][0]
    got = (grad_q, *(torch.cat(pair, 1) for pair in list(zip(*blocks, strict=True))[1:]))
    for each, want in zip(got, wants, strict=True):
        assert distance(each, want) < 2e-2


def test_a_run_on_the_gpu_is_a_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {
        device: app.run_one(job("strategy=single", "world_size=1", f"device={device}", "precision=bf16", *WIDE))
        for device in ("cuda", "cpu")
    }
    assert [row["status"] for row in rows.values()] == ["ok", "ok"], rows
    assert rows["cuda"]["attention_kernel"] in ("sdpa", *PACKAGES)
    assert rows["cuda"]["peak_reserved_bytes"] >= rows["cuda"]["peak_bytes"] > 0
    assert rows["cuda"]["flops_per_rank"] == rows["cpu"]["flops_per_rank"]
    assert rows["cuda"]["loss_last"] < rows["cuda"]["loss_first"]


def test_a_gpu_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = ["strategy=single", "world_size=1", "device=cuda", "precision=bf16", "seq_len=1024", "workload=kernels"]
    row = app.run_one(job(*one, "model.dim=2048", "model.n_heads=16", "model.ffn_dim=5504"))
    assert row["status"] == "ok", row
    (file,) = tmp_path.glob("runs/*/*/kernels.csv")
    lines = read(file)
    assert {line["kind"] for line in lines} >= {*KERNELS, "products", "attention_forward", "attention_backward", "call"}
    products = [line for line in lines if line["kind"] == "products"]
    slow, fast = (line["gflops"] for line in sorted(products, key=lambda line: line["flops"])[:: len(products) - 1])
    assert slow < fast


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("tp_sp", 2), ("ulysses", 2), ("ring", 2)])
def test_a_step_never_waits_for_the_host(strategy, ranks):
    mesh = [f"strategy={strategy}", f"world_size={ranks}", "mode=emulate"]
    config = resolved_here(job(*mesh, "device=cuda", "precision=bf16_mixed", *WIDE).config).config
    with standing_for(0, ranks, "cuda") if ranks > 1 else nullcontext():
        training, batches_of = build(config)
        batches = batches_of(0)
        try:
            for then in ("default", "default", "error"):  # in steady state
                torch.cuda.set_sync_debug_mode(then)
                run_step(training, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_what_waits_in_the_hosts_memory_comes_back_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = ["strategy=single", "world_size=1", "device=cuda", "precision=bf16", "seq_len=4096", "recompute=block", *WIDE]
    here, away = (app.run_one(job(*one, "model.n_layers=8", f"offload={what}")) for what in ("none", "activations"))
    assert (here["status"], away["status"]) == ("ok", "ok"), away
    assert away["losses"] == pytest.approx(here["losses"], rel=1e-3)
    assert away["host_bytes"] == 8 * 4096 * 128 * 2
    assert away["after_forward_bytes"] < here["after_forward_bytes"]
    assert 0 <= away["exposed_offload_ms"] < away["step_ms_median"]


def test_compiled_on_the_gpu_is_the_same_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = ["strategy=single", "world_size=1", "device=cuda", "precision=bf16", *WIDE]
    rows = [app.run_one(job(*one, f"compile={compiled}")) for compiled in ("true", "false")]
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=2e-2)
