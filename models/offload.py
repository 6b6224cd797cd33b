"""What waits for backward in the host's memory: the inputs of blocks (offload=activations; ALST, section 3.3).

recompute=block keeps nothing else of a block, so a rank's memory no longer grows with the depth of the model. A copy to
the host has the next block's time to arrive, and one back is sent for when backward begins with the block behind.

To and from the host are operations of their own, which instruments see like any other.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor, library
from torch.autograd.graph import saved_tensors_hooks

OPS = library.Library("offload", "DEF")
OPS.define("to_host(Tensor x) -> Tensor")
OPS.define("to_device(Tensor x, Device device) -> Tensor")


class Waiting:
    """around: what a timer puts around whatever may keep the device from computing."""

    around: Callable[[], AbstractContextManager] = nullcontext


waiting = Waiting()


@cache
def side_stream() -> torch.cuda.Stream:
    """Where copies run beside the computation."""
    return torch.cuda.Stream()


def copied(source: Tensor, target: Tensor) -> Tensor:
    """Begun, and on a GPU not yet done: arrived() says when it is. On a CPU nothing can run beside it."""
    if source.is_cuda or target.is_cuda:
        side_stream().wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream()):
            return target.copy_(source, non_blocking=True)
    return target.copy_(source)


def to_host(x: Tensor) -> Tensor:
    return copied(x, torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    return copied(x, torch.empty(x.shape, dtype=x.dtype, device=device))


OPS.impl("to_host", to_host, "CompositeExplicitAutograd")
OPS.impl("to_device", to_device, "CompositeExplicitAutograd")
library.register_fake("offload::to_host", torch.empty_like, lib=OPS)
library.register_fake("offload::to_device", lambda x, device: torch.empty_like(x), lib=OPS)


def arrived(device: torch.device) -> None:
    """What was begun to be copied is there before what the device computes next."""
    if device.type == "cuda":
        torch.cuda.current_stream().wait_stream(side_stream())


class Offload:
    """Around each block in turn, in one forward after the other."""

    def __init__(self) -> None:
        self.latest: Input | None = None

    def around(self) -> AbstractContextManager:
        """What autograd keeps inside waits in the host's memory."""
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, x: Tensor) -> "Input":
        if self.latest is not None:
            self.latest.leave()
        self.latest = Input(x, self.latest)
        return self.latest

    def unpack(self, kept: "Input") -> Tensor:
        self.latest = None  # the next forward begins anew
        x = kept.back()
        if kept.before is not None:
            kept.before.fetch()
        return x


class Input:
    """One block's input: on the device, in the host's memory, or on its way."""

    def __init__(self, x: Tensor, before: "Input | None") -> None:
        self.before = before  # of the block before
        self.device = x.device
        self.here: Tensor | None = x
        with waiting.around():
            self.there: Tensor | None = torch.ops.offload.to_host(x)

    def leave(self) -> None:
        with waiting.around():
            arrived(self.device)
        self.here = None

    def fetch(self) -> None:
        if self.here is None:
            with waiting.around():
                self.here = torch.ops.offload.to_device(self.there, self.device)

    def back(self) -> Tensor:
        self.fetch()
        with waiting.around():
            arrived(self.device)
        x, self.here, self.there = self.here, None, None
        assert x is not None
        return x
