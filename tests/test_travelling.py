"""Linears whose weights travel: what is on its way beside which product, in how many buffers; how exact sums are."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conf.meshes import Line
from models.llama import Linear
from strategies.base import Options
from strategies.ops import travelling_linears
from strategies.ops.mesh import Axis, axis_of
from strategies.ops.travelling_linears import column_linears, row_linear
from strategies.ops.weights import column, row
from tests.ranks import on_ranks, standing_for

RANKS = 4
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm}


def sharded(axis: Axis) -> tuple[list[nn.Linear], nn.Linear]:
    """Two linears of which this rank has rows, and one of which it has columns, from the same wholes on every rank."""
    torch.manual_seed(0)
    linears = [Linear(32, 48), Linear(32, 48), Linear(48, 32)]
    for linear, cut in zip(linears, (column, column, row), strict=True):
        whole = linear.weight.detach()
        cut(linear, axis)
        linear.weight.data.copy_(linear.shares["weight"].of(whole))
    return linears[:2], linears[2]


class Watched:
    """Which of two kinds of message are on their way whenever a product runs, and from which buffers weights leave."""

    def __init__(self) -> None:
        self.flying = {"weights": 0, "grads": 0}
        self.buffers: set[int] = set()
        self.seen: list[tuple[int, int]] = []
        self.shift = travelling_linears.shift

    def watch(self, x: Tensor, axis: Axis, into: Tensor | None = None):
        pending, kind = self.shift(x, axis, into), "grads" if into is None else "weights"
        self.flying[kind] += 1
        if into is not None:
            self.buffers |= {x.data_ptr(), into.data_ptr()}
        wait = pending.wait

        def landed() -> Tensor:
            self.flying[kind] -= 1
            return wait()

        pending.wait = landed
        return pending

    def beside(self, function, *args) -> list[tuple[int, int]]:
        """(weights, gradients) in flight beside each product, in order."""
        watched = self

        class Products(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func._overloadpacket in PRODUCTS:
                    watched.seen.append(tuple(watched.flying.values()))
                return func(*args, **(kwargs or {}))

        self.seen, self.buffers = [], set()
        with Products(), patch.object(travelling_linears, "shift", self.watch):
            function(*args)
        assert not any(self.flying.values())
        return self.seen


@pytest.mark.parametrize("whose", ["columns", "row"])
def test_the_next_shard_is_on_its_way_before_the_product_with_the_one_that_is_here(whose: str):
    """In backward gradients, too; the last of them on their way home beside the product that the owner adds."""
    with standing_for(RANKS - 1, RANKS):
        axis = axis_of("cpu", "ring", Line(RANKS, stride=1))
        columns, down = sharded(axis)
        if whose == "row":
            x = torch.randn(2, 8, 48, requires_grad=True)
            forward, n = (lambda: row_linear(x, down, axis, Options(None))), 1
        else:
            x = torch.randn(2, 8, 32, requires_grad=True)
            forward, n = (lambda: sum(column_linears(x, columns, axis, Options(None)))), 2
        watched, out = Watched(), []
        assert watched.beside(lambda: out.append(forward())) == [(1, 0)] * n * (RANKS - 1) + [(0, 0)] * n
        assert len(watched.buffers) == 2
        visits = [[(1, 0)] * n, [(1, 0)] * 2 * n, *([[(1, 1)] * 2 * n] * (RANKS - 3)), [(0, 1)] * 2 * n, [(0, 1)] * n]
        assert watched.beside(out[0].sum().backward) == [product for visit in visits for product in visit]
        assert len(watched.buffers) == 2


def errors(rank: int) -> list[float]:
    """In bf16 against fp64: of an output summed over 8 ranks' columns, of a gradient over their rows; and of wholes."""
    torch.manual_seed(1)
    x, h = torch.randn(64, 256).bfloat16(), torch.randn(64, 1024).bfloat16()
    up, down = Linear(256, 1024).bfloat16(), Linear(1024, 256).bfloat16()
    exact = h.double() @ down.weight.double().T, h.double() @ up.weight.double()
    found = []
    for axis in (Axis("ring"), axis_of("cpu", "ring", Line(8, stride=1))):
        for linear, cut in ((up, column), (down, row)):
            whole = linear.weight.detach()
            cut(linear, axis)
            linear.weight.data.copy_(linear.shares["weight"].of(whole))
        options, x = Options(None, torch.bfloat16), x.detach().requires_grad_()
        y = row_linear(h, down, axis, options)
        column_linears(x, [up], axis, options)[0].backward(h)
        pairs = zip((y, x.grad), exact, strict=True)
        found += [((ours.double() - truth).norm() / truth.norm()).item() for ours, truth in pairs]
    return found


@pytest.mark.slow
def test_sums_over_shards_are_as_exact_as_one_product():
    """Each part is rounded once, and their sum once more: not after every addition, as it would be in bf16."""
    for y_alone, of_x_alone, y, of_x in on_ranks(8, errors):
        assert y < 1.6 * y_alone
        assert of_x < 1.6 * of_x_alone
