"""Streams of a device and what runs beside them, on a clock that is told how long everything takes.

A stream does one thing after the other, and stands still while it waits for a collective, for a copy or for another
stream. Each axis of the mesh has a lane, on which its collectives follow each other. What is read as "the step" is the
main stream.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from conf.measurement import Span


@dataclass
class Moment:
    """When something is done, in us, and what it waited for last: a kind of collective, offload, copies."""

    us: float = 0.0
    waited_for: str = "copies"


MAIN = "compute"
PLACES = "model"  # a lane that only says where in the model the main stream is


class Streams:
    """Every method is something that the code does, in the order in which it does it."""

    def __init__(self, call_us: float, ahead: bool, drawn: bool = False) -> None:
        self.call_us = call_us  # the host's time for a launch
        self.ahead = ahead  # does the host run ahead of the device, or is it the device
        self.drawn = drawn  # are spans kept
        self.host = 0.0
        self.moments: defaultdict[Hashable, Moment] = defaultdict(Moment)  # how far each stream and each lane is
        self.main = self.moments[MAIN]
        self.marks: dict[Hashable, Moment] = {}  # collectives in flight, by number, and recorded events
        self.work: defaultdict[str, float] = defaultdict(float)  # what the main stream did, in us
        self.exposed: defaultdict[str, float] = defaultdict(float)  # and what it waited for
        self.laps: defaultdict[str, float] = defaultdict(float)
        self.lap = "", 0.0
        self.place: tuple[str, float] | None = None
        self.tape: list[tuple[Callable, tuple]] | None = None
        self.spans: list[Span] = []

    def reach(self, part: str) -> None:
        """Forward, backward or the optimizer begins, or the step is over."""
        self.note(self.reach, part)
        name, since = self.lap
        self.laps[name] += self.main.us - since
        self.enter(part)
        self.lap = part, self.main.us

    def enter(self, place: str) -> None:
        """This part of the model begins."""
        if self.place:
            self.draw(PLACES, self.place[0], self.place[1], self.main.us - self.place[1])
        self.place = place, self.main.us

    def take(self, stream: Hashable, part: str, us: float) -> None:
        """An operation, once the host has launched it."""
        self.note(self.take, stream, part, us)
        if not self.ahead:
            self.spend(stream, part, us + self.call_us)
            return
        self.host += self.call_us
        self.spend(stream, "launches", max(0.0, self.host - self.moments[stream].us))
        self.spend(stream, part, us)

    def hosts(self, stream: Hashable, us: float) -> None:
        """The host has something to do of its own, before it launches what comes next."""
        self.note(self.hosts, stream, us)
        if self.ahead:
            self.host += us
        else:
            self.spend(stream, "launches", us)

    def launch(self, stream: Hashable, lane: Hashable, number: Hashable, kind: str, us: float) -> None:
        """A collective or a copy, beside the stream; it begins when the stream is there, and what is before it done."""
        self.note(self.launch, stream, lane, number, kind, us)
        begun = max(self.moments[stream].us, self.moments[lane].us)
        self.draw(lane, kind, begun, us)
        self.moments[lane] = self.marks[number] = Moment(begun + us, kind)

    def mark(self, number: Hashable, of: Hashable) -> None:
        """Remember how far a stream or a lane is."""
        self.note(self.mark, number, of)
        self.marks[number] = Moment(self.moments[of].us, self.moments[of].waited_for)

    def wait(self, stream: Hashable, number: Hashable) -> None:
        """A stream stands still until what is marked is done."""
        self.note(self.wait, stream, number)
        now, until = self.moments[stream], self.marks.get(number, Moment())
        if until.us > now.us:
            if now is self.main:
                self.exposed[until.waited_for] += until.us - now.us
                self.draw(MAIN, until.waited_for, now.us, until.us - now.us, waited=True)
            now.us, now.waited_for = until.us, until.waited_for

    @contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """What happens inside happens so often.

        A collective that was in flight before is waited for inside: when it happens again, that is the one which was
        launched inside the time before, and which nobody has waited for.
        """
        outer, self.tape = self.tape, []
        yield
        tape, self.tape = self.tape, outer
        if outer is not None:
            outer.extend(tape)
        if times == 1:
            return
        later, wait = carried(tape), self.wait
        again = [(act, (of[0], later.get(of[1], of[1])) if act == wait else of) for act, of in tape]
        for _ in range(times - 1):
            for act, arguments in again:
                act(*arguments)

    def note(self, act: Callable, *arguments: object) -> None:
        if self.tape is not None:
            self.tape.append((act, arguments))

    def draw(self, lane: Hashable, name: str, begun: float, us: float, waited: bool = False) -> None:
        if self.drawn:
            self.spans.append(Span(str(lane), name, begun, begun + us, waited))

    def spend(self, stream: Hashable, part: str, us: float) -> None:
        if not us:
            return
        now = self.moments[stream]
        self.draw(stream, part, now.us, us)
        now.us += us
        if now is self.main:
            self.work[part] += us


def carried(tape: list[tuple[Callable, tuple]]) -> dict[Hashable, Hashable]:
    """What is waited for and was launched before -> what is launched here and left in flight, in their order."""
    launched = [given[NUMBERED[act.__name__]] for act, given in tape if act.__name__ in NUMBERED]
    waited = [given[1] for act, given in tape if act.__name__ == "wait"]
    here, seen = set(launched), set(waited)
    before = [number for number in waited if isinstance(number, int) and number not in here]
    left = [number for number in launched if isinstance(number, int) and number not in seen]
    return dict(zip(before, left, strict=False))


NUMBERED = {"launch": 2, "mark": 0}  # which of their arguments is the number; streams and events are marked as objects
