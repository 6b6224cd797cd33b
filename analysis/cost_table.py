"""What a training step sends and keeps, derived by hand from each strategy's paper.

It imports nothing of strategies/ or bench/: a prediction must not be computed by the code that it judges. The formulas
are plain arithmetic on letters. Give them a configuration's numbers (`Letters.of`) and they return bytes; give them
sympy's symbols (analysis/symbols.py) and they return the expressions of the printed table.

f(P) = (P-1)/P of a group of P ranks. AG an all_gather of S bytes (its output), RS a reduce_scatter of S (its input):
each rank sends f S. AR an all_reduce: 2 f S. A2A, an all_to_all of a local buffer S: f S. A hop sends what it carries.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil
from numbers import Number

BYTES = {"fp32": (4, 4), "bf16": (2, 2), "bf16_mixed": (4, 2)}  # of a weight (and its gradient), of an activation
WIDE = 4  # bytes of what is always exchanged in fp32
SHORT = {"all_gather": "AG", "reduce_scatter": "RS", "all_reduce": "AR", "all_to_all": "A2A", "p2p": "hop"}


def f(p):
    """The part of a group's data that is not a rank's own."""
    return 0 if p == 1 else (p - 1) / p


def whole(x):
    """A number rounded up; a symbol as it is."""
    return ceil(x) if isinstance(x, Number) else x


@dataclass(frozen=True)
class Sent:
    """What a rank sends in one phase by one kind of collective: so many calls with a payload `of`, so many bytes."""

    phase: str  # forward | recompute | backward | optimizer
    kind: str
    of: str
    calls: object
    bytes: object
    weights: bool = False  # weights or their gradients, not activations

    def times(self, n) -> "Sent":
        return replace(self, calls=n * self.calls, bytes=n * self.bytes)


def all_gather(phase: str, p, size, of: str, calls=1, weights: bool = False) -> Sent:
    return Sent(phase, "all_gather", of, calls, f(p) * size, weights)


def reduce_scatter(phase: str, p, size, of: str, calls=1, weights: bool = False) -> Sent:
    return Sent(phase, "reduce_scatter", of, calls, f(p) * size, weights)


def all_reduce(phase: str, p, size, of: str, calls=1, weights: bool = False) -> Sent:
    return Sent(phase, "all_reduce", of, calls, 2 * f(p) * size, weights)


def all_to_all(phase: str, p, size, of: str, calls) -> Sent:
    return Sent(phase, "all_to_all", of, calls, f(p) * size)


@dataclass
class Letters:
    """One configuration in the letters of the formulas, on the rank with the most sequences."""

    B: object  # sequences of a dp rank
    L: object  # tokens of a sequence
    d: object
    i: object
    h: object
    h_kv: object
    K: object
    V: object
    layers: object
    dp: object
    tp: object
    u: object
    r: object
    e: object  # bytes of an activation
    e_w: object  # of a weight, its gradient, and each of its two moments
    e_g: object  # of a travelling dK or dV
    rho: object = 1  # copies of a kv head that ulysses needs
    kv_shared: object = 1  # tp ranks that share a kv head
    stage: int = 3
    recompute: bool = False
    mlp_chunks: int = 1
    loss_chunks: int = 1
    packed: bool = False
    head_chunks: int = 1
    gather_kv: bool = False
    tied: bool = False
    clipping: bool = True

    @classmethod
    def of(cls, config: dict) -> "Letters":
        """The numbers of a resolved configuration."""
        model, mesh = config["model"], config["mesh"]
        e_w, e = BYTES[config["precision"]]
        h_kv, tp = model["n_kv_heads"], mesh["tp"]
        return cls(
            B=max(1, ceil(config["batch_size"] / mesh["dp"])),
            L=config["seq_len"],
            d=model["dim"],
            i=model["ffn_dim"],
            h=model["n_heads"],
            h_kv=h_kv,
            K=model["head_dim"],
            V=model["vocab_size"],
            layers=model["n_layers"],
            dp=mesh["dp"],
            tp=tp,
            u=mesh["ulysses"],
            r=mesh["ring"],
            e=e,
            e_w=e_w,
            e_g=WIDE if config["ring"]["grad_dtype"] == "fp32" else e,
            rho=max(1, mesh["ulysses"] // max(1, h_kv // tp)),
            kv_shared=max(1, tp // h_kv),
            stage=config["zero_stage"],
            recompute=config["recompute"] == "block",
            mlp_chunks=config["mlp"]["chunks"],
            loss_chunks=config["loss"]["chunks"],
            packed=config["ulysses"]["packed"],
            head_chunks=config["ulysses"]["chunks"],
            gather_kv=config["ring"]["kv"] == "all_gather",
            tied=model["tie_embeddings"],
            clipping=config["optim"]["grad_clip"] is not None,
        )

    @property
    def tokens(self):
        """T: of a tp group, between the attentions."""
        return self.B * self.L / (self.u * self.r)

    @property
    def D(self):
        """Bytes of a tp group's activation."""
        return self.tokens * self.d * self.e

    @property
    def q(self):
        """Bytes of a rank's queries."""
        return self.tokens * self.h * self.K / self.tp * self.e

    @property
    def kv(self):
        """Bytes of a rank's keys, and of its values, copies included."""
        return self.tokens * self.rho * self.kv_heads * self.K * self.e

    @property
    def kv_heads(self):
        """Of a tp rank."""
        return self.h_kv * self.kv_shared / self.tp

    @property
    def sharing(self):
        """Ranks that hold different tokens, over which ZeRO shards."""
        return self.dp * self.u * self.r

    def pieces(self, chunks: int, tp) -> tuple[int, object]:
        """How many pieces a rank's 1/tp of the tokens is cut into, at most `chunks`; which part the last one is."""
        if chunks == 1:
            return 1, 1
        here = self.L // (self.u * self.r * tp)
        size = ceil(here / chunks)
        pieces = ceil(here / size)
        return pieces, (here - (pieces - 1) * size) / here


# What a block exchanges beside its weights. Recomputation stops as soon as backward has what it needs.


def tp_linears(s: Letters) -> list[Sent]:
    """Megatron's f and g (Shoeybi et al. 2019, section 3)."""
    again = int(s.recompute)  # attention's output, not the MLP's
    return [
        all_reduce("forward", s.tp, 2 * s.D, "D", 2),
        all_reduce("recompute", s.tp, again * s.D, "D", again),
        all_reduce("backward", s.tp, 2 * s.D, "D", 2),
    ]


def tp_sp_linears(s: Letters) -> list[Sent]:
    """Korthikanti et al. 2022, section 4.2.2: what was gathered is gathered again for the weights' gradient, not kept.

    Recomputed are the AG and RS of attention and the AG of the MLP. An MLP in chunks repeats its AG by itself, and
    leaves to the block's recomputation the AG and RS of all chunks but the last, whose input backward asks for first.
    """
    again, (n, last) = int(s.recompute), s.pieces(s.mlp_chunks, s.tp)
    if s.mlp_chunks == 1:
        repeated = [
            all_gather("recompute", s.tp, 2 * again * s.D, "D", 2 * again),
            reduce_scatter("recompute", s.tp, again * s.D, "D", again),
        ]
    else:
        others = again * (1 - last)
        repeated = [
            all_gather("recompute", s.tp, (again + 1 + others) * s.D, "D", again + n + again * (n - 1)),
            reduce_scatter("recompute", s.tp, (again + others) * s.D, "D", again * n),  # attention's, and n - 1
        ]
    return [
        all_gather("forward", s.tp, 2 * s.D, "D", 1 + n),
        reduce_scatter("forward", s.tp, 2 * s.D, "D", 1 + n),
        *repeated,
        all_gather("backward", s.tp, 4 * s.D, "D", 2 + 2 * n),
        reduce_scatter("backward", s.tp, 2 * s.D, "D", 1 + n),
    ]


def odysseus_linears(s: Letters) -> list[Sent]:
    """TP-SP's for attention, none for the MLP (Fang 2024)."""
    again = int(s.recompute)
    return [
        all_gather("forward", s.tp, s.D, "D"),
        reduce_scatter("forward", s.tp, s.D, "D"),
        all_gather("recompute", s.tp, again * s.D, "D", again),
        reduce_scatter("recompute", s.tp, again * s.D, "D", again),
        all_gather("backward", s.tp, 2 * s.D, "D", 2),
        reduce_scatter("backward", s.tp, s.D, "D"),
    ]


def exchanges(s: Letters) -> list[Sent]:
    """Heads for tokens and back: q, k, v, out, and their gradients (Jacobs et al. 2023, section 3)."""
    again, calls = int(s.recompute), s.head_chunks * (2 if s.packed else 4)
    size = 2 * s.q + 2 * s.kv
    of = "q, k, v, out" if s.packed else "q; k; v; out"
    return [
        all_to_all("forward", s.u, size, of, calls),
        all_to_all("recompute", s.u, again * size, of, again * calls),
        all_to_all("backward", s.u, size, of, calls),
    ]


def hops(s: Letters) -> list[Sent]:
    """Keys and values around the ring, in backward again, and their gradients (Liu et al. 2023).

    With ring.kv=all_gather they are gathered, and their gradients reduce-scattered (Llama 3, section 3.3.2).
    """
    again, n = int(s.recompute), s.r - 1
    kv, grads = n * 2 * s.kv, n * 2 * s.kv / s.e * s.e_g
    calls = 1 if s.gather_kv else n
    kind, summed = ("all_gather", "reduce_scatter") if s.gather_kv else ("p2p", "p2p")
    return [
        Sent("forward", kind, "k, v", calls, kv),
        Sent("recompute", kind, "k, v", again * calls, again * kv),
        Sent("backward", kind, "k, v", calls, kv),
        Sent("backward", summed, "dk, dv", calls, grads),
    ]


def hops_of_chunks(s: Letters) -> list[Sent]:
    """Inside exchanges: one chunk of the heads after the other goes around the ring."""
    return [replace(line, calls=s.head_chunks * line.calls) for line in hops(s)]


# What the embedding and the head exchange where they split the vocabulary.


def vocab_loss(s: Letters, pieces: int) -> list[Sent]:
    """Three fp32 numbers a token: the highest logit; the sum of exponentials and the label's logit."""
    calls = 2 * pieces
    size = 3 * s.tokens * WIDE
    chunked = int(s.loss_chunks > 1)
    return [
        all_reduce("forward", s.tp, size, "3 T", calls),
        all_reduce("recompute", s.tp, chunked * size, "3 T", chunked * calls),
    ]


def tp_ends(s: Letters) -> list[Sent]:
    """The embeddings' sum; the gradient of the head's input."""
    n, _ = s.pieces(s.loss_chunks, 1)
    return [
        all_reduce("forward", s.tp, s.D, "D"),
        all_reduce("backward", s.tp, s.D, "D", n),
        *vocab_loss(s, n),
    ]


def tp_sp_ends(s: Letters) -> list[Sent]:
    """The embeddings' sum, split; the head's input gathered, in backward again, and in chunks once more."""
    chunked, (n, _) = int(s.loss_chunks > 1), s.pieces(s.loss_chunks, s.tp)
    return [
        reduce_scatter("forward", s.tp, s.D, "D"),
        all_gather("forward", s.tp, s.D, "D", n),
        all_gather("recompute", s.tp, chunked * s.D, "D", chunked * n),
        all_gather("backward", s.tp, 2 * s.D, "D", 1 + n),
        reduce_scatter("backward", s.tp, s.D, "D", n),
        *vocab_loss(s, n),
    ]


BLOCK = {  # strategy -> what its block exchanges: "X is Y with Z" as a table
    "single": [],
    "zero": [],
    "tp": [tp_linears],
    "tp_sp": [tp_sp_linears],
    "ulysses": [exchanges],
    "ring": [hops],
    "usp": [exchanges, hops_of_chunks],
    "tp_usp": [tp_sp_linears, exchanges, hops_of_chunks],
    "odysseus": [odysseus_linears, hops],
}
ENDS = {"tp": tp_ends, "tp_sp": tp_sp_ends, "tp_usp": tp_sp_ends, "odysseus": tp_sp_ends}
SPLIT_BY_TP = ("tp_sp", "tp_usp", "odysseus")  # the norms see 1/tp of the tokens


# Weights: which a rank holds, and what ZeRO sends of them.


@dataclass(frozen=True)
class Weight:
    """A tp rank's slice of a matrix or a norm, and how it is cut: by `tp`, as a shared `kv` head, or `not`."""

    rows: object
    columns: object
    cut: str


def norm(s: Letters) -> Weight:
    return Weight(s.d, 1, "not")


def attention_weights(s: Letters) -> list[Weight]:
    kv = Weight(s.kv_heads * s.K, s.d, "kv" if s.kv_shared != 1 else "tp")
    return [Weight(s.h * s.K / s.tp, s.d, "tp"), kv, kv, Weight(s.d, s.h * s.K / s.tp, "tp")]


def mlp_weights(s: Letters, tp) -> list[Weight]:
    wide = whole(s.i / tp)
    return [Weight(wide, s.d, "tp"), Weight(wide, s.d, "tp"), Weight(s.d, wide, "tp")]


@dataclass(frozen=True)
class Group:
    """Weights that travel together along an axis of so many ranks, `times` times a model."""

    weights: list[Weight]
    ranks: object
    times: object = 1
    axis: str = "zero"


def block_groups(name: str, s: Letters) -> list[Group]:
    """A block's; Odysseus' MLP is whole on every rank, and sharded over all of them."""
    if name == "odysseus":
        rest = [*attention_weights(s), norm(s), norm(s)]
        return [Group(rest, s.sharing, s.layers), Group(mlp_weights(s, 1), s.sharing * s.tp, s.layers, "world")]
    return [Group([*attention_weights(s), *mlp_weights(s, s.tp), norm(s), norm(s)], s.sharing, s.layers)]


def end_groups(s: Letters) -> list[Group]:
    table = Weight(whole(s.V / s.tp), s.d, "tp")
    if s.tied:
        return [Group([table, norm(s)], s.sharing)]
    return [Group([table], s.sharing), Group([table, norm(s)], s.sharing)]


def zero(group: Group, s: Letters) -> list[Sent]:
    """Stage 3: AG forward, AG backward, RS. 2: AG, RS. FSDP2 cuts dim 0 of every weight into `ranks` parts, padded.

    Below stage 2: AR of the gradients (0), or RS of them and AG of the weights (1), once a step for the whole model.
    """
    p = group.ranks
    if s.stage < 2:
        size = sum(w.rows * w.columns for w in group.weights) * s.e_w
        if s.stage == 0:
            return [all_reduce("backward", p, size, "P", 0, True)]
        return [reduce_scatter("backward", p, size, "P", 0, True), all_gather("optimizer", p, size, "P", 0, True)]
    elements = sum(whole(w.rows / p) * p * w.columns for w in group.weights)
    lines = [all_gather("forward", p, elements * s.e, "P", weights=True)]
    if s.stage == 3:
        lines.append(all_gather("backward", p, elements * s.e, "P", weights=True))
    return [*lines, reduce_scatter("backward", p, elements * s.e_w, "P", weights=True)]


def buffers(groups: list[Group], s: Letters) -> list[tuple[object, object]]:
    """Below stage 2: one buffer for all weights that are cut alike and shared by the same ranks: ranks, elements.

    It is padded to equal parts.
    """
    alike: dict[tuple, object] = {}
    for group in groups:
        for w in group.weights:
            key = group.axis, group.ranks, w.cut if s.tp != 1 and group.axis == "zero" else "not"
            alike[key] = alike.get(key, 0) + group.times * w.rows * w.columns
    return [(p, whole(elements / p) * p) for (_, p, _), elements in alike.items()]


def once(name: str, s: Letters) -> list[Sent]:
    """At a step's end: gradients that tp ranks hold parts of, summed in fp32, and the gradient's norm."""
    cut = s.sharing if s.stage else 1  # where ZeRO has sharded them already
    lines = []
    if name in SPLIT_BY_TP:
        norms = (2 * s.layers + 1) * whole(s.d / cut)
        lines.append(all_reduce("backward", s.tp, norms * WIDE, "norms", weights=True))
    if s.kv_shared != 1:
        elements = s.layers * whole(2 * s.K * s.d / cut)
        lines.append(all_reduce("backward", s.kv_shared, elements * WIDE, "kv heads", weights=True))
    if s.clipping:
        lines.append(all_reduce("optimizer", s.sharing * s.tp, WIDE, "norm", weights=True))
    return lines


def of_block(name: str, s: Letters) -> list[Sent]:
    """What one block sends, forward and backward."""
    lines = [line for part in BLOCK[name] for line in part(s)]
    if name != "single":
        lines += [line for group in block_groups(name, s) for line in zero(group, s)]
    return sent(lines)


def of_step(name: str, s: Letters) -> list[Sent]:
    """What a whole training step sends: blocks, embedding, head, clipping."""
    lines = [line.times(s.layers) for part in BLOCK[name] for line in part(s)]
    lines += ENDS[name](s) if name in ENDS else []
    groups = [*block_groups(name, s), *end_groups(s)]
    if s.stage < 2:
        for p, elements in buffers(groups, s):
            lines += [replace(line, calls=1) for line in zero(Group([Weight(elements, 1, "not")], p), s)]
    else:
        lines += [line.times(group.times) for group in groups for line in zero(group, s)]
    return sent([*lines, *once(name, s)])


def of_attention(name: str, s: Letters, backward: bool) -> list[Sent]:
    """workload=attention: what is exchanged between the projections of one block."""
    parts = [part for part in BLOCK[name] if part in (exchanges, hops, hops_of_chunks)]
    phases = ("forward", "backward") if backward else ("forward",)
    return sent(line for part in parts for line in part(s) if line.phase in phases)


def sent(lines: Iterable[Sent]) -> list[Sent]:
    return [line for line in lines if line.bytes != 0]


def total(lines: Iterable[Sent], **wanted):
    """The bytes of the lines whose fields are as wanted, e.g. phase="forward", weights=True."""
    return sum(line.bytes for line in lines if all(getattr(line, key) == value for key, value in wanted.items()))


# Memory.


def saved_by_block(name: str, s: Letters):
    """Bytes that a block keeps for its backward.

    Between the matrices: both norms' inputs and outputs, each [T, d] (their 1/rms in fp32 beside). In attention q, out,
    k and v, and the log-sum-exp of every head. In the MLP gate, silu(gate), up and their product, each [T, i].
    """
    between = s.tokens if name == "tp" else s.tokens / s.tp
    if s.recompute:
        return between * s.d * s.e
    norms = between * (4 * s.d * s.e + 2 * WIDE)
    out = 2 if exchanges in BLOCK[name] and s.u != 1 else 1  # as attention made it, and as it came home
    attention = (1 + out) * s.q + 2 * s.kv + s.tokens * s.h / s.tp * WIDE
    mlp = 0 if s.mlp_chunks > 1 else 4 * s.tokens / s.tp * s.i * s.e
    return norms + attention + mlp


def saved_by_ends(name: str, s: Letters):
    """Bytes that the embedding, the head and the loss keep: tokens, the norm's in and out, probabilities in fp32.

    And the tables of rotary angles, a cosine and a sine for every position and dim of a head.
    """
    between = s.tokens if name == "tp" else s.tokens / s.tp
    probabilities = 0 if s.loss_chunks > 1 else s.tokens * s.V / s.tp * WIDE
    rope = 2 * s.tokens / s.B * s.K * s.e
    return between * (2 * s.d * s.e + WIDE) + probabilities + rope + s.tokens * 8


def state(name: str, s: Letters, ends: bool = True) -> dict[str, object]:
    """Bytes of params, grads and optimizer that a rank keeps: two moments, and AdamW's step count for every tensor."""
    groups = block_groups(name, s) + (end_groups(s) if ends else [])
    if s.stage < 2:
        parts = [(elements, elements / p if s.stage == 1 else elements, 1) for p, elements in buffers(groups, s)]
    else:
        parts = []
        for group in groups:
            for w in group.weights:
                shard = group.times * whole(w.rows / group.ranks) * w.columns
                parts.append((shard, shard, group.times))
    held, trained, tensors = (sum(column) for column in zip(*parts, strict=True))
    return {"params": held * s.e_w, "grads": held * s.e_w, "optimizer": 2 * trained * s.e_w + WIDE * tensors}


def predicted(config: dict) -> list[Sent] | None:
    """What a resolved configuration sends in a step; None for a strategy that has no formula here."""
    name = config["strategy"]["name"]
    if name not in BLOCK:
        return None
    letters = Letters.of(config)
    if config["workload"] == "attention":
        return of_attention(name, letters, config["direction"] == "forward_backward")
    return of_step(name, letters)


def step_bytes(config: dict) -> int | None:
    """The bytes that the busiest rank sends in a step of a resolved configuration; None without a formula."""
    lines = predicted(config)
    return None if lines is None else round(total(lines))
