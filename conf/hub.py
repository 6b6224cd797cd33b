"""A model's folder: one that is here, or that of a repository of the Hugging Face hub, downloaded or in its cache.

model.path stays the name, so that a row's command is good elsewhere; huggingface_hub knows where its files are, and
takes its own variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, ...).
"""

import re
from functools import cache
from pathlib import Path

from conf.files import FileFault, check_path

SIZES, TOKENIZER = ("config.json",), ("tokenizer.json",)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # ORG/NAME
COMMIT = 7  # letters of it, as GitHub shows


def by_name(path: str) -> bool:
    """Is it no folder here, but what could be a repository's name?"""
    check_path(path)
    return re.fullmatch(NAME, path) is not None and not Path(path).exists()


def folder(path: str, files: tuple[str, ...] = SIZES) -> str:
    """Where a model's files are, of which these are wanted: asked for where there is a network. Raises FileFault."""
    return fetched(path, files, False) if by_name(path) else path


def folder_here(path: str) -> str:
    """The same for ranks, which ask nobody: what the parent has fetched is in the cache."""
    return fetched(path, SIZES, True) if by_name(path) else path


def commit(path: str) -> str:
    """Of a repository's folder in the cache."""
    return Path(path).name[:COMMIT]


@cache
def fetched(name: str, files: tuple[str, ...], from_cache: bool) -> str:
    absent = f"{name}: no such folder"
    try:
        from huggingface_hub import errors, snapshot_download
    except ModuleNotFoundError:
        raise FileFault(
            f"{absent}, and a name on the Hugging Face hub needs the package huggingface_hub; "
            "pip install huggingface_hub would do"
        ) from None
    try:
        return snapshot_download(name, allow_patterns=list(files), local_files_only=from_cache)
    except errors.GatedRepoError:
        raise FileFault(
            f"{name}: its authors want to be asked; their page on huggingface.co, and then hf auth login, would do"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise FileFault(f"{absent}, and no such model on the Hugging Face hub that {who()} may see") from None
    except errors.LocalEntryNotFoundError:  # where the hub is not reached, the cache is asked
        raise FileFault(f"{absent}, not in the Hugging Face cache, and the hub is not reached") from None
    except OSError as error:
        raise FileFault(f"{name}: not downloaded ({in_short(error)})") from None


def data_set_here(name: str) -> str:
    """The folder of a data set that was downloaded as a whole (hf download). Raises OSError where it was not."""
    from huggingface_hub import errors, snapshot_download

    try:
        return snapshot_download(name, repo_type="dataset", local_files_only=True)
    except errors.LocalEntryNotFoundError:
        raise OSError("no such folder, not in the Hugging Face cache, and the hub is not reached") from None


def who() -> str:
    from huggingface_hub import get_token

    return "this login" if get_token() else "one who is not logged in (hf auth login)"


def in_short(error: Exception) -> str:
    """The first line of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
