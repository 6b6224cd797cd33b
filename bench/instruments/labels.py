"""Where every number of a step came from: a label beside each, which goes wherever the step takes the number.

A label says which place of which plane a number is, and which rank made it. A plane is a matrix of weights (place: row,
column), or what came of its product with activations (place: token, column, which is the row of the weights that made
it). Labels lie beside storages, so that views need no rule. What moves numbers moves labels by the same operation;
what computes gives its result the place of what it was computed from, made here.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

NONE = -1  # nobody knows
BLANK = -2  # a zero that stands where nothing is, made by rank 0; -3 by rank 1
BITS = {"owner": 6, "y": 22, "x": 22, "plane": 13}  # from the lowest on
# A plane is twice the number of a parameter, and one more if it is the weights themselves; these two are no product.
OUT, LSE = 2 * 4095, 2 * 4094  # attention's output, and its log-sum-exp: one of each head

MOVES = {  # operations that move numbers as they are
    "clone", "copy_", "_to_copy", "cat", "stack", "index_select", "index", "repeat", "_foreach_copy_",
    "all_gather_copy_in", "split_with_sizes_copy", "constant_pad_nd",
}  # fmt: skip
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1}  # and which argument is their left matrix
REDUCTIONS = {"sum", "mean", "amax", "logsumexp"}
EMPTY = ("empty", "new_empty")
CONSTANT = ("zero", "new_zeros", "ones", "new_ones", "full", "new_full", "fill_")


def packed(plane: Any, x: Any, y: Any, owner: int) -> Any:
    return ((plane << BITS["x"] | x) << BITS["y"] | y) << BITS["owner"] | owner


def field(labels: Any, name: str) -> Any:
    """One of the four numbers of labels, tensors or arrays of integers."""
    below = sum(BITS[each] for each in list(BITS)[: list(BITS).index(name)])
    return labels >> below & (1 << BITS[name]) - 1


class Labels:
    """The labels of all tensors that a rank has."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.beside: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}  # storages are kept: no other gets their place

    def of(self, tensor: Tensor) -> Tensor:
        """The labels of a tensor, in its shape, to be read and written."""
        storage = tensor.untyped_storage()
        n = storage.nbytes() // tensor.element_size()
        kept = self.beside.get(storage._cdata)
        if kept is None or len(kept[1]) < n:  # FSDP2 frees what it has gathered, and makes room for it again
            kept = self.beside[storage._cdata] = storage, torch.full((n,), NONE)
        return kept[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def beside_all(self, values: Any) -> Any:
        """The same values with labels in the place of tensors."""
        return tree_map(lambda leaf: self.of(leaf) if isinstance(leaf, Tensor) else leaf, values)

    def follow(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """An operation that sends nothing has run: label what it has made."""
        name = func._schema.name.partition("::")[2]
        if func.is_view or name.startswith(EMPTY):
            return
        if name.startswith(CONSTANT):
            self.of(out).fill_(BLANK - self.rank)
            return
        if name in MOVES:
            which = args[1:] if name.startswith("index") else ()  # numbers that choose others stay as they are
            moved = func(
                *self.beside_all(args[:1] if which else args),
                *which,
                **self.beside_all({k: v for k, v in kwargs.items() if k != "dtype"}),
            )
            if not func._schema.is_mutable:
                for tensor, labels in zip(tree_leaves(out), tree_leaves(moved), strict=True):
                    self.of(tensor).copy_(labels)
            return
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not func._schema.is_mutable:
            known = {t.untyped_storage()._cdata for t in given}
            made = [t for t in made if t.untyped_storage()._cdata not in known]  # not what is another view of it
        for place, tensor in enumerate(made):
            if (labels := self.made(name, place, tensor, args, given)) is not None:
                here = labels >> BITS["owner"] << BITS["owner"] | self.rank
                self.of(tensor).copy_(here.where(labels >= 0, labels.clamp(BLANK - self.rank)))

    def made(self, name: str, place: int, tensor: Tensor, args: tuple, given: list[Tensor]) -> Tensor | None:
        """Labels of what was computed, but for its owner; None if there are none to be had."""
        if name in PRODUCTS:
            left, right = args[PRODUCTS[name]], args[PRODUCTS[name] + 1]
            return product(self.of(left)[..., :1], self.of(right)[..., :1, :])
        if name == "embedding":
            weights, tokens = self.of(args[0]), self.of(args[1])
            return joined(tokens[..., None], field(weights[0], "plane") & ~1, field(weights[0], "y"), weights[0])
        if "scaled_dot_product" in name:
            q = self.of(args[0])  # [B, H, S, K]
            if place == 0:
                return joined(q, OUT, field(q, "y"), q)
            first = q[..., 0]
            return joined(first, LSE, field(first, "y") // q.shape[-1], first) if place == 1 else None
        if name in REDUCTIONS and len(args) > 1:
            return self.of(args[0]).amax(args[1], *args[2:3])
        return first_labelled((self.of(t) for t in given), tensor.shape)


def joined(tokens: Tensor, plane: Any, y: Any, columns: Tensor) -> Tensor:
    """The x of tokens and a y on a plane, where both are known."""
    return torch.where((tokens < 0) | (columns < 0), NONE, packed(plane, field(tokens, "x"), y, 0))


def product(left: Tensor, right: Tensor) -> Tensor:
    """Tokens [.., n, 1] of the left matrix, columns [.., 1, m] of the right one: the rows of weights, if it is such."""
    plane = field(right, "plane")
    y = torch.where(plane % 2 == 1, field(right, "x"), field(right, "y"))
    return joined(left, plane & ~1, y, right)


def first_labelled(labels: Iterable[Tensor], shape: torch.Size) -> Tensor:
    """Element by element, the first label that says a place, of those that can be broadcast to the shape."""
    found = torch.full(shape, NONE)
    for each in labels:
        if each.ndim <= len(shape) and all(
            n in (1, m) for n, m in zip(reversed(each.shape), reversed(shape), strict=False)
        ):
            found = torch.where((found == NONE) | (found < 0) & (each >= 0), each, found)
    return found
