"""data=hf: texts of a data set, read by the model's tokenizer one after the other, each with a token at its end.

A command reads as many as its run needs, as they come, and leaves them in ~/.cache as a .npy, where its ranks look.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from conf import hub
from conf.files import FileFault, size_of
from conf.huggingface import read_end
from conf.keys import DataConfig
from conf.words import Invalid, one_of

AT_ONCE = 64  # texts
PACKAGES = ("datasets", "tokenizers")


def tokens_of(data: DataConfig, model: str, needed: int) -> Path:
    """The .npy of `needed` tokens or a few more, or of all that there are: for ranks, as the parent has left it."""
    file = place(data, model, needed)
    return file if file.exists() else written(file, data, model, needed)


def renewed(data: DataConfig, model: str, needed: int) -> Path:
    """The same for the parent, which reads again, once: what was read for another command may have changed."""
    return once(json.dumps(vars(data)), model, needed)


@cache
def once(data: str, model: str, needed: int) -> Path:
    source = DataConfig(**json.loads(data))
    return written(place(source, model, needed), source, model, needed)


def place(data: DataConfig, model: str, needed: int) -> Path:
    """A file for each that can be asked for; folders by where they are."""
    names = [str(Path(path).resolve()) if Path(path).exists() else path for path in (str(data.path), model)]
    asked = json.dumps([*names, data.subset, data.split, data.column, needed])
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches, "sequence-parallelism-playground", f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.npy")


def written(file: Path, data: DataConfig, model: str, needed: int) -> Path:
    """Raises Invalid for what cannot be read, unless it is no longer reached and was read before."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise Invalid(f"data=hf needs the package {package}; pip install {package} would do")
    encode = encoder(model)
    try:
        tokens = first_of(map(encode, texts(data)), needed)
    except OSError as error:
        if hub.by_name(str(data.path)) and file.exists():
            return file
        raise Invalid(f"data.path={data.path}: {hub.in_short(error)}") from None
    save(file, tokens)
    return file


def first_of(documents: Iterable[list[int]], needed: int) -> np.ndarray:
    """Whole documents, one after the other, until there are as many tokens."""
    found, size = [np.empty(0, np.int32)], 0
    for tokens in documents:
        found.append(np.array(tokens, np.int32))
        size += len(tokens)
        if size >= needed:
            break
    return np.concatenate(found)


def encoder(model: str) -> Callable[[str], list[int]]:
    """What makes a document of a text, as the tokenizer does it for training, and ends it. Raises Invalid."""
    from tokenizers import Tokenizer

    try:
        folder = hub.folder(model, hub.SIZES + hub.TOKENIZER)
        end, file = read_end(folder), Path(folder, *hub.TOKENIZER)
        size_of(file)
    except FileFault as fault:
        raise Invalid(f"model.path: {fault}") from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # of a parser that was given anything, which raises nothing more special
        raise Invalid(f"model.path: {file}: no tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        tokens = tokenizer.encode(text).ids
        return tokens if tokens[-1:] == [end] else [*tokens, end]

    return encode


def texts(data: DataConfig) -> Iterator[str]:
    """Those that are there, in their order, none of which is read before it is asked for."""
    opened = open_stream(data)
    known = opened.column_names or list(next(iter(opened), {}))
    if data.column not in known:
        raise Invalid(one_of("data.column", data.column, known))
    for batch in opened.select_columns([data.column]).iter(AT_ONCE):
        for text in batch[data.column]:
            if not isinstance(text, (str, type(None))):
                raise Invalid(f"data.column={data.column} holds {type(text).__name__}, and text is needed")
            if text:
                yield text


def open_stream(data: DataConfig) -> Any:
    """A datasets.IterableDataset: of a folder, of the hub, of datasets' cache or of huggingface_hub's."""
    import datasets

    def load(path: str) -> Any:
        return datasets.load_dataset(path, data.subset, split=data.split, streaming=True)

    path = str(data.path)
    try:
        try:
            return load(path)
        except ConnectionError:
            return load(hub.data_set_here(path))
    except ValueError as error:  # of a subset or a split that is not there: it names those that are
        raise Invalid(f"data.path={path}: {' '.join(str(error).split())}") from None


def save(file: Path, tokens: np.ndarray) -> None:
    """Whole or not at all: other commands, and ranks on other hosts, may read and write the same."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as out:
            np.save(out, tokens)
        os.replace(out.name, file)
    except OSError as error:
        raise Invalid(f"data=hf: {error.filename or file}: {error.strerror}; XDG_CACHE_HOME=DIR would do") from None
