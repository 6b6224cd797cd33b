"""The strategies, in the order in which to read them."""

from strategies.odysseus import Odysseus
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
