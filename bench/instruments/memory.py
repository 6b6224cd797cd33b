"""The memory log: every storage that a step creates, when it is born and when it dies, and what it was for.

The allocators of CPU and fake tensors keep no peak, so the log is the same on every device: a birth is the first time
that the dispatcher returns a storage, a death is the end of its last reference. FSDP2 frees and refills the storages
of gathered weights by resizing them, which the log sees too. What a kernel allocates and frees inside itself is not
seen (on CUDA the allocator's own peak is reported, and that includes it).
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from bench.instruments.instrument import Instrument, replaced
from bench.instruments.lent import Lent
from conf.measurement import Peak


@dataclass
class Storage:
    """One storage's life: its present bytes, what it is, and the phase in which it was born."""

    nbytes: int
    role: str  # of the state, or activations, other; host: in the host's memory
    gathered: bool = False  # refilled by FSDP2: weights that belong to other ranks


class MemoryLog(Instrument):
    """`state` names what is there before: role -> tensors, for params, grads, optimizer.

    Fake tensors count if they are of `fake_mode`: others are how DTensor works out shapes.
    """

    def __init__(
        self, device: str, state: Mapping[str, Iterable[Tensor]], fake_mode: FakeTensorMode | None = None
    ) -> None:
        self.device = "meta" if fake_mode else device  # where fake tensors keep their storages
        self.fake_mode = fake_mode
        self.live: dict[int, Storage] = {}  # by the address of the storage object
        self.events: list[tuple[Storage, int]] = []  # (storage, change in bytes), in order
        self.after_forward = 0  # bytes held
        self.lent = Lent()
        self.places: list[tuple[int, str]] = [(0, "forward")]  # the event with which each part of the step begins
        for role, tensors in state.items():
            for tensor in tensors:
                self.see(tensor.untyped_storage(), role)

    def reached(self, part: str) -> None:
        if part == "backward":
            self.end_forward()
        else:
            self.reach(part)

    def end_forward(self) -> None:
        """Whatever was made since the start and lives now is kept for backward: activations, or gathered weights."""
        self.lent.settle()
        self.after_forward = sum(storage.nbytes for storage in self.live.values() if storage.role != "host")
        self.reach("backward")
        for storage in self.live.values():
            if storage.role == "other":
                storage.role = "activations"

    def reach(self, place: str) -> None:
        """What happens from here on belongs to this part of the step."""
        self.places.append((len(self.events), place))

    def see(self, storage: torch.UntypedStorage, role: str) -> None:
        if storage._cdata in self.live or (storage.device.type != self.device and role != "host"):
            return
        born = self.live[storage._cdata] = Storage(storage.nbytes(), role)
        self.events.append((born, born.nbytes))
        weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, address: int) -> None:
        if (dead := self.live.pop(address, None)) is not None:
            self.events.append((dead, -dead.nbytes))

    def resized(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        if (known := self.live.get(storage._cdata)) is not None:
            self.events.append((known, nbytes - known.nbytes))
            known.nbytes, known.gathered = nbytes, True

    def saw(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if func.namespace == "c10d":
            return  # it writes into what it is lent
        role = "host" if func.namespace == "offload" and func._opname == "to_host" else "other"
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and getattr(tensor, "fake_mode", None) is self.fake_mode:
                self.see(tensor.untyped_storage(), role)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Storages tell when they are resized."""
        resize = torch.UntypedStorage.resize_

        def resize_and_tell(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
            self.lent.settle()
            resize(storage, nbytes)
            self.resized(storage, nbytes)
            return storage

        with replaced(torch.UntypedStorage, "resize_", resize_and_tell):
            yield

    def peaks(self) -> dict[str, Peak]:
        """The peak, and its parts, of every part of the step."""
        held = dict.fromkeys(vars(Peak()), 0)
        best: dict[str, Peak] = {}
        ends = [event for event, _ in self.places[1:]] + [len(self.events)]
        for (start, place), end in zip(self.places, ends, strict=True):
            highest = best.get(place, Peak())
            for storage, change in self.events[start:end]:
                if storage.role == "host":
                    continue
                held["total"] += change
                held["other" if storage.gathered else storage.role] += change
                if held["total"] > highest.total:
                    highest = Peak(**held)
            best[place] = highest
        return best

    def host_bytes(self) -> int:
        """At most, in the host's memory."""
        changes = (change for storage, change in self.events if storage.role == "host")
        return max(accumulate(changes), default=0)

    def peak(self) -> Peak:
        """The step's peak and its parts."""
        return max(self.peaks().values(), key=lambda peak: peak.total)
