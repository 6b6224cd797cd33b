"""What an operation of a simulated step takes on a cluster's clock: which part of the step it is, and how long.

Matrix products by their FLOPs, AdamW and whatever else computes or copies by the bytes that it reads and writes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bench.simulation.fake import RememberingFakeMode
from conf.clock import Clock
from conf.series import moved

COPIES = {"copy_", "clone", "_to_copy", "cat", "stack", "zero_", "fill_", "zeros", "zeros_like", "new_zeros", "full"}
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "record_stream", "scalar_tensor"}
OVERWRITE = {"copy_", "zero_", "fill_", "_foreach_zero_", "_foreach_copy_"}  # their first argument is not read
FILL = {"nll_loss_backward"}  # reads nothing to speak of
PICK = {"embedding", "gather", "index_select", "index"}  # read as much as they write
SKIP = {"nll_loss_forward", "scatter_add_"}  # a number of each row


class Prices:
    """The same of the same shapes: looked up once."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.known: dict[tuple, tuple[str, float]] = {}

    def of(self, func: Any, args: tuple, kwargs: dict, out: Any) -> tuple[str, float]:
        """products, optimizer or kernels, and microseconds; none for a view."""
        if RememberingFakeMode.kinds.get(func) == "view":
            return "", 0.0
        read = tensors((args, kwargs))
        key = (func, *((t.shape, t.dtype) for t in read))
        if (known := self.known.get(key)) is None:
            known = self.known[key] = self.looked_up(func, args, kwargs, read, out)
        return known

    def looked_up(
        self, func: torch._ops.OpOverload, args: tuple, kwargs: dict, read: list[Tensor], out: Any
    ) -> tuple[str, float]:
        name = func._opname
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            return "products", self.clock.product_us(formula(*args, **kwargs, out_val=out), *out.shape[-2:])
        if name == "_fused_adamw_":
            elements, element_size = sum(weight.numel() for weight in args[0]), args[0][0].element_size()
            return "optimizer", self.clock.kernel_us("optimizer", moved("optimizer", elements, element_size))
        size = touched(name, args, kwargs, read, out)
        copies = name in COPIES or func.namespace in ("fsdp", "offload")
        return "kernels", self.clock.kernel_us("copy" if copies else "other", size) if size else 0.0


def touched(name: str, args: tuple, kwargs: dict, read: list[Tensor], out: Any) -> int:
    """Bytes that an operation reads and writes: all that it is given and gives, but for what is known not to be."""
    if name in NOTHING:
        return 0
    if name == "all_gather_copy_in":  # shards into their place in the buffer of all
        return 2 * size_of(args[0])
    if name in ("split_with_sizes_copy", "chunk_cat"):  # their output is given, too
        return size_of(args[0]) + size_of(kwargs.get("out", out))
    if name in SKIP:
        return 3 * size_of(read[-1])
    written = size_of(args[0] if out is None else out)
    if name in PICK:
        return 2 * written
    if name in FILL:
        return written
    return size_of(read) + written - (size_of(args[0]) if name in OVERWRITE else 0)


def tensors(tree: Any) -> list[Tensor]:
    """All that are in it; torch's tree_leaves takes ten times as long, in every operation."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [tensor for each in tree for tensor in tensors(each)]


def size_of(tree: Any) -> int:
    """In bytes. One that is the same number along a dim, stretched, is read as what it is in memory."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors(tree))
