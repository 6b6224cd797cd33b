"""Packed documents and windows: where they end, who sees whose keys, and how evenly work is dealt out."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.accounts import differences, predicted, work_max_by_mean
from conf import seen
from conf.dealing import deal
from conf.documents import HISTOGRAM as SHIPPED
from conf.documents import after, drawn, histogram, in_turn, mask_of, without_label
from conf.keys import (
    AttentionConfig,
    Config,
    DocumentsConfig,
    MeshConfig,
    RingConfig,
    StrategyConfig,
)
from conf.mask import PLAIN, Mask, begins
from conf.words import Invalid
from tests import instruments
from tests.cases import Case, config_of, sized
from tests.ranks import on_ranks

SIZES = {"dim": 64, "n_layers": 1, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 96, "vocab_size": 64}
HISTOGRAM = DocumentsConfig("histogram")


def of_ring(ring: int, seq_len: int, layout: str, documents: DocumentsConfig, window: int | None = None) -> Config:
    return Config(
        strategy=StrategyConfig("ring"),
        model=sized(**SIZES),
        mesh=MeshConfig(1, 1, 1, ring),
        world_size=ring,
        seq_len=seq_len,
        documents=documents,
        attention=AttentionConfig(window=window),
        ring=RingConfig(layout, "needed"),
    )


# Where documents end.


def test_lengths_are_taken_in_turn_and_again_from_the_first(tmp_path):
    file = tmp_path / "lengths.txt"
    file.write_text("1 7\n8, 4 4\n")
    assert in_turn(str(file), 4, 8) == [[1, 7], [8], [4, 4], [1, 7]]
    assert in_turn(str(file), 2, 16) == [[1, 7, 8], [4, 4, 1, 7]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5 4", "lengths 1 to 2 add up to 9, and seq_len=8 ends within one of them; seq_len=5 would do"),
        ("8 9", "lengths 2 to 2 add up to 9, and seq_len=8 ends within one of them; seq_len=9 would do"),
        ("8 x", "'x' is no length"),
        ("8 0", "has a length below 1"),
        ("", "has no length"),
    ],
)
def test_lengths_that_do_not_fill_a_sequence_are_refused(tmp_path, text, says):
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    with pytest.raises(Invalid, match=says):
        in_turn(str(file), 2, 8)


@given(st.lists(st.booleans(), min_size=2, max_size=30))
def test_a_document_begins_after_the_token_that_ends_one(ends):
    begin = after(np.array([ends]))[0]
    for token in range(len(ends)):
        earlier = [t for t in range(token) if ends[t]]
        assert begin[token] == (earlier[-1] + 1 if earlier else 0)


def test_last_tokens_of_documents_have_no_label():
    config = replace(Config(seq_len=6), documents=DocumentsConfig("eos", eos=9))
    tokens = np.array([[1, 9, 1, 9, 9, 1], [1, 1, 1, 1, 1, 9]])
    ended = without_label(config, mask_of(config, tokens), tokens)
    assert (ended == (tokens == 9)).all()  # and the first sequence's last document may go on
    mask = Mask(begins([[1, 5], [6]]))
    packed = replace(config, documents=DocumentsConfig("lengths"))
    assert without_label(packed, mask, tokens).tolist() == [[True, *[False] * 4, True], [*[False] * 5, True]]


def test_a_histogram_is_drawn_with_a_seed_and_fills_every_sequence():
    path = SHIPPED
    low, high, share = histogram(path)
    assert (low[1:] == high[:-1]).all()
    assert (share > 0).any()
    rows = drawn(path, 3, 100_000, seed=0)
    assert [sum(row) for row in rows] == [100_000] * 3
    assert rows == drawn(path, 3, 100_000, seed=0) != drawn(path, 3, 100_000, seed=1)
    many = np.concatenate([row[:-1] for row in drawn(path, 1, 2**24, seed=0)])
    counted = np.histogram(many, [*low, high[-1]])[0] / len(many)
    assert np.abs(counted - share / share.sum()).max() < 0.02


# Who needs whose keys.


def needed(config: Config) -> list[int]:
    """By hand, in contiguous parts of m tokens: from where the document of a rank's first token begins, or W - 1."""
    m = config.seq_len // config.world_size
    begin = mask_of(config).begin(np.arange(config.seq_len))
    far = config.attention.window or config.seq_len + 1
    return [sum(int(min(r * m - row[r * m], far - 1)) for row in begin) for r in range(config.world_size)]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=64, max_size=64),
    ring=st.sampled_from([2, 4, 8]),
    window=st.none() | st.integers(1, 70),
)
def test_needed_keys_are_those_of_the_formula(lengths, ring, window):
    total, row = 0, []
    for length in lengths:
        row.append(min(length, 64 - total))
        total += row[-1]
        if total == 64:
            break
    config = of_ring(ring, 64, "contiguous", DocumentsConfig(), window)
    mask = Mask(begins([row]), window)
    (found,) = seen.seen(config, mask, 0)
    m = 64 // ring
    first = mask.begin(np.arange(64))[0][::m]
    far = window or 65
    expected = [min(r * m - first[r], far - 1) for r in range(ring)]
    assert found.received.tolist() == expected
    assert found.sent.sum() == sum(expected)
    assert found.pairs.sum() == mask.seen(np.arange(64)).sum()


def counted(rank: int, case: Case, batch_size: int) -> tuple[dict[str, float], int]:
    """What a rank exchanges around the ring in each phase, and its FLOPs."""
    observed = instruments.observed(*instruments.train(case, SIZES, batch_size, 64))
    sent: dict[str, float] = {}
    for entry in observed.comm:
        if entry.axis == "ring":
            assert entry.kind == "all_to_all"
            sent[entry.phase] = sent.get(entry.phase, 0.0) + entry.sent_bytes
    return sent, observed.flops


@pytest.mark.parametrize(("documents", "window"), [(True, None), (True, 11), (False, 21), (False, None)])
def test_each_rank_sends_what_others_need_and_gets_it_back_as_gradients(documents, window):
    """2 b H d_k e forward in all, H of each rank by the formula; in backward that again, and each rank's own H back."""
    case = Case("ring", ring=4, layout="contiguous", kv="needed", documents=documents, window=window)
    config = config_of(case, SIZES, 3, 64)
    found = on_ranks(4, counted, case, 3)
    of_key = 2 * 4 * 8 * 4  # k and v of 4 kv heads of 8 numbers in fp32
    rows = 1 if mask_of(config).alike else 3
    keys = [n * 3 // rows for n in needed(config)]
    forward = [sent.get("forward", 0) for sent, _ in found]
    assert sum(forward) == of_key * sum(keys)
    backward = [sent.get("backward", 0) for sent, _ in found]
    assert backward == [there + of_key * back for there, back in zip(forward, keys, strict=True)]
    for rank, (_, flops) in enumerate(found):
        lines = [line for line in predicted(config, rank) if line.axis == "ring"]
        for phase, there in (("forward", forward), ("backward", backward)):
            assert sum(line.bytes for line in lines if line.phase == phase) == there[rank]
        assert not [wrong for wrong in differences(config, rank, [], flops) if "FLOP" in wrong]


def test_flops_of_the_whole_square_are_no_documents():
    """Who computes what a mask hides is found out."""
    case = Case("ring", ring=4, documents=True)
    config = config_of(case, SIZES, 2, 64)
    plain = on_ranks(4, counted_plain, case)[0]
    assert any("FLOP were derived" in wrong for wrong in differences(config, 0, [], plain))


def counted_plain(rank: int, case: Case) -> int:
    return instruments.observed(*instruments.train(replace(case, documents=False), SIZES, 2, 64)).flops


# How even it is.


def sent_of_rotate(ring: int, sequences: int) -> float:
    """What needed sends in forward over what a ring does, in so many sequences of the histogram."""
    config = replace(of_ring(ring, 8192 * ring, "contiguous", HISTOGRAM), batch_size=sequences)
    (found,) = seen.seen(config, mask_of(config), 0)
    return found.sent.sum() / (sequences * ring * (ring - 1) * 8192)


def test_needed_sends_less_than_a_tenth_of_what_rotate_sends():
    assert sent_of_rotate(8, 100) < 0.1
    assert sent_of_rotate(64, 10) < 0.1


@pytest.mark.parametrize("ring", [8, 64])
def test_balanced_is_even_where_contiguous_is_not(ring):
    """8K tokens a rank of the histogram that ships."""
    seq_len, work = 8192 * ring, {}
    for layout in ("contiguous", "zigzag", "balanced"):
        config = of_ring(ring, seq_len, layout, HISTOGRAM)
        mask = mask_of(config)
        work[layout] = seen.work_max_by_mean(config, mask)
        if layout == "balanced":
            dealt = deal(mask, seq_len, ring, config.ring)
            assert sorted(dealt.flatten()) == list(range(8 * ring))
    assert work["balanced"] <= 1.05
    assert work["contiguous"] > 2


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("dp", "batch_size", "micro_batches"), [(1, 3, 1), (2, 3, 1), (4, 2, 1), (2, 4, 2)])
def test_how_even_the_causal_mask_is_by_formula_and_token_by_token(layout, dp, batch_size, micro_batches):
    config = replace(
        of_ring(4, 64, layout, DocumentsConfig()),
        ring=RingConfig(layout),
        mesh=MeshConfig(dp, 1, 1, 4),
        world_size=4 * dp,
        batch_size=batch_size,
        micro_batches=micro_batches,
    )
    assert work_max_by_mean(config, PLAIN) == pytest.approx(seen.work_max_by_mean(config, PLAIN), rel=1e-12)
