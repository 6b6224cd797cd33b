"""Where documents end that are packed into the sequences of a step. No torch; tokens are given where they decide.

Of documents=lengths and histogram every step has the same, so that its times, bytes and FLOPs are those of one mask.
Of documents=eos they are the tokens', and what is counted is the last step's.
"""

import csv
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from conf.files import FileFault, size_of
from conf.keys import Config
from conf.mask import PLAIN, Mask, begins
from conf.words import Invalid

HISTOGRAM = Path(__file__).parent / "lengths" / "prolong64k.csv"
LARGEST = 1 << 24  # bytes of a file of lengths


def mask_of(config: Config, tokens: Any = None) -> Mask:
    """Of the sequences of a step, of whose tokens [B, S] documents=eos asks. Raises Invalid."""
    documents, window = config.documents, config.attention.window
    if documents.name == "none":
        return PLAIN if window is None else windowed(window)
    if documents.name == "eos":
        return Mask(once(after(tokens == documents.eos)), window)
    return packed(documents.name, documents.path, config.batch_size, config.seq_len, config.seed, window)


@lru_cache
def windowed(window: int) -> Mask:
    return Mask(window=window)


@lru_cache(4)
def packed(name: str, path: str | None, batch_size: int, seq_len: int, seed: int, window: int | None) -> Mask:
    if name == "lengths":
        lengths = in_turn(str(path), batch_size, seq_len)
    else:
        lengths = drawn(Path(path) if path else HISTOGRAM, batch_size, seq_len, seed)
    return Mask(once(begins(lengths)), window)


def once(begins: np.ndarray) -> np.ndarray:
    """One row, if all are alike."""
    return begins[:1] if (begins == begins[:1]).all() else begins


def after(ends: np.ndarray) -> np.ndarray:
    """[B, S]: of each token, where its document begins, if these tokens are the last of theirs."""
    starts = np.zeros(ends.shape, np.int64)
    starts[:, 1:] = np.where(ends[:, :-1], np.arange(1, ends.shape[1]), 0)
    return np.maximum.accumulate(starts, axis=1)


def without_label(config: Config, mask: Mask, tokens: np.ndarray) -> np.ndarray:
    """[B, S]: the last tokens of documents, after which nothing of theirs comes.

    The last of a sequence is one, unless its document may go on: where nothing says that it ends there.
    """
    n, begin = config.seq_len, mask.begin(np.arange(config.seq_len))
    last = np.zeros(begin.shape, bool)
    last[:, :-1] = begin[:, 1:] == np.arange(1, n)
    last = np.broadcast_to(last, tokens.shape).copy()
    last[:, -1] = tokens[:, -1] == config.documents.eos if config.documents.name == "eos" else True
    return last


def in_turn(path: str, batch_size: int, seq_len: int) -> list[list[int]]:
    """documents=lengths: the next lengths that fill a sequence; after the last comes the first again."""
    lengths = read(path)
    sequences: list[list[int]] = []
    at = 0
    while len(sequences) < batch_size:
        row: list[int] = []
        while (has := sum(row)) < seq_len:
            row.append(lengths[at % len(lengths)])
            at += 1
        if has > seq_len:
            first, last = at - len(row) + 1, at
            fits = has - row[-1]
            raise Invalid(
                f"documents.path={path}: lengths {first} to {last} add up to {has}, and seq_len={seq_len} ends within "
                f"one of them; seq_len={fits or has} would do"
            )
        sequences.append(row)
    return sequences


def read(path: str) -> list[int]:
    """A text of lengths."""
    words = text(path).replace(",", " ").split()
    try:
        lengths = [int(word) for word in words]
    except ValueError:
        wrong = next(word for word in words if not word.isdecimal())
        raise Invalid(f"documents.path={path}: {wrong[:20]!r} is no length; whole numbers would do") from None
    if not lengths or min(lengths) < 1:
        raise Invalid(f"documents.path={path}: has {'a length below 1' if lengths else 'no length'}; 512 512 would do")
    return lengths


def drawn(path: Path, batch_size: int, seq_len: int, seed: int) -> list[list[int]]:
    """documents=histogram: one after the other until a sequence is full, of which the last is cut there.

    A bin of the histogram is drawn by its share, and a length in it evenly by its logarithm: the longer, the rarer.
    """
    low, high, share = histogram(path)
    sequences = []
    for b in range(batch_size):
        random = np.random.default_rng([seed, b])
        row: list[int] = []
        while (left := seq_len - sum(row)) > 0:
            at = random.choice(len(share), p=share / share.sum())
            row.append(min(left, int(low[at] * (high[at] / low[at]) ** random.random())))
        sequences.append(row)
    return sequences


def histogram(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each bin its shortest length, the one that is too long for it, and the share of documents that are in it."""
    lines = text(str(path)).splitlines()
    try:
        rows = [tuple(float(row[name]) for name in ("low", "high", "share")) for row in csv.DictReader(lines)]
        low, high, share = np.array(rows).T
    except (KeyError, ValueError, TypeError):
        raise Invalid(f"documents.path={path}: is no table of low,high,share; {HISTOGRAM.name} is one") from None
    if (low < 1).any() or (high <= low).any() or (share < 0).any() or share.sum() <= 0:
        raise Invalid(f"documents.path={path}: a bin goes from low >= 1 to below high, with a share >= 0")
    return low.astype(np.int64), high.astype(np.int64), share


def text(path: str) -> str:
    try:
        if size_of(Path(path)) > LARGEST:
            raise Invalid(f"documents.path={path}: is larger than {LARGEST} bytes, and a list of lengths would do")
        return Path(path).read_text(encoding="utf-8")
    except FileFault as fault:
        raise Invalid(f"documents.path: {fault}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"documents.path={path}: cannot be read ({error})") from None
