"""The kernels, the merge of partial softmaxes and the layouts, against plain softmax in fp64."""

import itertools
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies
from conf.kernels import PACKAGES
from conf.keys import RingConfig, UlyssesConfig
from conf.mask import Mask, begins
from strategies.base import Options
from strategies.ops import collectives
from strategies.ops.collectives import Flight
from strategies.ops.kernels import Math, SdpaCpu, merge, pick_kernel
from strategies.ops.layouts import pairs, positions, ring_split, seen_keys, tiles_of
from tests.cases import LAYOUTS
from tests.ranks import on_ranks, standing_for
from tests.reference import distance

shapes = st.tuples(
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from([(8, 8), (8, 2), (6, 3), (4, 1)]),
    st.sampled_from([8, 16, 20]),
)


def inputs(batch: int, seq_len: int, heads: tuple[int, int], head_dim: int, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, seq_len, n, head_dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def plain_attention(q, k, v, mask=None):
    """Textbook attention of fp64 tensors [B, S, H, K], for autograd to differentiate."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("kernel", [Math(), SdpaCpu()], ids=lambda kernel: kernel.name)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, causal=st.booleans())
def test_kernel(kernel, shape, causal):
    batch, seq_len, heads, head_dim = shape
    q, k, v, grad = inputs(batch, seq_len, heads, head_dim)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    mask = torch.ones(seq_len, seq_len, dtype=torch.bool).tril() if causal else None
    out, lse = plain_attention(*exact, mask)
    out.backward(grad.double())
    ours, our_lse = kernel.forward(q, k, v, causal)
    assert distance(ours, out.detach()) < 2e-6
    torch.testing.assert_close(our_lse.double(), lse.detach(), atol=1e-5, rtol=1e-5)
    for got, want in zip(kernel.backward(grad, q, k, v, ours, our_lse, causal), exact, strict=True):
        assert distance(got, want.grad) < 5e-6 or want.grad.norm() < 1e-6


@pytest.mark.parametrize("kernel", [Math(), SdpaCpu()], ids=lambda kernel: kernel.name)
@settings(max_examples=10, deadline=None)
@given(seq_len=st.integers(4, 40), pieces=st.integers(2, 4), scale=st.sampled_from([1.0, 30.0]))
def test_blocks_merge_to_the_whole(kernel, seq_len, pieces, scale):
    """Forward in pieces of k and v, and backward of each piece given the merged out and lse. Large scores too."""
    q, k, v, grad = inputs(2, seq_len, (8, 2), 16)
    q = q * scale
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    whole, _ = plain_attention(*exact)
    whole.backward(grad.double())
    out = lse = None
    chunks = list(zip(k.chunk(pieces, 1), v.chunk(pieces, 1), strict=True))
    for k_piece, v_piece in chunks:
        block = kernel.forward(q, k_piece, v_piece, causal=False)
        if out is None:
            out, lse = block
        else:
            merge(out, lse, *block)
    assert distance(out, whole.detach()) < 5e-6 * scale
    grads = [kernel.backward(grad, q, *chunk, out, lse, causal=False) for chunk in chunks]
    grad_q = sum(g[0] for g in grads)
    grad_k, grad_v = (torch.cat([g[i] for g in grads], 1) for i in (1, 2))
    for got, want in zip((grad_q, grad_k, grad_v), exact, strict=True):
        assert distance(got, want.grad) < 2e-5 * scale


@pytest.mark.parametrize("kernel", [Math(), SdpaCpu()], ids=lambda kernel: kernel.name)
@settings(max_examples=40, deadline=None)
@given(queries=st.integers(1, 150), more=st.integers(0, 150), causal=st.booleans(), windowed=st.booleans())
def test_kernel_on_a_tile(kernel, queries, more, causal, windowed):
    """Of fewer queries than keys, whose first or last key moves on with the query: against its mask in fp64."""
    q, k, v, grad = inputs(2, queries + more, (4, 2), 8)
    q, grad = q[:, :queries], grad[:, :queries]
    place = torch.arange(queries + more) - torch.arange(queries)[:, None]
    mask = ((place >= 0) | (not windowed)) & ((place <= more) | (not causal))
    assert int(mask.sum()) == pairs(queries, queries + more, causal, windowed)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    out, lse = plain_attention(*exact, mask)
    out.backward(grad.double())
    ours, our_lse = kernel.forward(q, k, v, causal, windowed)
    assert distance(ours, out.detach()) < 2e-6
    torch.testing.assert_close(our_lse.double(), lse.detach(), atol=1e-5, rtol=1e-5)
    for got, want in zip(kernel.backward(grad, q, k, v, ours, our_lse, causal, windowed), exact, strict=True):
        assert distance(got, want.grad) < 5e-6 or want.grad.norm() < 1e-6


@st.composite
def rings(draw) -> tuple[int, int, Options]:
    """How many ranks, how many tokens of each, and a layout and a mask that these can have."""
    size, local = draw(st.integers(1, 5)), 2 * draw(st.integers(1, 6))
    layout, chunk = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([1, 2, local]))
    of_length = st.lists(st.integers(1, size * local), min_size=size * local, max_size=size * local)
    documents = draw(st.none() | st.lists(of_length, min_size=1, max_size=2))
    begin = None
    if documents is not None:
        begin = begins([cut(lengths, size * local) for lengths in documents])
    window = draw(st.none() | st.integers(1, size * local + 2))
    return size, local, Options(SdpaCpu(), mask=Mask(begin, window), ring=RingConfig(layout, chunk=chunk))


def cut(lengths: list[int], seq_len: int) -> list[int]:
    """As many as fill a sequence, the last one shorter."""
    before = np.cumsum([0, *lengths[:-1]])
    return [int(min(length, seq_len - start)) for length, start in zip(lengths, before, strict=True) if start < seq_len]


@settings(deadline=None)
@given(rings())
def test_tiles_are_what_the_mask_lets_through_each_pair_once(ring):
    size, local, options = ring
    at = [positions(rank, size, size * local, options) for rank in range(size)]
    assert sorted(np.concatenate(at)) == list(range(size * local))
    first = options.mask.first(np.arange(size * local))
    seen = np.zeros((len(first), size * local, size * local), int)
    for rank, source in itertools.product(range(size), repeat=2):
        for tile in tiles_of(rank, source, size, local, options):
            queries, keys = at[rank][tile.q], at[source][tile.kv]
            place = np.arange(len(keys)) - np.arange(len(queries))[:, None]
            through = (place >= 0) | (not tile.windowed)
            through &= (place <= len(keys) - len(queries)) | (not tile.causal)
            for row in range(len(first))[tile.rows]:
                seen[row][np.ix_(queries, keys)] += through
    query, key = np.arange(size * local)[:, None], np.arange(size * local)
    assert (seen == ((key <= query) & (key >= first[..., None]))).all()


@settings(deadline=None)
@given(rings())
def test_the_keys_that_are_needed_are_those_that_are_seen(ring):
    size, local, options = ring
    first = options.mask.first(np.arange(size * local))
    at = [positions(rank, size, size * local, options) for rank in range(size)]
    for rank, source in itertools.permutations(range(size), 2):
        needed = np.zeros((len(first), local), int)
        for rows, keys in seen_keys(rank, source, size, local, options):
            needed[rows, keys] += 1
        seen = (at[source] <= at[rank][:, None]) & (at[source] >= first[:, at[rank]][..., None])
        assert (needed == seen.any(1)).all()


def test_a_whole_sequence_is_in_few_tiles():
    """Under the causal mask each layout needs one call of a kernel for a visiting block, and none if it is hidden."""
    for layout, tiles in {"contiguous": [1, 1, 1, 0], "zigzag": [1, 1, 1, 1], "striped": [1, 1, 1, 1]}.items():
        options = Options(None, ring=RingConfig(layout))
        assert [len(tiles_of(2, source, 4, 8, options)) for source in (2, 1, 0, 3)] == tiles


@given(size=st.integers(2, 6), chunk=st.integers(1, 4))
def test_zigzag_and_striped_balance_the_work(size, chunk):
    local = 2 * chunk

    def work(layout: str, rank: int) -> int:
        options = Options(None, ring=RingConfig(layout))
        tiles = [tile for source in range(size) for tile in tiles_of(rank, source, size, local, options)]
        lengths = [(t.q.stop - t.q.start, t.kv.stop - t.kv.start, t.causal, t.windowed) for t in tiles]
        return sum(pairs(*each) for each in lengths)

    zigzag, striped, contiguous = (
        {work(layout, rank) for rank in range(size)} for layout in ("zigzag", "striped", "contiguous")
    )
    assert len(zigzag) == 1
    assert max(striped) - min(striped) <= local * size  # a diagonal a block
    assert max(contiguous) > 1.3 * max(zigzag)


def ring_error(rank: int, layout: str, size: int) -> tuple[float, list[float]] | None:
    """Ring attention in fp32 over `size` ranks against fp64 in one piece, on rank 0."""
    import torch.distributed as dist

    from conf.meshes import Line
    from strategies.base import Options
    from strategies.ops.mesh import axis_of
    from strategies.ops.ring_attention import ring_attention

    axis = axis_of("cpu", "ring", Line(size, stride=1))
    whole = inputs(2, 8 * size, (8, 2), 16, torch.float64)
    exact = [t.clone().requires_grad_() for t in whole[:3]]
    mask = torch.ones(8 * size, 8 * size, dtype=torch.bool).tril()
    out, _ = plain_attention(*exact, mask)
    out.backward(whole[3])
    options = Options(SdpaCpu(), ring=RingConfig(layout))
    mine = [ring_split(t.float(), axis, options) for t in whole]
    leaves = [t.clone().requires_grad_() for t in mine[:3]]
    ours = ring_attention(*leaves, axis, options)
    ours.backward(mine[3])
    want = [ring_split(t, axis, options) for t in (out.detach(), *(t.grad for t in exact))]
    got = [ours.detach(), *(t.grad for t in leaves)]
    errors = torch.tensor([distance(g, w) for g, w in zip(got, want, strict=True)])
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    return errors.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ring_errors_do_not_grow_with_the_ring(layout, size):
    assert max(on_ranks(size, ring_error, layout, size)[0]) < 2e-6


def test_auto_picks_what_runs():
    assert pick_kernel("auto", "cpu", torch.float32, 64).name == "sdpa"
    assert pick_kernel("auto", "cuda", torch.float32, 64).name == "math"
    assert pick_kernel("auto", "cuda", torch.bfloat16, 128).name in ("sdpa", *PACKAGES)
    with pytest.raises(ValueError, match=r"flash_attn needs CUDA.*these run: sdpa, math"):
        pick_kernel("flash_attn", "cpu", torch.float32, 64)


def in_flight_beside_the_kernel(name: str, ring: int, head_chunks: int) -> list[int]:
    """How many exchanges are on their way at each call of the kernel, forward and then backward."""
    flying, seen = 0, []

    class Flying(Flight):
        def leave(self, x, dim):
            nonlocal flying
            flying += 1
            return super().leave(x, dim)

        def land(self, arrived, dim):
            nonlocal flying
            flying -= 1
            return super().land(arrived, dim)

    class Looking(SdpaCpu):
        def forward(self, *args, **kwargs):
            seen.append(flying)
            return super().forward(*args, **kwargs)

        def backward(self, *args, **kwargs):
            seen.append(flying)
            return super().backward(*args, **kwargs)

    with standing_for(2 * ring - 1, 2 * ring), patch.object(collectives, "Flight", Flying):
        options = Options(Looking(), ulysses=UlyssesConfig(chunks=head_chunks))
        strategy = strategies.build(name, {"ulysses": 2, "ring": ring}, options)
        q, k, v, grad = inputs(1, 16, (8, 4), 8)
        strategy.core_attention(*(t.requires_grad_() for t in (q, k, v))).backward(grad)
    assert flying == 0
    return seen


@pytest.mark.parametrize(("name", "ring"), [("ulysses", 1), ("usp", 1), ("usp", 2), ("tp_usp", 1), ("tp_usp", 2)])
def test_one_chunk_of_heads_is_exchanged_while_another_is_computed(name, ring):
    """Forward: the second's q, k and v, then the first's output. Backward: its gradient, then those of the second's.

    Around a ring the kernel is called for every block that visits.
    """
    assert in_flight_beside_the_kernel(name, ring, 1) == [0] * 2 * ring
    expected = [flying for flying in (3, 1, 1, 3) for _ in range(ring)]
    assert in_flight_beside_the_kernel(name, ring, 2) == expected
