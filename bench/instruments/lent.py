"""What collectives were lent, and whether gloo has given it back.

gloo's threads let go of a buffer some time after wait() has returned, sooner or later as the cores are free. A log that
took that for the step's own memory would say something else each time. So gloo is given a second storage over the same
memory, whose end shows when it is done, and the log waits for that where the step itself has let go of the first.
"""

import ctypes
import time
import weakref
from collections import Counter

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

PATIENCE_S = 1.0  # for a collective that is still in flight, and keeps its buffers rightly


class Lent:
    """The tensors that collectives were given, each until its twin is gone."""

    def __init__(self) -> None:
        self.tensors: list[tuple[Tensor, weakref.ref[torch.UntypedStorage]]] = []

    def lend(self, args: tuple) -> tuple:
        """The arguments of a collective with twins for the CPU's tensors."""
        return tree_map(lambda leaf: self.twin(leaf) if isinstance(leaf, Tensor) else leaf, args)

    def twin(self, tensor: Tensor) -> Tensor:
        """The same memory under another storage, which does not keep it: this list does, until the twin is gone."""
        real = tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)
        if not real or not tensor.numel() or not tensor.is_contiguous():
            return tensor
        memory = (ctypes.c_byte * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
        twin = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
        self.tensors.append((tensor.detach(), weakref.ref(twin.untyped_storage())))
        return twin

    def settle(self) -> None:
        """Let go of what has been given back, and wait for it where nothing else holds it any more."""
        if not self.tensors:
            return
        deadline = time.monotonic() + PATIENCE_S
        while self.is_held_by_gloo_alone() and time.monotonic() < deadline:
            time.sleep(0.0002)
        self.tensors = [(tensor, twin) for tensor, twin in self.tensors if twin() is not None]

    def is_held_by_gloo_alone(self) -> bool:
        """Is there a storage that nothing but this list holds, and a twin of it that lives?"""
        listed = Counter(address(tensor) for tensor, _ in self.tensors)  # FSDP2 gathers from a part of the result
        return any(
            torch._C._storage_Use_Count(address(tensor)) == listed[address(tensor)] + 1  # the handle that asks
            for tensor, twin in self.tensors
            if twin() is not None
        )


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
