"""The strategies, a file each. conf/meshes.py lists them in the order in which to read them."""

from importlib import import_module

from conf.meshes import PEERS
from strategies.base import Options, Strategy
from strategies.ops.mesh import Mesh


def load(name: str) -> type[Strategy]:
    """The class that strategies/<name>.py defines, or strategies/peers/<name>.py."""
    module = import_module(f"strategies.peers.{name}" if name in PEERS else f"strategies.{name}")
    classes = [found for found in vars(module).values() if isinstance(found, type) and issubclass(found, Strategy)]
    return next(found for found in classes if found.__module__ == module.__name__)


def build(
    name: str, degrees: dict[str, int], options: Options, device: str = "cpu", placement: str = "ulysses_inner"
) -> Strategy:
    """This rank's side of a strategy, on a mesh of as many ranks as the default process group has."""
    return load(name)(Mesh.build(device, **degrees, placement=placement, inner=options.ring.inner), options)
