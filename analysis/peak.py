"""The most that a rank holds at once, by its account: state, what is kept for backward, and what comes and goes.

A step is fullest at one of four moments: in the loss, forward or backward; in the last block's backward, while all of
the others' activations are still there; in the update. What comes and goes there is derived here by hand, of this
project's code (bench/instruments/memory.py says what counts); tests/test_advise.py holds it to mode=simulate.
Everything may be an array, one element a configuration.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from analysis.accounts import weights
from analysis.accounts.account import Account
from analysis.accounts.letters import WIDE, Amount, Letters, alone
from analysis.accounts.weights import Group


def largest(*amounts: Amount) -> Amount:
    return np.maximum.reduce(np.broadcast_arrays(*amounts))


@dataclass(frozen=True)
class Held:
    """Bytes of a rank. x: an activation between the matrices; several: is there more than one sequence?"""

    account: Account
    s: Letters
    offload: bool = False

    @property
    def peak(self) -> Amount:
        loss = self.kept + largest(self.loss_forward(), self.loss_backward())
        block = self.kept - self.gone + self.last_block()
        return self.state + largest(loss, block, self.update())

    @cached_property
    def state(self) -> Amount:
        return sum(self.account.state(self.s).values())

    @cached_property
    def kept(self) -> Amount:
        """From forward for backward. What is offloaded waits elsewhere, but for two blocks' inputs."""
        blocks = min(2, self.s.layers) if self.offload else self.s.layers
        return blocks * self.account.saved_by_block(self.s) + self.account.saved_by_ends(self.s)

    @property
    def gone(self) -> Amount:
        """Of it, what the head has kept, when its backward is over."""
        return 2 * self.x + self.probabilities

    # Sizes.

    @property
    def x(self) -> Amount:
        return self.account.between(self.s) * self.s.d * self.s.e

    @cached_property
    def groups(self) -> list[Group]:
        """The weights of a block, as they travel together."""
        return [replace(group, times=1) for group in self.account.groups(self.s)]

    def travelling(self, groups: list[Group]) -> Amount:
        """Elements of weights that FSDP2 gathers."""
        here = [group for group in groups if self.s.stage >= 2 and not alone(group.ranks)]
        return sum(group.times * weight.rows * weight.columns for group in here for weight in group.weights)

    @cached_property
    def head(self) -> Amount:
        return self.travelling(weights.of_ends(self.s)[-1:])

    def gathered(self, elements: Amount) -> Amount:
        """Bytes of the weights that are there: so many, or from forward to backward all (stage 2)."""
        everything = [*self.account.groups(self.s), *weights.of_ends(self.s)]
        return self.s.e * (self.travelling(everything) if self.s.stage == 2 else elements)

    def pieces(self, chunks: int) -> Amount:
        return self.s.pieces(chunks, 1 if self.account.whole_norms else self.s.tp)[0]

    @cached_property
    def logits(self) -> Amount:
        """Elements, of a piece."""
        return self.s.tokens * self.s.columns(self.s.V, self.s.tp) / self.pieces(self.s.loss_chunks)

    @property
    def probabilities(self) -> Amount:
        return 0 if self.s.loss_chunks > 1 else self.logits * WIDE

    def norm(self, wide: int, narrow: int) -> Amount:
        """So many tensors in fp32, and so many as activations are."""
        return self.x / self.s.e * (wide * WIDE + narrow * self.s.e)

    # Moments.

    def loss_forward(self) -> Amount:
        """Logits, the same in fp32 and what becomes of them; the head's weights, and the message in which they came."""
        cast = WIDE if self.s.e != WIDE else 0
        there = self.logits * (self.s.e + cast + WIDE) - self.probabilities
        return self.gathered(self.head) + self.head * self.s.e + largest(there, self.norm(2, 1))

    def loss_backward(self) -> Amount:
        """The last block's weights are on their way. Pieces add up the gradients of the head's weight and of x."""
        s, pieces, several = self.s, self.pieces(self.s.loss_chunks), self.s.loss_chunks > 1
        table = s.columns(s.V, s.tp) * s.d * s.e
        if alone(s.tp):  # log-softmax, and the gradients before and behind it
            softmax = 3 * WIDE * self.logits - self.probabilities
        else:
            softmax = self.logits * (s.e + several * (WIDE + (WIDE if s.e != WIDE else 0)))
        sums = 3 * table if several else table + s.e * self.logits
        parts = (pieces - 1) / pieces * self.x
        sums = largest(sums + parts, s.e_dw * self.head)  # or into the message that sums it over ranks
        inside = largest(sums, softmax + several * table + parts, table + self.norm(4, 1) - self.x)
        return inside + self.gathered(self.head + self.travelling(self.groups[:1]))

    def last_block(self) -> Amount:
        """Its backward, and if it runs again all that it keeps: in SwiGLU, in a norm, or where inputs are gathered.

        Its weights are there, and the next block's on their way; and the head's gradients, until they are summed.
        """
        s, x, several = self.s, self.x, 1 * (self.s.B > 1)
        whole = any(group.axis == "world" for group in self.groups)
        columns, parts = s.columns(s.i, 1 if whole else s.tp), self.pieces(s.mlp_chunks)
        w = (s.tokens / s.tp if whole else s.tokens) * columns * s.e / parts
        again = self.account.saved_by_block(replace(s, recompute=False)) - x if s.recompute else 0
        of_mlp = 0 if s.mlp_chunks > 1 else (2 if s.selective else 3) * w  # kept by it, and gone at its end
        travels = self.account.whole is not None
        third = s.d * columns * s.e * (s.stage >= 2 and not alone(self.groups[-1].ranks))  # of its weights' gradients
        third = third / s.r if travels else third
        weights_of = [self.travelling([group]) for group in self.groups]
        behind = s.e_dw * (self.head if whole else largest(self.head, weights_of[0]))
        ahead = weights_of[0]  # on its way: of the block before, what is needed first
        beside = again + behind + self.gathered(sum(weights_of) + ahead) - (self.head * s.e if s.stage == 2 else 0)
        swiglu = (6 if s.mlp_chunks > 1 else 4 if s.selective else 3) * w + x + third
        moments = [beside + swiglu, beside + self.norm(4, 2) - of_mlp - x + 3 * third]
        if s.gather_kv and not self.account.in_grid:  # all keys and gradients, our own twice; those of q in fp32
            keys = 2 * (s.r + 1) * s.kv * (1 + s.e_g / s.e)
            moments.append(beside + keys + (2 + WIDE / s.e) * s.q - of_mlp + 3 * third)
        if s.queries:  # gone, here and on their way, and an output for them; dq that comes and goes; a tile's gradients
            one = np.equal(s.r if s.inner is None else s.inner, s.r)  # ring
            blocks, sums = np.where(one, 3, 5), np.where(one, 2, 5)
            queries = blocks * (2 * s.q + 2 * s.numbers) + s.q + sums * s.q * s.e_g / s.e + 2 * s.kv * WIDE / s.e
            moments.append(beside + queries + 2 * s.q + s.kv - of_mlp - x + 3 * third)
        if self.account.in_grid:
            moments += [beside + grid - of_mlp - x + 3 * third for grid in self.in_grid()]
        if travels:  # of gate and up two shards, twice their gradients, and what is added to these; that of x in fp32
            shards = (3 * s.e + 2 * s.e_dw) * 2 * s.d * s.i / s.r
            moments.append(beside + shards + 2 * w + (2 + WIDE / s.e) * x - of_mlp)
        if not alone(s.tp) and not self.account.whole_norms:
            inputs = (3 + several) * s.D + (1 + several) * x
            gone = again if s.recompute else self.account.saved_by_block(s) - 2 * x  # but for the norm's in and out
            there = inputs + s.q + 2 * s.kv + (x if s.recompute else 0) - gone
            if whole:
                moments.append(again + self.gathered(2 * ahead) + s.e_dw * weights_of[-1] + there)
            else:
                moments += [beside + there + 3 * third, beside + inputs / parts + 2 * w - of_mlp + third]
        for number, size in enumerate(weights_of):  # its gradients go into a message, and the one before is on its way
            before = [other for other in weights_of[:number] + weights_of[number + 1 :] if np.any(other)]
            messages = s.e_dw * (size + (before[0] if before else size))
            moments.append(messages + s.e * size + self.gathered(ahead) + 2 * x)
        return largest(*moments)

    def in_grid(self) -> list[Amount]:
        """A row's dO, q and out, until all others' queries are done, and a column's keys and values; gradients of all,
        in fp32, and a tile's. Then dq on its way home; and dk and dv.
        """
        s, e_g, wide = self.s, self.s.e_g / self.s.e, WIDE / self.s.e
        row, column = s.inner * s.q, 2 * s.r / s.inner * s.kv
        there = column * (s.r > s.inner) + wide * (s.q + row + column)
        rows = 3 * (row + s.q) * (s.inner > 1)
        cast, home = e_g * (s.e_g != WIDE), e_g * s.q
        return [
            there + rows + largest(s.q + 2 * s.kv, cast * row + home),
            there + home + cast * column + 2 * e_g * s.kv,
        ]

    def update(self) -> Amount:
        """Gradients cast to their masters' dtype, and the square of the largest; or all new weights in a message."""
        s, cast, square, message = self.s, 0.0, 0.0, 0.0
        for share in weights.shares([*self.account.groups(s), *weights.of_ends(s)], s):
            if not share.by_fsdp2:
                cast = cast + (s.e_w * share.trained if s.e_dw != s.e_w else 0)
                message = message + s.e * share.held * (s.stage == 1 and not alone(s.sharing))
            wide = 1 if share.by_fsdp2 or s.e_dw == WIDE else 2
            square = largest(square, s.clipping * wide * WIDE * share.trained / share.tensors)
        return largest(cast + square, message)
