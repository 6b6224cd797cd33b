"""What is chosen by name: strategies, models, data, clusters, sweeps. Presets are the yaml files beside this one."""

from pathlib import Path

from conf import meshes
from conf.keys import keys

HERE = Path(__file__).parent
# group -> the key that it sets
CHOSEN = {
    "strategy": "strategy.name",
    "model": "model.name",
    "data": "data.name",
    "documents": "documents.name",
    "launch": "launch.name",
}
BY_CHOICES = ("data", "documents")  # groups that are no yaml files: the key's choices
OPEN = ("cluster", "sweep")  # groups of which none need be chosen


def options(group: str) -> list[str]:
    """What a group can be."""
    if group == "strategy":
        return sorted(meshes.names())
    if group in BY_CHOICES:
        return list(keys()[CHOSEN[group]].choices)
    none = ["none"] if group == "cluster" else []
    return none + sorted(file.stem for file in (HERE / group).glob("*.yaml"))


def written(path: str) -> str:
    """A key as it is written on the command line: the key that a group sets is the group."""
    return path.removesuffix(".name") if path in (*CHOSEN.values(), "cluster.name") else path
