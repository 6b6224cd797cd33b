"""What a rank computes in a step, by hand: products and attention by FLOPs, the rest by bytes read and written.

Read beside models/llama.py and strategies/ops/: what these do is here what they cost. `way` is forward, backward, or
again: what is run a second time in backward. Everything may be an array, one element a configuration.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from analysis.accounts import weights
from analysis.accounts.account import Account
from analysis.accounts.letters import WIDE, Amount, Letters, alone
from analysis.accounts.sent import Sent
from analysis.accounts.weights import Group, Weight
from analysis.prices import NOTHING, Machine, Work
from conf.clock import computed


@dataclass(frozen=True)
class Matrix:
    """A weight, the tokens that it sees, in how many pieces of them one after the other; how many shards of it come by,
    and in how many stages it is used."""

    weight: Weight
    tokens: Amount
    pieces: Amount = 1
    shards: Amount = 1
    stages: Amount = 1


def once(method: Callable) -> Callable:
    """For each `way` worked out once; of steps that differ in ZeRO alone, in what they share."""

    def remembered(step: "Computed", way: str) -> Any:
        key = method.__name__, way, step.s.recompute, step.s.selective
        if key not in step.known:
            step.known[key] = method(step, way)
        return step.known[key]

    return remembered


@dataclass(frozen=True)
class Computed:
    """Of the rank that has most to do."""

    account: Account
    s: Letters
    on: Machine
    known: dict[Any, Any] = field(default_factory=dict, kw_only=True)

    @cached_property
    def blocks(self) -> list[Group]:
        """The weights of a block, as they travel together."""
        return [replace(group, times=1) for group in self.account.groups(self.s)]

    @cached_property
    def ends(self) -> list[Group]:
        return weights.of_ends(self.s)

    @cached_property
    def matrices(self) -> list["Matrix"]:
        """Of a block: q, k, v, o, gate, up, down."""
        s, pieces = self.s, self.pieces(self.s.mlp_chunks)
        found = [
            Matrix(
                weight,
                s.tokens / s.tp if group.axis == "world" else s.tokens,
                shards=s.r if weight.cut == "ring" else 1,
            )
            for group in self.blocks
            for weight in group.weights
            if weight.cut != "not"
        ]
        found[:3] = [replace(each, stages=n) for each, n in zip(found, self.stages, strict=False)]
        return [*found[:4], *(replace(each, pieces=pieces) for each in found[4:])]

    @cached_property
    def stages(self) -> tuple[Amount, Amount, Amount]:
        """In how many q, k and v are made."""
        return (self.s.head_stages, self.s.kv_stages, self.s.kv_stages) if self.account.staged else (1, 1, 1)

    @cached_property
    def head(self) -> "Matrix":
        return Matrix(self.ends[-1].weights[0], self.s.tokens, self.pieces(self.s.loss_chunks))

    def pieces(self, chunks: int) -> Amount:
        """In how many a rank's tokens between the matrices are cut."""
        return self.s.pieces(chunks, 1 if self.account.whole_norms else self.s.tp)[0]

    @property
    def travels(self) -> bool:
        """Do shards of the matrices come by?"""
        return not alone(self.s.r) and any(matrix.weight.cut == "ring" for matrix in self.matrices)

    def together(self, half: int) -> bool:
        """Has a half of a block one gradient of its input, of all of its products together?"""
        parts = self.account.linears[half : half + 1]
        gathered = not alone(self.s.tp) and any(line.beside for part in parts for line in part(self.s))
        return gathered or self.travels

    def product(self, of: str, matrix: "Matrix") -> Work:
        """y = x W^T, or the gradient of x or of W."""
        n, rows, columns = matrix.tokens / matrix.pieces, matrix.weight.rows / matrix.stages, matrix.weight.columns
        inner = {"y": (n, columns, rows), "x": (n, rows, columns), "W": (rows, n, columns)}
        return self.on.product(*inner[of], matrix.pieces * matrix.shards * matrix.stages)

    def products(self, of: str, matrices: Iterable["Matrix"]) -> Work:
        return sum((self.product(each, matrix) for matrix in matrices for each in of), NOTHING)

    def gradients(self, of: str, half: int | None) -> Work:
        """Of the matrices that share their input: q, k and v; gate and up; the head."""
        halves = {0: self.matrices[:3], 1: self.matrices[4:6], None: [self.head]}
        return self.products(of, halves[half])

    @once
    def linears(self, way: str) -> Work:
        """A block's matrices. What is run again stops where backward has what it needs: before the last product."""
        attention, mlp, chunked = self.matrices[:4], self.matrices[4:], self.s.mlp_chunks > 1
        found = NOTHING
        if self.travels:
            passes = [*self.passes(0), *self.passes(1)][: 3 if way == "again" else 4]
            found = sum((self.travelling(way, each) for each in passes), NOTHING)
        if way == "forward":
            return found + self.products("y", self.matrices)
        if way == "again":
            pieces = mlp[0].pieces
            of_mlp = self.products("y", mlp) * ((pieces - 1) / pieces) if chunked else self.products("y", mlp[:2])
            return found + self.products("y", attention) + of_mlp
        once_more = [*(attention[:3] if self.account.staged else ()), *(mlp[:2] if chunked else ())]
        return found + self.products("xW", self.matrices) + self.products("y", once_more) + self.summed(mlp)

    def passes(self, half: int) -> list[list["Matrix"]]:
        """Of a half of a block, those whose shards travel together."""
        cuts = ((0, 3), (3, 4)) if half == 0 else ((4, 6), (6, 7))
        return [self.matrices[start:stop] for start, stop in cuts]

    def travelling(self, way: str, of: list["Matrix"]) -> Work:
        """Of a pass: its shards into the message in which they leave, and sums over those that come by, in fp32.

        Of the output of down, and of the gradients of the other inputs, and of the shards.
        """
        s, on = self.s, self.on
        shards, down = [each.weight.rows * each.weight.columns for each in of], of[-1] is self.matrices[-1]
        found = sum((self.copy(s.e * shard) for shard in shards), NOTHING)
        if down != (way == "backward"):
            x = s.tokens * (of[0].weight.rows if down else of[0].weight.columns)
            found += on.moves((s.e + WIDE) * x, 1 + (s.e != WIDE), "copy") + on.moves((s.e + 2 * WIDE) * x, s.r)
        if way == "backward":
            found += on.moves((s.e + s.e_dw) * sum(shards), 1, "copy")
            for shard in shards:
                found += on.moves((s.e + 2 * s.e_dw) * shard, s.r)
                found += on.moves((s.e + s.e_dw) * shard, int(s.e != s.e_dw), "copy")
        return found

    def summed(self, matrices: Iterable["Matrix"]) -> Work:
        """The pieces' parts of a weight's gradient."""
        sizes = ((matrix.weight.rows * matrix.weight.columns, matrix.pieces - 1) for matrix in matrices)
        return sum((self.on.kernel("other", size, self.s.e, times) for size, times in sizes), NOTHING)

    @once
    def attention(self, way: str) -> Work:
        """All blocks of it, and the copies that heads make for an exchange."""
        own, visiting = self.blocks_of_attention(way)
        if self.account.in_grid:
            return own + visiting * (self.s.r - 1) + self.grid_besides(way)
        heads = self.heads_in_stages(way) if self.account.staged else self.heads_for_tokens(way)
        return own + visiting * (self.s.r - 1) + heads

    @once
    def blocks_of_attention(self, way: str) -> tuple[Work, Work]:
        """Over a rank's own keys, and over those of one other rank of the ring, that all its queries come after.

        Around the ring sums are in fp32: of the outputs, merged; and of the gradients of q, and of k and v.
        """
        s, on, ring = self.s, self.on, self.s.r > 1
        chunks = s.head_stages if self.account.staged else s.head_chunks
        n, q, kv = s.L // s.r, s.q / s.e / chunks, 2 * s.kv / s.e / chunks
        triangle = computed(n, on.clock.tile)
        pairs = np.select([s.layout == "contiguous", s.layout == "striped"], [n * n, triangle], n * (n // 2))
        heads = s.B * s.h / (s.tp * s.u) / chunks
        if s.seen is not None:  # in all, of which no more is own than a mask without documents would let through
            triangle = min(triangle, s.seen["pairs"] / s.B)
            pairs = (s.seen["pairs"] / s.B - triangle) / max(1, s.r - 1)
        own = on.attention(way, heads * triangle, s.K, chunks)
        visiting = on.attention(way, heads * pairs, s.K, chunks)
        seen = kv * np.where(s.layout == "zigzag", 0.5, 1)  # of the keys of another rank
        cast = on.moves(q * (s.e + WIDE), 2 * chunks * ring * (s.e != WIDE), "copy")  # to fp32 and back
        if way == "forward":
            own += cast + on.moves(2 * s.e * kv, chunks * ring, "copy")
            return own, visiting + on.kernel("merge", q, s.e, chunks)
        if s.queries:
            return own + self.sums_of_rows(chunks, ring), visiting + self.queries_visit(q, seen, chunks)
        kv_sum = on.moves((s.e + 2 * s.e_g) * seen / 2, 2 * chunks)
        own += (
            cast
            + on.moves((s.e + 2 * s.e_g) * kv / 2, 2 * chunks * ring)
            + on.moves((s.e_g + s.e) * kv, chunks * ring * (s.e_g != s.e), "copy")
        )
        own += on.moves(s.e_g * kv, chunks * ring, "copy")  # zeros, to which the first rank adds
        return own, visiting + on.moves((s.e + 2 * WIDE) * q, chunks) + kv_sum

    def sums_of_rows(self, chunks: Amount, ring: Amount) -> Work:
        """Of dO * O, in fp32; and q with dO, to travel. At home: dq in its own dtype, zeros to which the first adds."""
        s, on, q = self.s, self.on, self.s.q / self.s.e / self.s.head_chunks
        there = on.moves(4 * s.e * q, chunks * ring, "copy") + on.moves((s.e + WIDE) * q, chunks * ring, "copy")
        there += on.moves((s.e + 2 * WIDE) * q, chunks * ring) + on.moves(WIDE * q, chunks * ring)
        kv = 2 * s.kv / s.e / s.head_chunks
        there += on.moves(2 * (s.e + WIDE) * kv / 2, 2 * chunks * ring * (s.e != WIDE), "copy")
        return there + on.moves(s.e_g * q, chunks * ring, "copy") + on.moves((s.e + 2 * s.e_g) * q, chunks * ring)

    def queries_visit(self, q: Amount, seen: Amount, chunks: Amount) -> Work:
        """An output with the rows' sums is made; what is added to dq, and to dk and dv here."""
        s, on = self.s, self.on
        out = on.moves(s.e * q, chunks) + on.moves(2 * s.e * q, chunks) + on.moves(2 * WIDE * q / s.K, 3 * chunks)
        return out + on.moves((s.e + 2 * s.e_g) * q, chunks) + on.moves((s.e + 2 * WIDE) * seen / 2, 2 * chunks)

    def grid_besides(self, way: str) -> Work:
        """Of others' queries the first block is no sum of several yet; in backward all are. And what goes home."""
        s, on = self.s, self.on
        others, q, kv = s.inner - 1, s.q / s.e, 2 * s.kv / s.e
        if way == "forward":
            first = on.moves(s.e * q, others, "copy") + self.copy(s.q, others)
            cast = on.moves((s.e + WIDE) * q, others * (s.e != WIDE), "copy")
            return first + cast + on.moves((s.e + WIDE) * q, others, "copy")
        zeros = on.moves(WIDE * q, s.inner + 1, "copy") + on.moves(WIDE * kv, s.r / s.inner, "copy")
        cast = on.moves((WIDE + s.e_g) * s.inner * q, s.e_g != WIDE, "copy")
        cast += on.moves((WIDE + s.e_g) * s.r / s.inner * kv, s.e_g != WIDE, "copy")
        return self.copy(3 * s.q) + zeros + cast + on.moves((s.e_g + 2 * WIDE) * q, 1)

    def heads_for_tokens(self, way: str) -> Work:
        """Each of q, k, v and out is put in order once, on one side of its exchange; for several sequences on both."""
        s, chunks = self.s, self.s.head_chunks
        times = chunks * (s.u > 1) * (1 + (s.B > 1))
        copies = self.copy(s.q / chunks, 2 * times) + self.copy(s.kv / chunks, 2 * times)
        if way == "backward":  # of the heads' chunks, even if there is one alone, gradients are put together
            dealt = any(line.kind == "all_to_all" for part in self.account.attention for line in part(s))
            copies += self.copy(s.q, int(dealt)) + self.copy(s.kv, 2 * dealt)
        if s.packed:
            copies += self.copy((s.q + 2 * s.kv) / chunks, chunks * (s.u > 1))
        return (
            copies
            + self.copy(s.kv * (1 + 1 / s.rho) / 2, 2 * (s.rho > 1))
            + self.copy(s.q, s.u > 1 if chunks > 1 else 0)
        )

    def heads_in_stages(self, way: str) -> Work:
        """As above for each stage, in backward for all that comes again and all that goes; and into stages and out.

        The gradients of k and v are summed in fp32 where several stages share them.
        """
        s, (n, n_kv, _) = self.s, self.stages
        q, kv, times = s.q / n, s.kv / n_kv, (s.u > 1) * (1 + (s.B > 1))
        once = self.copy(q, 2 * n * times) + self.copy(kv, 2 * n_kv * times)
        once += self.copy(kv * (1 + 1 / s.rho) / 2, 2 * n_kv * (s.rho > 1))
        if way == "forward":
            return once + self.copy(s.q)
        shared, wider = n > n_kv, WIDE / s.e
        sums = self.copy(kv * (1 + wider) / 2, 4 * n_kv * shared * (wider > 1))
        sums += self.on.moves(kv * (1 + 2 * wider), 2 * (n - n_kv))
        return once * 2 + self.copy(q, 2 * n * (n > 1)) + sums

    def copy(self, size: Amount, calls: Amount = 1) -> Work:
        """Of so many bytes, read and written."""
        return self.on.moves(2 * size, calls, "copy")

    def between(self, way: str) -> Work:
        """Between a block's matrices: norms, rotary embedding, SwiGLU, residuals, and sums of gradients."""
        s, gate = self.s, self.matrices[4]
        x, inside = self.account.between(s) * s.d, (s.tokens * s.d, gate.tokens * s.d)
        q, k = s.tokens * s.h * s.K / s.tp, s.tokens * s.kv_heads * s.K
        wide = gate.tokens * gate.weight.rows * gate.shards / gate.pieces
        pieces, chunked = gate.pieces, s.mlp_chunks > 1

        def kernels(way: str, residuals: int) -> Work:
            found = self.on.kernel(f"norm{way}", x, s.e, 2) + self.on.kernel(f"swiglu{way}", wide, s.e, pieces)
            found += self.on.kernel(f"rotary{way}", q, s.e) + self.on.kernel(f"rotary{way}", k, s.e)
            return found + self.on.kernel("other", x, s.e, residuals)

        if way != "backward":  # the last residual is nothing that backward needs
            return kernels("", 2 if way == "forward" else 1) + self.copy(x * s.e, int(chunked))
        found = kernels(" backward", 2)
        if self.account.staged:  # q and k are rotated again, and weights and their gradients put in order by stages
            found += self.on.kernel("rotary", q, s.e) + self.on.kernel("rotary", k, s.e)
        for half, (elements, sums) in enumerate(zip(inside, (sum(self.stages) - 1, 1), strict=True)):
            found += self.on.kernel("other", elements, s.e, 0 if self.together(half) else sums)
        if s.selective:
            found += self.on.kernel("norm", x, s.e, 2)
        if s.selective or chunked:
            found += self.on.kernel("swiglu", wide, s.e, pieces)
        return found

    def packed(self, line: Sent) -> Work:
        """A sum over tp goes into a copy; parts of several sequences are put in order."""
        s, size = self.s, self.s.D / np.maximum(1, self.pieces(self.s.mlp_chunks))
        if line.of != "D" or alone(s.tp):
            return NOTHING
        return self.copy(size, line.calls if line.kind == "all_reduce" else line.calls * (s.B > 1))

    def weights_of(self, groups: list[Group], way: str) -> Work:
        """Weights as they arrive, and their gradients as they leave: with FSDP2 copied to and from the messages.

        On a GPU what it does to a rank's shard, it does aside.
        """
        s, on, found = self.s, self.on, NOTHING
        for group in groups:
            size, n = sum(weight.rows * weight.columns for weight in group.weights), len(group.weights)
            shard = size / group.ranks
            if s.stage < 2 or alone(group.ranks):
                each = 3 * s.e if s.e_dw == s.e else 2 * s.e_dw + s.e
                found += on.moves(each * size / n, n * (way == "backward"))
                continue
            if way == "forward" or s.stage == 3:
                cast = on.moves((s.e_w + s.e) * shard / n, n * (s.e_w != s.e), "copy")
                found += self.copy(s.e * size) + on.aside(cast + self.copy(s.e * shard)) + on.groups(1)
            if way == "backward":
                cast = on.moves((s.e_dw + s.e_w) * shard / n, n * (s.e_dw != s.e_w), "copy")
                found += on.moves((s.e + s.e_dw) * size, 1, "copy") + on.aside(
                    cast + on.moves(3 * s.e_w * shard / n, n)
                )
                found += on.groups(1)
        return found

    def angles(self) -> Work:
        """The cosine and sine of every position's, in some nine steps."""
        return self.copy(self.s.tokens / self.s.B * self.s.K * self.s.e, 9)

    def of_tokens(self, calls: Amount) -> Work:
        """Kernels with a number or two for every token: of few tokens, the time to launch them."""
        return self.on.moves(2 * WIDE * self.s.tokens / self.head.pieces, calls)

    def parts_of_norms(self) -> Work:
        """Gradients of which tp ranks have a part: into one buffer, and back."""
        split = not (alone(self.s.tp) or self.account.whole_norms)
        return self.copy(self.s.d * WIDE, split * (2 * self.s.layers + 4))

    def embedding(self, way: str) -> Work:
        """Rows of the table; with tp, zeros where another rank has it."""
        s, table = self.s, self.ends[0].weights[0]
        rows = self.copy(s.tokens * s.d * s.e)
        found = self.weights_of(self.ends[:1], way)
        if self.account.linears:  # also along an axis of one rank
            found += rows + self.of_tokens(5 if way == "forward" else 0)
        if way == "backward":
            return found + self.on.moves(s.e * (s.tokens + table.rows) * s.d)
        return found + rows

    def loss(self, way: str) -> Work:
        """The last norm, the logits and their loss, in fp32 over the vocabulary; in pieces, each run again."""
        s, on, x, again = self.s, self.on, self.account.between(self.s) * self.s.d, self.s.loss_chunks > 1
        pieces = self.head.pieces
        logits = self.head.tokens * self.head.weight.rows / pieces
        cast = on.moves((s.e + WIDE) * logits, pieces * (s.e != WIDE), "copy")
        if alone(s.tp):  # log-softmax read and written; in backward the labels' gradient too, and its own
            there = on.moves(2 * WIDE * logits, pieces) + self.of_tokens(2 * pieces)
            back = on.moves((1 + 3) * WIDE * logits / 2, 2 * pieces)
        else:  # the highest; exponentials of differences, in two steps; their sum; divided by it; in backward scaled
            there = on.moves(s.e * logits, pieces) + on.moves(7 * WIDE * logits / 4, 4 * pieces)
            there += self.of_tokens(20 * pieces)
            back = on.moves(2 * WIDE * logits, pieces) + self.of_tokens(4 * pieces)
        there += cast + self.products("y", [self.head])
        found = self.weights_of(self.ends[1:], way)
        if way == "forward":
            return found + on.kernel("norm", x, s.e) + there
        found += back + cast + self.products("xW", [self.head]) + on.kernel("norm backward", x, s.e)
        return found + (there if again else NOTHING) + self.copy(x * s.e, int(again)) + self.summed([self.head])

    def update(self) -> Work:
        """The gradient's norm, clipping, AdamW, gradients zeroed, and new weights from masters."""
        s, on, found, scaled, zeroed = self.s, self.on, NOTHING, 0.0, 0.0
        shares = weights.shares([*self.account.groups(s), *self.ends], s)
        for share in shares:
            each, n = share.trained / share.tensors, share.tensors
            e_dw = s.e_w if share.by_fsdp2 else s.e_dw
            scaled, zeroed = scaled + share.trained, zeroed + share.held * e_dw
            if s.clipping:  # in fp32: its square, their sum, and that once for all who have it
                found += on.moves(2 * WIDE * each, n) + on.moves(WIDE * each, n) + on.moves(WIDE, n)
                found += on.moves((e_dw + WIDE) * each, n * (e_dw != WIDE), "copy")
            found += on.moves((e_dw + s.e_w) * each, n * (e_dw != s.e_w), "copy")
            found += on.moves((s.e_w + s.e) * each, n * (not share.by_fsdp2 and s.e_w != s.e), "copy")
            found += self.copy(s.e * share.held, int(s.stage == 1 and not alone(s.sharing)))
        clipped = on.moves(2 * s.e_w * scaled, int(s.clipping)) + on.moves(WIDE, 8 * s.clipping)
        return found + clipped + on.kernel("optimizer", scaled, s.e_w) + on.moves(zeroed, 1, "copy")
