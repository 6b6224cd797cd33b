"""Which faults strike which configurations of which sweeps: the same for the same seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice, product

from conf.meshes import STRATEGIES

STEPS = 2  # with one of warm-up
PATIENT_S, HANG_S = 300, 5  # timeout_s of a configuration that must end by itself, and of one that will not
PHASES = ("join", "build", "forward", "backward", "update")
COMMON = ("warmup=1", "name=faulty", "seq_len=64", "batch_size=4")
REPEATED = ("forward", "backward", "update")
SEVERAL = [name for name in STRATEGIES if name != "single"]
DEADLY = r"the process was killed by "


@dataclass(frozen=True)
class Kind:
    """A kind of fault: what the row must say of it, {rank} being the rank that it struck."""

    status: str
    reason: str
    phases: Sequence[str] = PHASES
    hangs: bool = False  # until timeout_s
    outside: bool | None = None  # is it done to a rank, or does the rank do it? None: as the dice fall
    alone: bool = True  # can it happen to one process?
    launchers: Sequence[str] = ("local", "torchrun")


# A collective that a rank skips or gives a wrong shape leaves the others waiting, or gloo tells one of them.
WAITS = r"timeout_s=.* is over; .*rank \d+ (is|was stopped) in "
MISMATCH = r"rank \d+: .*(enforce|size|shape|length|mismatch|bytes|SIGABRT|closed)"

KINDS = {
    "raise": Kind("error", r"rank {rank}: RuntimeError: this rank is faulty", outside=False),
    "sys.exit(3)": Kind("error", r"rank {rank}: SystemExit: 3", outside=False),
    "os._exit(0)": Kind("error", r"rank {rank}: the process ended with exit code 0 and no message", outside=False),
    "os._exit(3)": Kind("error", r"rank {rank}: the process ended with exit code 3 and no message", outside=False),
    "SIGKILL": Kind("error", rf"rank {{rank}}: {DEADLY}SIGKILL$"),
    # Not in select: a thread that waits for the parent to end is there.
    "SIGSEGV": Kind("error", rf"rank {{rank}}: {DEADLY}SIGSEGV in (?!select )\S+ \("),
    "SIGABRT": Kind("error", rf"rank {{rank}}: {DEADLY}SIGABRT in (?!select )\S+ \("),
    "SIGSTOP": Kind("timeout", r"timeout_s=.* is over; .*rank {rank} was stopped in ", hangs=True),
    "memory, RLIMIT_AS": Kind("oom", r"rank {rank}: ", outside=False),
    "memory, cgroup": Kind("oom", r"rank {rank}: killed by the kernel, which was out of memory", outside=False),
    "skipped collective": Kind("error|timeout", f"{WAITS}|{MISMATCH}", ("barrier",), True, False, alone=False),
    "wrong shape": Kind("error|timeout", f"{WAITS}|{MISMATCH}", ("forward", "backward"), True, False, alone=False),
    "closed pipe": Kind("error", r"rank {rank}: .*exit code 1 .*handle is closed", outside=False),
    "full disk": Kind("ok", "", outside=True),  # of the parent; measured when the same command is given again
    "host lost": Kind("error", r"host \S+: it no longer answers$", outside=True, alone=False, launchers=("torchrun",)),
}


@dataclass(frozen=True)
class Fault:
    """Strikes once, at this step and phase of this rank; from outside soon afterwards, while ranks go on for ever."""

    kind: str
    rank: int
    step: int
    phase: str
    outside: bool


@dataclass
class Sweep:
    """A sweep of STRATEGY x seed x timeout_s, and what strikes which of its configurations."""

    launcher: str
    strategies: Sequence[str]
    world_size: int
    seeds: Sequence[int]
    timeouts: Sequence[int]
    faults: dict[str, Fault] = field(default_factory=dict)

    @property
    def configurations(self) -> list[str]:
        """In the order in which they run."""
        return [named(*each) for each in product(self.strategies, self.seeds, self.timeouts)]

    @property
    def words(self) -> list[str]:
        """The command line that asks for it."""
        lists = {"strategy": self.strategies, "seed": self.seeds, "timeout_s": self.timeouts}
        words = [f"{name}={','.join(map(str, values))}" for name, values in lists.items()]
        return ["-m", *words, f"world_size={self.world_size}", f"steps={STEPS}", *COMMON]

    def __str__(self) -> str:
        kinds = ", ".join(fault.kind for fault in self.faults.values())
        return f"{self.launcher} · {','.join(self.strategies)} · world_size={self.world_size} · {kinds}"


def named(strategy: str, seed: int, timeout_s: float) -> str:
    return f"{strategy}-{seed}-{timeout_s:g}"


def plan(
    n: int,
    kinds: Sequence[str],
    seed: int,
    worlds: Sequence[int] = (2, 4),
    size: int = 4,
    spared: int = 4,
    launchers: Sequence[str] = ("local", "torchrun"),
) -> list[Sweep]:
    """Sweeps with n faults in all: every kind about as often, under these launchers, all strategies in turn.

    In a sweep strike up to `size` faults, and about as many configurations as `spared` run to their end.
    """
    dice = random.Random(seed)
    dealt: dict[tuple[str, bool], list[str]] = {}
    for i, kind in enumerate(islice(cycle(kinds), n)):
        possible = [each for each in launchers if each in KINDS[kind].launchers]
        launcher = possible[sum(divmod(i, len(kinds))) % len(possible)]
        dealt.setdefault((launcher, KINDS[kind].hangs), []).append(kind)
    several, alone = cycle(dice.sample(SEVERAL, len(SEVERAL))), cycle([False, False, False, False, True])
    sweeps = []
    for (launcher, hangs), given in sorted(dealt.items()):
        dice.shuffle(given)
        for some in (given[at : at + size] for at in range(0, len(given), size)):
            if not hangs and all(KINDS[kind].alone for kind in some) and next(alone):
                sweep = Sweep(launcher, ["single"], 1, range(len(some) + spared), [PATIENT_S])
            elif hangs:
                sweep = Sweep(launcher, list(islice(several, len(some))), dice.choice(worlds), [0], [HANG_S, PATIENT_S])
            else:
                seeds = range((len(some) + spared + 1) // 2)
                sweep = Sweep(launcher, list(islice(several, 2)), dice.choice(worlds), seeds, [PATIENT_S])
            sweep.faults = dict(faults(sweep, some, dice))
            sweeps.append(sweep)
    return dice.sample(sweeps, len(sweeps))


def faults(sweep: Sweep, kinds: Sequence[str], dice: random.Random) -> Iterator[tuple[str, Fault]]:
    """Each in a configuration of its own, and none in the last: how soon does the next one start?"""
    if len(sweep.timeouts) > 1:
        struck = sweep.configurations[::2]
    else:
        struck = sorted(dice.sample(sweep.configurations[:-1], len(kinds)), key=sweep.configurations.index)
    for configuration, kind in zip(struck, kinds, strict=True):
        rules = KINDS[kind]
        rank = {"full disk": 0, "host lost": sweep.world_size - 1}.get(kind, dice.randrange(sweep.world_size))
        outside = dice.random() < 0.5 if rules.outside is None else rules.outside
        phase = dice.choice([each for each in rules.phases if not outside or each in REPEATED])
        step = 0 if rules.hangs else dice.randrange(STEPS)  # soon, for its time is short
        yield configuration, Fault(kind, rank, step, phase, outside)
