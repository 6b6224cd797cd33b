"""Clusters' files: which of conf/cluster/ a device is, and cluster=FILE, one of the user's own like them."""

import json
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from conf.clock import Clock
from conf.files import FileFault, read_yaml
from conf.groups import HERE
from conf.keys import MISSING, ClusterConfig, made
from conf.words import Invalid, one_of

ENDINGS = (".yaml", ".yml")


def is_file(word: str) -> bool:
    """Does a cluster's name mean a file, and none of conf/cluster/?"""
    return "/" in word or word.endswith(ENDINGS)


def offer(path: str) -> None:
    """Let Hydra choose it: to Hydra a path is a group within a group. Raises Invalid."""
    *folders, name = [part for part in path.split("/") if part]
    store = ConfigStore.instance()
    store.store(group="/".join(["cluster", *folders]), name=name, node=described(path), package="cluster")


@cache
def of_device(device_name: str) -> dict[str, Any] | None:
    """The file of conf/cluster/ for a GPU, by what the driver calls it; None for what is none of them."""
    files = (read_yaml(file) for file in sorted((HERE / "cluster").glob("*.yaml")))
    return next((known for known in files if any(name in device_name for name in known["device_names"])), None)


def described(path: str) -> dict[str, Any]:
    """What the file says of a cluster: all that is needed, and nothing unknown. Raises Invalid."""
    where = f"cluster={path}"
    try:
        values = read_yaml(Path(path))
    except FileFault as fault:
        raise Invalid(f"cluster: {fault}") from None
    known = {each.name: each for each in fields(ClusterConfig)}
    for name in values:
        if name not in known:
            raise Invalid(one_of(where, name, known))
    needed = [name for name, each in known.items() if each.default in (MISSING, NO_DEFAULT)]
    if absent := [name for name in needed if name not in values]:
        raise Invalid(f"{where}: {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing")
    try:
        made(ClusterConfig, values)
    except Invalid as fault:
        raise Invalid(f"{where}: {fault}") from None
    if isinstance(values.get("clock"), Mapping):
        Clock.of(values["clock"], path)
    return json.loads(json.dumps(values))  # numbers of ranks, which are names there, as a record will have them
