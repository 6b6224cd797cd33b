"""Tokens. Sample s of a run reads tokens s * seq_len to s * seq_len + seq_len, inputs and shifted labels together."""

import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from conf.keys import Config
from conf.words import Invalid

IGNORED = -100  # a token that is not to be learnt: not counted as a label, read as token 0 as an input


class RandomTokens:
    """An endless stream of uniform tokens; block s of seq_len tokens depends on (seed, s) alone."""

    size = math.inf

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.vocab_size, self.seed = vocab_size, seed

    def block(self, s: int, seq_len: int) -> np.ndarray:
        return np.random.default_rng([self.seed, s]).integers(self.vocab_size, size=seq_len)

    def sample(self, s: int, seq_len: int) -> np.ndarray:
        return np.concatenate([self.block(s, seq_len), self.block(s + 1, seq_len)[:1]])


class StoredTokens:
    """Tokens in an array, in memory or on disk."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.size = tokens, len(tokens)

    def sample(self, s: int, seq_len: int) -> np.ndarray:
        return self.tokens[s * seq_len : s * seq_len + seq_len + 1].astype(np.int64)


def needed(config: Config) -> int:
    """How many tokens a run reads."""
    return (config.warmup + config.steps) * config.batch_size * config.seq_len + 1


def load(config: Config) -> RandomTokens | StoredTokens:
    """The source that the configuration names. Of the tokens that it needs, all are below vocab_size, or Invalid."""
    name, path, vocab_size = config.data.name, config.data.path, config.model.vocab_size
    if name == "random":
        return RandomTokens(vocab_size, config.seed)
    tokens = read_text(path, needed(config)) if name == "text" else read_array(path)
    used = tokens[: needed(config)]
    highest, lowest = int(used.max(initial=0)), int(used[used != IGNORED].min(initial=0))
    if highest >= vocab_size or lowest < 0:
        raise Invalid(
            f"data={name} has tokens from {lowest} to {highest}, and model.vocab_size={vocab_size} allows 0 to "
            f"{vocab_size - 1}"
        )
    return StoredTokens(tokens)


def check(config: Config) -> None:
    """Are there as many tokens as the run needs? Raises Invalid."""
    tokens = load(config)
    if tokens.size < needed(config):
        most = (int(tokens.size) - 1) // (config.batch_size * config.seq_len) - config.warmup
        would_do = f"steps={most}" if most > 0 else "a smaller seq_len"
        raise Invalid(
            f"steps={config.steps} needs {needed(config)} tokens, (warmup + steps) * batch_size * seq_len + 1, and "
            f"data={config.data.name} has {tokens.size}; {would_do} would do"
        )


def read_text(path: str | None, needed: int) -> np.ndarray:
    """The bytes of text files, one after the other, as far as needed."""
    parts, size = [], 0
    for file in text_files(path):
        parts.append(np.frombuffer(file.read_bytes(), np.uint8))
        size += len(parts[-1])
        if size >= needed:
            break
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def text_files(path: str | None) -> Iterator[Path]:
    """A file, every file below a folder, or by default the sources of Python's own standard library."""
    if path is None:
        library = Path(sysconfig.get_path("stdlib"))
        yield from sorted(library.glob("*.py"))
        yield from sorted(f for f in library.glob("*/**/*.py") if "site-packages" not in f.parts)
    elif Path(path).is_file():
        yield Path(path)
    elif Path(path).is_dir():
        yield from sorted(f for f in Path(path).rglob("*") if f.is_file())
    else:
        raise Invalid(f"data.path={path}: no such file or folder")


def read_array(path: str | None) -> np.ndarray:
    """A 1-D integer .npy file, left on disk."""
    if path is None:
        raise Invalid("data.path is missing: data=tokens reads a 1-D integer .npy file")
    try:
        tokens = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise Invalid(f"data.path={path}: cannot be read as .npy ({error})") from None
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise Invalid(f"data.path={path}: {tokens.ndim}-D {tokens.dtype}, and 1-D integers are needed")
    return tokens
