"""Every way in which a process is asked to end is answered as Ctrl-C is: what is finished stays, nothing is left."""

import signal
import sys
from types import FrameType
from typing import NoReturn

from bench.ranks.launch import Interrupted, interrupted

ASKED = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Asked(Interrupted):
    """Interrupted by a signal that is not Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


def heed() -> None:
    """End in order when asked to. What is ignored already, as SIGHUP is under nohup, stays so."""
    for number in ASKED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end_in_order)


def end_in_order(number: int, frame: FrameType | None) -> NoReturn:
    for each in ASKED:
        signal.signal(each, signal.SIG_IGN)  # once is enough
    interrupted.set()
    raise Asked(number)


def leave(error: KeyboardInterrupt) -> NoReturn:
    """End with the exit status that shells expect."""
    sys.exit(128 + (error.number if isinstance(error, Asked) else signal.SIGINT))
