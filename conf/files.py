"""Files and folders that a key names: what can be read, and what can be written, asked before anything is."""

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.words import Invalid

PROBE = 1 << 16  # bytes that there must be room for
LARGEST_JSON = 64 << 20  # bytes; the index of a model of a thousand layers has 1 MB
LARGEST_YAML = 1 << 20  # bytes; what people write has some hundred lines


class FileFault(Invalid):
    """What is wrong with a file or a folder, in one sentence that names it."""


def status(path: str | Path) -> os.stat_result:
    """os.stat of what is there. Raises FileFault."""
    check_path(path)
    try:
        return os.stat(path)
    except OSError as error:
        raise FileFault(f"{path}: {error.strerror}") from None


def check_path(path: str | Path) -> None:
    """Can this name a file at all?"""
    try:
        parts = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:
        raise FileFault(f"{path}: no path (it has a character that is none)") from None
    if b"\0" in b"".join(parts):
        raise FileFault(f"{path}: no path (it has a NUL)")
    if not any(parts) and not str(path).startswith("/"):
        raise FileFault("'' is no path; . is the folder in which this runs")
    if max(map(len, parts)) > 255 or sum(map(len, parts)) + len(parts) > 4000:  # Linux' limits, and room for names
        raise FileFault(f"{path}: File name too long")


def size_of(file: str | Path) -> int:
    """How many bytes a regular file has. Raises FileFault for what is not there, and for pipes, devices and folders."""
    found = status(file)
    if not stat.S_ISREG(found.st_mode):
        raise FileFault(f"{file}: a {'folder' if stat.S_ISDIR(found.st_mode) else 'device'}, and a file is needed")
    if not os.access(file, os.R_OK):
        raise FileFault(f"{file}: Permission denied")
    return found.st_size


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file holds: names and their values. Raises FileFault."""
    if size_of(file) > LARGEST_JSON:
        raise FileFault(f"{file}: larger than {LARGEST_JSON >> 20} MiB, which no such file is")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFault(f"{file}: {error.strerror}") from None
    except RecursionError:
        raise FileFault(f"{file}: not valid JSON (too many brackets inside one another)") from None
    except ValueError as error:
        raise FileFault(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise FileFault(f"{file}: holds a {type(content).__name__}, and an object, {{...}}, is needed")
    return content


def read_yaml(file: Path) -> dict[str, Any]:
    """What a YAML file holds, as Hydra would read it: names and their values. Raises FileFault."""
    if size_of(file) > LARGEST_YAML:
        raise FileFault(f"{file}: larger than {LARGEST_YAML >> 20} MiB, which no such file is")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise FileFault(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, AssertionError) as error:
        raise FileFault(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise FileFault(f"{file}: holds a {type(content).__name__}, and names with their values are needed")
    return content


def check_writable(folder: str | Path) -> None:
    """Could files be written in a folder, which may have to be made? Raises FileFault, and leaves nothing behind."""
    check_path(folder)
    there = Path(os.path.abspath(folder))
    while not os.path.lexists(there):
        there = there.parent
    if not stat.S_ISDIR(status(there).st_mode):
        raise FileFault(f"{folder}: {there} is no folder")
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(bytes(PROBE))
    except OSError as error:
        raise FileFault(f"{folder}: {there} cannot be written ({error.strerror})") from None
