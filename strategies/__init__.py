"""The strategies, in the order in which to read them."""

from collections import ChainMap

from strategies.base import Options, Strategy
from strategies.odysseus import Odysseus
from strategies.ops.mesh import Mesh
from strategies.peers import PEERS
from strategies.ring import Ring
from strategies.single import Single
from strategies.tp import TP
from strategies.tp_sp import TPSP
from strategies.tp_usp import TPUSP
from strategies.ulysses import Ulysses
from strategies.usp import USP
from strategies.zero import Zero

STRATEGIES = {
    "single": Single,
    "zero": Zero,
    "tp": TP,
    "tp_sp": TPSP,
    "ulysses": Ulysses,
    "ring": Ring,
    "usp": USP,
    "tp_usp": TPUSP,
    "odysseus": Odysseus,
}
ALL = ChainMap(PEERS, STRATEGIES)


def build(
    name: str, degrees: dict[str, int], options: Options, device: str = "cpu", placement: str = "ulysses_inner"
) -> Strategy:
    """This rank's side of a strategy, on a mesh of as many ranks as the default process group has."""
    return ALL[name](Mesh.build(device, **degrees, placement=placement), options)
