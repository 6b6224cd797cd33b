"""Tokens. Sample s of a run reads tokens s * seq_len to s * seq_len + seq_len, inputs and shifted labels together."""

import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from bench.workloads import tokenized
from conf.documents import mask_of
from conf.files import FileFault, size_of, status
from conf.keys import Config
from conf.mask import Mask
from conf.words import Invalid

IGNORED = -100  # a token that is not to be learnt: not counted as a label, read as token 0 as an input
FORESEEN = 1 << 22  # tokens that are looked at before a run; each is when it is read
MOST_FILES = 20_000  # of a folder of text


class RandomTokens:
    """An endless stream of uniform tokens; block s of seq_len tokens depends on (seed, s) alone."""

    size = math.inf

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.vocab_size, self.seed = vocab_size, seed

    def block(self, s: int, seq_len: int) -> np.ndarray:
        return np.random.default_rng([self.seed, s]).integers(self.vocab_size, size=seq_len)

    def sample(self, s: int, seq_len: int) -> np.ndarray:
        return np.concatenate([self.block(s, seq_len), self.block(s + 1, seq_len)[:1]])


@dataclass
class Part:
    """`size` tokens, from a byte of a file on."""

    file: Path
    offset: int
    size: int


class StoredTokens:
    """Tokens in files, one file after the other. What a sample needs is read, and is below vocab_size, or Invalid."""

    def __init__(self, config: Config, parts: list[Part], dtype: np.dtype) -> None:
        self.name, self.vocab_size = config.data.name, config.model.vocab_size
        self.parts, self.dtype = parts, dtype
        self.size = sum(part.size for part in parts)

    def sample(self, s: int, seq_len: int) -> np.ndarray:
        return self.read(s * seq_len, s * seq_len + seq_len + 1).astype(np.int64)

    def read(self, start: int, stop: int) -> np.ndarray:
        pieces = [np.empty(0, self.dtype)]
        for part in self.parts:
            first, last = max(0, start), min(stop, part.size)
            if first < last:
                pieces.append(self.piece(part, first, last - first))
            start, stop = start - part.size, stop - part.size
        found = np.concatenate(pieces)
        highest, lowest = int(found.max(initial=0)), int(found[found != IGNORED].min(initial=0))
        if highest >= self.vocab_size or lowest < 0:
            raise Invalid(
                f"data={self.name} has tokens from {lowest} to {highest}, and model.vocab_size={self.vocab_size} "
                f"allows 0 to {self.vocab_size - 1}"
            )
        return found

    def piece(self, part: Part, first: int, size: int) -> np.ndarray:
        try:
            found = np.fromfile(part.file, self.dtype, size, offset=part.offset + first * self.dtype.itemsize)
        except OSError as error:
            raise FileFault(f"{part.file}: cannot be read ({error.strerror or error})") from None
        if len(found) < size:
            raise FileFault(f"{part.file}: is shorter than it says")
        return found


Source = RandomTokens | StoredTokens


def samples(source: Source, step: int, config: Config) -> np.ndarray:
    """[B, S + 1]: of one step."""
    first = step * config.batch_size
    return np.stack([source.sample(first + b, config.seq_len) for b in range(config.batch_size)])


def last_step(config: Config) -> int:
    """The one that is counted: where documents end by tokens, each step has others."""
    return config.warmup + config.steps - 1


def mask_of_step(config: Config) -> Mask:
    """Which tokens see each other in the step that is counted."""
    by_tokens = config.documents.name == "eos"
    return mask_of(config, samples(load(config), last_step(config), config)[:, :-1] if by_tokens else None)


def needed(config: Config) -> int:
    """How many tokens a run reads."""
    return (config.warmup + config.steps) * config.batch_size * config.seq_len + 1


def load(config: Config) -> Source:
    """The source that the configuration names. Raises Invalid."""
    if config.data.name == "random":
        return RandomTokens(config.model.vocab_size, config.seed)
    if config.data.name == "text":
        return StoredTokens(config, text(config.data.path, needed(config)), np.dtype(np.uint8))
    if config.data.name == "hf":
        return StoredTokens(config, *array(tokenized.tokens_of(config.data, str(config.model.path), needed(config))))
    if config.data.path is None:
        raise Invalid("data.path is missing: data=tokens reads a 1-D integer .npy file")
    return StoredTokens(config, *array(Path(config.data.path)))


def check(config: Config) -> None:
    """Are there as many tokens as the run needs? Raises Invalid."""
    if config.data.name == "hf":
        tokenized.renewed(config.data, str(config.model.path), needed(config))
    try:
        tokens = load(config)
        if isinstance(tokens, StoredTokens):
            tokens.read(0, min(needed(config), FORESEEN))
    except FileFault as fault:
        raise Invalid(f"data.path: {fault}") from None
    if not tokens.size:
        raise Invalid(f"data.path={config.data.path} is empty; {needed(config)} tokens are needed")
    if tokens.size < needed(config):
        most = (int(tokens.size) - 1) // (config.batch_size * config.seq_len) - config.warmup
        would_do = f"steps={most}" if most > 0 else "a smaller seq_len"
        raise Invalid(
            f"steps={config.steps} needs {needed(config)} tokens, (warmup + steps) * batch_size * seq_len + 1, and "
            f"data={config.data.name} has {tokens.size}; {would_do} would do"
        )


def text(path: str | None, needed: int) -> list[Part]:
    """Text files, as far as needed."""
    parts, size = [], 0
    for file in text_files(path):
        parts.append(Part(file, 0, size_of(file)))
        size += parts[-1].size
        if size >= needed:
            break
    return [part for part in parts if part.size]


def text_files(path: str | None) -> Iterator[Path]:
    """A file, every file below a folder, or by default the sources of Python's own standard library."""
    if path is None:
        library = Path(sysconfig.get_path("stdlib"))
        yield from sorted(library.glob("*.py"))
        yield from sorted(f for f in library.glob("*/**/*.py") if "site-packages" not in f.parts)
        return
    try:
        status(path)
    except FileFault:
        raise Invalid(f"data.path={path}: no such file or folder") from None
    if not Path(path).is_dir():
        yield Path(path)
        return
    for seen, file in zip(count(), below(Path(path)), strict=False):
        if seen == MOST_FILES:
            raise Invalid(f"data.path={path}: has more than {MOST_FILES} files; a folder or a file in it would do")
        yield file


def below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, sorted, found as they are asked for."""
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        try:
            if path.is_dir() and (path == folder or not path.is_symlink()):
                waiting += sorted(path.iterdir(), reverse=True)
            elif path.is_file():
                yield path
        except OSError as error:
            raise FileFault(f"{path}: {error.strerror}") from None


def array(file: Path) -> tuple[list[Part], np.dtype]:
    """What a 1-D integer .npy file holds: where, and of which type."""
    size = size_of(file)
    try:
        with open(file, "rb") as content:
            if (version := npy.read_magic(content)) != (1, 0):  # others are for headers that no array of numbers has
                raise ValueError(f"version {version}")
            shape, _, dtype = npy.read_array_header_1_0(content)
            offset = content.tell()
    except Exception as error:  # of a parser that was given anything
        raise FileFault(f"{file}: cannot be read as .npy ({error})") from None
    if dtype.hasobject:
        raise FileFault(f"{file}: an array of Python objects, which can run any code, and 1-D integers are needed")
    if len(shape) != 1 or dtype.kind not in "iu":
        raise FileFault(f"{file}: {len(shape)}-D {dtype}, and 1-D integers are needed")
    if not 0 <= shape[0] * dtype.itemsize <= size - offset:
        raise FileFault(f"{file}: is shorter than it says")
    return [Part(file, offset, shape[0])], dtype
