"""Fake tensors, as torch has them, for a step that repeats the same operations on the same shapes a million times.

torch's FakeTensorMode takes 0.3 ms of Python to find out what an operation returns, and a ring of 128 ranks repeats
some eighty operations in every hop of every layer. Here answers are remembered by the operation and the shapes that it
was given, views are taken directly, and what is written in place stays as it is. Anything unusual is torch's to answer.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.distributed.tensor import DTensor

from bench.simulation.emulated import done

CPU = torch.device("cpu")
PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


class RememberingFakeMode(FakeTensorMode):
    """FakeTensorMode for tensors on the CPU. Tensors on the meta device may be given as they are."""

    kinds: ClassVar[dict[torch._ops.OpOverload, str]] = {}
    answers: ClassVar[dict[tuple, tuple]] = {}

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.blank = vars(FakeTensor(self, torch.empty((), device="meta"), CPU))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or every operation is wrapped once more

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if DTensor in types:
            return NotImplemented  # it comes back as operations on its local tensor
        kwargs = kwargs or {}
        kind = self.kinds.get(func) or self.kinds.setdefault(func, kind_of(func))
        if kind == "of no tensors":
            return func(*args, **kwargs)
        if kind == "collective":  # of the fake process group: what it fills has its shape already
            return done() if len(func._schema.returns) == 1 else (args[0], done())
        usual = kind != "unusual" and not self.in_kernel_invocation and kwargs.get("device") in (None, CPU)
        given = self.describe((args, *kwargs.items())) if usual else None
        if given is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if kind == "in place":
            return args[0] if func._schema.returns else None
        if kind == "view":
            with in_kernel_invocation_manager(self):
                out = func(*args, **kwargs)
            return [self.fake(part) for part in out] if isinstance(out, (list, tuple)) else self.fake(out)
        if (answer := self.answers.get((func, given))) is None:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if all(isinstance(part, Tensor) for part in (out if isinstance(out, (list, tuple)) else [out])):
                (self.answers[func, given],) = self.describe([out]) or ()
            return out
        return self.made(answer)

    def describe(self, values: Iterable) -> tuple | None:
        """The values, tensors as (shape, strides, dtype); None if one is no fake tensor of this mode, or a constant."""
        described: list[Any] = []
        for value in values:
            if type(value) in PLAIN:
                described.append((type(value), value))  # 1, 1.0 and True are the same key, and not the same argument
            elif isinstance(value, FakeTensor) and value.fake_mode is self and value.constant is None:
                described.append((value.shape, value.stride(), value.dtype))
            elif isinstance(value, (list, tuple)) and (inner := self.describe(value)) is not None:
                described.append((list if isinstance(value, list) else tuple, *inner))
            else:
                return None
        return tuple(described)

    def made(self, answer: Any) -> Any:
        """Fresh tensors of the description."""
        if answer[0] in (list, tuple):
            return answer[0](self.made(part) for part in answer[1:])
        shape, stride, dtype = answer
        return self.fake(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))

    def fake(self, on_meta: Tensor) -> FakeTensor:
        """FakeTensor(self, on_meta, CPU), without setting its twenty attributes one after the other."""
        made = Tensor._make_subclass(FakeTensor, on_meta, dispatch_device=True, device_for_backend_keys=CPU)
        made.__dict__.update(self.blank)
        return made


def kind_of(func: torch._ops.OpOverload) -> str:
    """collective, of no tensors, view, in place (returns its first argument or nothing), new (tensors that arguments
    decide), or unusual."""
    unlike = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
    schema = func._schema
    if func.namespace == "c10d":
        return "collective"
    if not any("Tensor" in str(value.type) for value in (*schema.arguments, *schema.returns)):
        return "of no tensors"
    if func.namespace == "fsdp" and schema.is_mutable and not schema.returns:
        return "in place"
    if func.namespace != "aten" or unlike & set(func.tags) or "lift" in func._opname:
        return "unusual"
    if func.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd):
        return "unusual"
    if func.is_view or func._opname == "_unsafe_view":
        return "view"
    if schema.is_mutable:
        returns_itself = func._opname.endswith("_") and len(schema.returns) == 1
        return "in place" if returns_itself or not schema.returns else "unusual"
    return "new"
