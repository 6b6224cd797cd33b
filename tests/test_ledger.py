"""The ledger equals the closed forms exactly: calls and bytes, per kind and phase, of one block and of a whole step."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from analysis.accounts import predicted, step_bytes
from bench.ranks.unlike import unlike_ranks
from conf.keys import Config
from tests import instruments
from tests.cases import CASES, HEADS, Case, config_of
from tests.ranks import on_ranks, standing_for

SIZES = {"dim": 64, "n_heads": 8, "ffn_dim": 96, "vocab_size": 64, "tie_embeddings": False}
E_GRAD = 4  # bytes of a travelling dK, dV: fp32

Form = dict[tuple[str, str, bool], tuple[int, float]]  # (phase, kind, carries weights) -> calls, bytes sent


def block_form(case: Case, n_kv_heads: int, batch: int, seq_len: int, e: int) -> Form:
    """What one block sends, forward and backward, by the papers (f = (P-1)/P; D, Dk in bytes)."""
    d, i, k = SIZES["dim"], SIZES["ffn_dim"], SIZES["dim"] // SIZES["n_heads"]
    d_k = n_kv_heads * k
    batch = max(1, -(-batch // case.dp))
    tp, u, r = case.tp, case.ulysses, case.ring
    tokens = batch * seq_len / (u * r)  # of a tp group, between the attentions
    D = tokens * d * e
    form: Counter = Counter()
    calls: Counter = Counter()

    def add(phase: str, kind: str, n: int, sent: float, weights: bool = False) -> None:
        if sent:
            calls[phase, kind, weights] += n
            form[phase, kind, weights] += sent

    def zero(elements: float, ranks: int) -> None:
        sent = (ranks - 1) / ranks * elements * e
        if case.zero_stage == 0:  # the whole model's gradients travel together: no call of the block's own
            add("backward", "all_reduce", 0, 2 * sent, True)
        elif case.zero_stage == 1:
            add("backward", "reduce_scatter", 0, sent, True)
            add("optimizer", "all_gather", 0, sent, True)
        else:
            add("forward", "all_gather", 1, sent, True)
            add("backward", "all_gather", case.zero_stage - 2, (case.zero_stage - 2) * sent, True)
            add("backward", "reduce_scatter", 1, sent, True)

    again = 1 if case.recompute == "block" else 0
    f = (tp - 1) / tp
    if case.strategy == "tp":
        add("forward", "all_reduce", 2, 2 * 2 * f * D)
        add("backward", "all_reduce", 2, 2 * 2 * f * D)
        add("recompute", "all_reduce", again, again * 2 * f * D)
    if case.strategy in ("tp_sp", "tp_usp"):
        here = seq_len // case.world_size * case.dp
        chunks = [
            min(-(-here // case.mlp_chunks), here - start) for start in range(0, here, -(-here // case.mlp_chunks))
        ]
        n = len(chunks)
        add("forward", "all_gather", 1 + n, 2 * f * D)
        add("forward", "reduce_scatter", 1 + n, 2 * f * D)
        add("backward", "all_gather", 2 + 2 * n, 4 * f * D)
        add("backward", "reduce_scatter", 1 + n, 2 * f * D)
        add("recompute", "all_gather", again, again * f * D)  # attention's
        add("recompute", "reduce_scatter", again, again * f * D)
        if case.mlp_chunks == 1:
            add("recompute", "all_gather", again, again * f * D)
        else:  # all but the last run again for the block, all for themselves
            others = again * (1 - chunks[-1] / here)
            add("recompute", "all_gather", n + again * (n - 1), (1 + others) * f * D)
            add("recompute", "reduce_scatter", again * (n - 1), others * f * D)
    if case.strategy == "odysseus":
        add("forward", "all_gather", 1, f * D)
        add("forward", "reduce_scatter", 1, f * D)
        add("backward", "all_gather", 2, 2 * f * D)
        add("backward", "reduce_scatter", 1, f * D)
        add("recompute", "all_gather", again, again * f * D)
        add("recompute", "reduce_scatter", again, again * f * D)
        zero(3 * d * i, case.world_size)
    if case.strategy == "tsp" and r > 1:  # shards of the matrices, in four buffers, and their gradients
        down, whole = d * i * e, (2 * d * d + 2 * d * d_k + 3 * d * i) * e
        add("forward", "p2p", 4 * (r - 1), (r - 1) / r * whole, True)
        add("backward", "p2p", 8 * (r - 1), 2 * (r - 1) / r * whole, True)
        add("recompute", "p2p", again * 3 * (r - 1), again * (r - 1) / r * (whole - down), True)
        norms = 2 * d / (case.dp if case.zero_stage else 1) * 4
        add("backward", "all_reduce", 0, 2 * (r - 1) / r * norms, True)
    g = max(1, n_kv_heads // tp)  # kv heads of a tp rank
    rho = max(1, u // g)
    q, kv = tokens * d / tp * e, tokens * rho * g * k * e  # bytes of a rank's q, and of its k
    if u > 1 and case.strategy == "upipe":
        stages = case.stages or SIZES["n_heads"] // u
        calls_of_qo, calls_of_kv = 2 * stages, 2 * min(stages, rho * g // u)
        for phase, times in (("forward", 1), ("backward", 2), ("recompute", again)):
            add(phase, "all_to_all", times * (calls_of_qo + calls_of_kv), times * (u - 1) / u * (2 * q + 2 * kv))
    elif u > 1:
        exchanged, exchanges = (u - 1) / u * (2 * q + 2 * kv), case.head_chunks * (2 if case.packed else 4)
        add("forward", "all_to_all", exchanges, exchanged)
        add("backward", "all_to_all", exchanges, exchanged)
        add("recompute", "all_to_all", again * exchanges, again * exchanged)
    if r > 1:
        hop = 2 * kv
    if case.strategy == "mesh_attention":
        in_row, in_column, lse = case.inner - 1, r // case.inner - 1, tokens * SIZES["n_heads"] * 4
        rows, columns = int(in_row > 0), int(in_column > 0)
        for phase, times in (("forward", 1), ("recompute", again)):
            add(phase, "all_gather", times * (rows + columns), times * (in_row * q + in_column * hop))
            add(phase, "all_to_all", times * 2 * rows, times * in_row * (q + lse))
        add("backward", "all_gather", 2 * rows + columns, in_row * (3 * q + lse) + in_column * hop)
        add("backward", "reduce_scatter", rows + columns, (in_row * q + in_column * hop) * E_GRAD / e)
    elif r > 1 and case.kv == "all_gather":
        add("forward", "all_gather", 1, (r - 1) * hop)
        add("backward", "all_gather", 1, (r - 1) * hop)
        add("backward", "reduce_scatter", 1, (r - 1) * hop * E_GRAD / e)
        add("recompute", "all_gather", again, again * (r - 1) * hop)
    elif r > 1:
        hops = case.head_chunks * (r - 1)
        add("forward", "p2p", hops, (r - 1) * hop)
        if case.backward == "q":
            numbers = 2 * tokens * SIZES["n_heads"] / tp * 4
            add("backward", "p2p", 3 * hops, (r - 1) * (2 * q + numbers + q * E_GRAD / e))
        else:
            add("backward", "p2p", 2 * hops, (r - 1) * (hop + hop * E_GRAD / e))
        add("recompute", "p2p", again * hops, again * (r - 1) * hop)
    if tp > 1:  # replicated weights' gradients travel once a step for all blocks: no call of the block's own
        shared = 2 * d if case.strategy in ("tp_sp", "tp_usp", "odysseus") else 0
        zero_ways = case.dp * u * r if case.zero_stage else 1
        add("backward", "all_reduce", 0, 2 * f * shared / zero_ways * 4, True)
        copies = max(1, tp // n_kv_heads)
        add("backward", "all_reduce", 0, 2 * (copies - 1) / copies * 2 * k * d / zero_ways * 4, True)
    attention = (2 * d * d + 2 * d * max(d_k // tp, k) * tp) / tp
    mlp = 0 if case.strategy == "odysseus" else 3 * d * i / tp
    if case.strategy == "tsp":
        zero((attention + mlp) / r + 2 * d, case.dp)
    elif case.dp * u * r > 1:
        zero(attention + mlp + 2 * d, case.dp * u * r)
    return {key: (calls[key], form[key]) for key in form}


def counted_block(rank: int, case: Case, n_kv_heads: int, batch: int, seq_len: int, dtype: str) -> Form:
    """What a second block adds to the ledger of a model with one."""
    totals = []
    for n_layers in (2, 1):
        sizes = {**SIZES, "n_kv_heads": n_kv_heads, "n_layers": n_layers}
        entries = instruments.ledger(case, sizes, batch, seq_len, dtype)
        calls, sent = Counter(), Counter()
        for entry in entries:
            key = entry.phase, entry.kind, entry.weights
            calls[key] += entry.calls
            sent[key] += entry.sent_bytes
        totals.append((calls, sent))
    (calls, sent), (fewer_calls, fewer_sent) = totals
    return {
        key: (calls[key] - fewer_calls[key], sent[key] - fewer_sent[key])
        for key in sent
        if sent[key] != fewer_sent[key]
    }


def total(form: Form) -> float:
    return sum(sent for _, sent in form.values())


@pytest.mark.parametrize("case", [case for case in CASES if case.world_size == 4], ids=str)
def test_one_block_sends_what_the_papers_say(case: Case):
    few = 2 if case.fits(2) else 4
    variations = [(8, 1, "fp32"), (4, 2, "bf16"), (few, 3, "fp32")] if case in COSTED else [(few, 3, "fp32")]
    for n_kv_heads, batch, dtype in variations:
        expected = block_form(case, n_kv_heads, batch, 32, {"fp32": 4, "bf16": 2}[dtype])
        counted = on_ranks(case.world_size, counted_block, case, n_kv_heads, batch, 32, dtype)
        assert max(counted, key=total) == expected, f"{n_kv_heads} kv heads, batch {batch}, {dtype}"


def counted_step(
    process: int, case: Case, config: Config, sizes: dict, ranks: list[int]
) -> tuple[float, Form, list[str]]:
    """All bytes, and by phase and kind; and the lines that sent them. Each process emulates one of the ranks."""
    with standing_for(ranks[process % len(ranks)], case.world_size):
        entries = instruments.ledger(
            case,
            sizes,
            config.batch_size,
            config.seq_len,
            config.precision,
            ring=config.ring,
            grad_dtype=config.grad_dtype,
        )
    form: dict = {}
    for entry in entries:
        key = entry.phase, entry.kind, entry.weights
        calls, sent = form.get(key, (0, 0))
        form[key] = calls + entry.calls, sent + entry.sent_bytes
    return sum(round(entry.sent_bytes) for entry in entries), form, [entry.source for entry in entries]


COSTED = [
    Case("zero", dp=4),
    *(Case(name, tp=4) for name in ("tp", "tp_sp", "odysseus")),
    Case("tp_sp", dp=2, tp=2),
    Case("ulysses", ulysses=4, packed=True),
    Case("ulysses", dp=2, ulysses=2, head_chunks=2),
    Case("upipe", ulysses=4),
    Case("upipe", dp=2, ulysses=2, stages=2),
    Case("ring", ring=4),
    Case("ring", ring=4, kv="all_gather"),
    Case("ring", ring=4, inner=2),
    Case("ring", ring=4, backward="q"),
    Case("mesh_attention", ring=4, inner=2, kv="all_gather"),
    Case("tsp", ring=4, kv="all_gather"),
    Case("tsp", dp=2, ring=2, kv="all_gather"),
    Case("usp", ulysses=2, ring=2),
    Case("usp", ulysses=2, ring=2, head_chunks=2),
    Case("tp_usp", tp=2, ulysses=2),
    Case("tp_usp", tp=2, ring=2),
    Case("odysseus", tp=2, ring=2),
]
VARIATIONS = {
    "plain": {},
    "recompute": {"case": {"recompute": "block"}},
    "chunks": {"case": {"mlp_chunks": 3, "loss_chunks": 3}},
    "chunks, recomputed": {"case": {"mlp_chunks": 2, "loss_chunks": 2, "recompute": "block"}},
    "micro_batches": {"case": {"micro_batches": 2}, "batch_size": 4},
    "micro_batches, zero_stage 1": {"case": {"micro_batches": 3, "zero_stage": 1}, "batch_size": 6},
    "bf16_mixed": {"precision": "bf16_mixed"},
    "bf16_mixed, gradients too": {"precision": "bf16_mixed", "grad_dtype": "same"},
    "bf16_mixed, zero_stage 1": {"precision": "bf16_mixed", "case": {"zero_stage": 1}},
    "bf16, dK and dV too": {"precision": "bf16", "ring_grad_dtype": "same"},
    **{f"zero_stage {stage}": {"case": {"zero_stage": stage}} for stage in (0, 1, 2)},
    "tied, odd sizes, few kv heads": {
        "model": {"tie_embeddings": True, "vocab_size": 67, "ffn_dim": 100, "n_kv_heads": 2},
        "batch_size": 3,
    },
}


VARIED = [(case, name) for case in COSTED for name in VARIATIONS if case.fits(2) or "few kv heads" not in name]


@pytest.mark.parametrize(("case", "variation"), VARIED, ids=str)
def test_a_whole_step_sends_what_the_cost_table_says(case: Case, variation: str):
    change = VARIATIONS[variation]
    case = replace(case, **change.get("case", {}))
    sizes = {**SIZES, "n_kv_heads": HEADS["gqa"], "n_layers": 2, **change.get("model", {})}
    told = {key: change[key] for key in ("precision", "ring_grad_dtype", "grad_dtype") if key in change}
    config = config_of(case, sizes, change.get("batch_size", 2), 32, **told)
    ranks = unlike_ranks(config)
    counted = on_ranks(len(ranks), counted_step, case, config, sizes, ranks, grouped=False)
    sent, form, sources = max(counted, key=lambda counted: counted[0])
    assert sent == pytest.approx(step_bytes(config), abs=4)  # uneven parts are rounded one by one
    expected: dict = {}
    for line in predicted(config):
        key = line.phase, line.kind, line.weights
        calls, so_far = expected.get(key, (0, 0))
        expected[key] = calls + line.calls, so_far + line.bytes
    assert form.keys() == expected.keys()
    for key, (calls, size) in expected.items():
        assert form[key] == (calls, pytest.approx(size, abs=4)), key
    assert set(sources) - {"harness"}, "no line of a strategy was found"
    for source in sources:
        named = source.startswith(("strategies/", "zero")) or source == "harness"
        assert named, source
        assert not source.startswith("strategies/ops"), source


@pytest.mark.slow
def test_the_kernel_counts_the_same_bytes_on_the_wire():
    """In a network namespace of its own, the loopback device carries what the ranks send and nothing else."""
    probe = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("this machine does not let us make a network namespace")
    command = ["unshare", "-n", sys.executable, "-W", "ignore", "-m", "tests.loopback"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    )
    assert result.returncode == 0, result.stderr
    for line in json.loads(result.stdout.splitlines()[-1]):
        assert line["on_the_wire"] == pytest.approx(line["in_the_ledger"], rel=0.02), line["case"]
