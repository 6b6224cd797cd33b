"""What passes between the parent and the ranks of a configuration, beside what they measure."""

from dataclasses import dataclass

from conf.keys import Config


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
        return self.config.world_size if self.config.mode == "real" else 1


@dataclass
class Failure:
    """How a rank ended that has not measured."""

    message: str
    oom: bool = False
    echo: bool = False  # of another rank's end
    traceback: str = ""
