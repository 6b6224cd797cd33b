"""What passes between the parent and the ranks of a configuration, beside what they measure."""

from dataclasses import dataclass

from conf.keys import Config
from conf.measurement import Rank


@dataclass(frozen=True)
class Task:
    """A resolved configuration to run."""

    config: Config
    traces: str = ""  # the folder in which ranks leave theirs
    silent: bool = False  # collectives return at once
    known: bool = False  # of mode=simulate: two depths are enough (bench/simulation/simulate.py)

    @property
    def processes(self) -> int:
        """How many run at the same time on this machine's cores."""
        launch, world_size = self.config.launch, self.config.world_size
        if self.config.mode != "real":
            return 1
        return min(world_size, launch.ranks_per_host or world_size) if launch.name == "torchrun" else world_size


@dataclass(frozen=True)
class Meeting:
    """Where ranks meet: in a file of this machine, or at a store that several hosts reach, by this network interface.

    Nothing listens on any other interface: of one machine it is the loopback device.
    """

    interface: str
    file: str = ""
    store: tuple[str, int] = ("", 0)  # host and port
    prefix: str = ""  # of this configuration's keys there


@dataclass(frozen=True)
class Ready:
    """The first word of a rank: it runs, and answers when it is asked for its stack."""


class HostLost(RuntimeError):
    """A host of the sweep is gone: nothing more can be launched."""


@dataclass
class Failure:
    """How a rank ended that has not measured."""

    message: str
    oom: bool = False
    echo: bool = False  # of another rank's end
    traceback: str = ""


@dataclass
class Outcome:
    """How a configuration ended: status ok, oom, timeout or error; the measurements of every rank if ok."""

    status: str
    reason: str
    ranks: list[Rank]
    traceback: str = ""
    seconds: float | None = None
    echo: bool = False  # of the end of ranks elsewhere
    lost: bool = False  # a host, and with it the rest of the sweep
