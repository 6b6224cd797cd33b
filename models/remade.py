"""What is kept for backward as a recipe: an output that is cheap to make again from what is kept anyway.

recompute=selective, in the sense of Korthikanti et al. 2022, section 5, of what attention kernels of today leave over:
the norms' outputs and the MLP's product, and with them no matrix product, no attention and no message is made twice.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Kept:
    """Every output stays, if autograd needs it."""

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return function(*inputs)

    def around(self) -> AbstractContextManager:
        return nullcontext()


class Remade(Kept):
    """Outputs of functions that are called through it are made again in backward, for all who need them at once."""

    def __init__(self) -> None:
        self.recipes: dict[int, Recipe] = {}  # by the address of the output's storage, as long as that lives

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        out = function(*inputs)
        storage = out.untyped_storage()
        self.recipes[storage._cdata] = Recipe(function, [each.detach() for each in inputs])
        weakref.finalize(storage, self.recipes.pop, storage._cdata, None)
        return out

    def around(self) -> AbstractContextManager:
        """Inside, autograd keeps recipes in the place of such outputs and of views of them."""
        return saved_tensors_hooks(self.pack, lambda kept: kept() if isinstance(kept, View) else kept)

    def pack(self, tensor: Tensor) -> "Tensor | View":
        recipe = self.recipes.get(tensor.untyped_storage()._cdata)
        if recipe is None:
            return tensor
        recipe.uses += 1
        return View(recipe, tensor.size(), tensor.stride(), tensor.storage_offset())


@dataclass
class Recipe:
    """How an output is made again, and by how many it is still needed."""

    function: Callable[..., Tensor]
    inputs: list[Tensor]
    uses: int = 0
    made: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.function(*self.inputs)
        made, self.uses = self.made, self.uses - 1
        if self.uses == 0:
            self.made = None
        return made


@dataclass
class View:
    """A view of an output that is made again."""

    recipe: Recipe
    size: Any
    stride: Any
    offset: Any

    def __call__(self) -> Tensor:
        return self.recipe().as_strided(self.size, self.stride, self.offset)
