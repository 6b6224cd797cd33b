"""The bytes that a training step sends, derived by hand from each strategy's paper.

It imports nothing of strategies/ or bench/: a prediction must not be computed by the code that it judges.

f = (P-1)/P of a group of P ranks. AG an all_gather of S bytes (its output), RS a reduce_scatter of S (its input): each
rank sends f S. AR an all_reduce: 2 f S. A2A of a local buffer S: f S. A hop sends what it carries.
"""

from dataclasses import dataclass
from math import ceil, prod

BYTES = {"fp32": (4, 4), "bf16": (2, 2), "bf16_mixed": (4, 2)}  # of a weight (and its gradient), of an activation
WIDE = 4  # bytes of what is always exchanged in fp32


def f(p: int) -> float:
    return (p - 1) / p


@dataclass
class Step:
    """One configuration in the letters of the formulas, on the rank with the most sequences."""

    config: dict

    def __post_init__(self) -> None:
        c, m, mesh = self.config, self.config["model"], self.config["mesh"]
        self.dp, self.tp, self.u, self.r = (mesh[axis] for axis in ("dp", "tp", "ulysses", "ring"))
        self.d, self.i, self.vocab, self.layers = m["dim"], m["ffn_dim"], m["vocab_size"], m["n_layers"]
        self.d_q, self.d_k = m["n_heads"] * m["head_dim"], m["n_kv_heads"] * m["head_dim"]
        self.n_kv_heads, self.head_dim, self.tied = m["n_kv_heads"], m["head_dim"], m["tie_embeddings"]
        self.e_weight, self.e = BYTES[c["precision"]]
        self.e_grad_kv = WIDE if c["ring"]["grad_dtype"] == "fp32" else self.e
        self.passes = 2 if c["recompute"] == "block" else 1  # forwards of what a block keeps nothing of
        self.mlp_passes = 2 if c["mlp"]["chunks"] > 1 else 1
        self.loss_passes = 2 if c["loss"]["chunks"] > 1 else 1
        self.stage = c["zero_stage"]
        sequences = max(1, ceil(c["batch_size"] / self.dp))
        self.tokens = sequences * c["seq_len"] / (self.u * self.r)  # that a tp group sees, between the attentions
        self.q, self.kv = self.d_q / self.tp, max(self.d_k / self.tp, self.head_dim)  # a rank's part of a token's q, k
        self.rho = max(1, self.u / max(1, self.n_kv_heads / self.tp))  # copies of a kv head that ulysses needs
        self.grad_shards = self.dp * self.u * self.r if self.stage else 1  # once reduced, where ZeRO shards them
        here = c["seq_len"] // (self.u * self.r * self.tp)
        self.last_chunk = ((here - 1) % ceil(here / c["mlp"]["chunks"]) + 1) / here  # its part of an MLP's tokens
        self.world = self.dp * self.tp * self.u * self.r

    def zero(self, shapes: list[tuple[int, ...]], ranks: int) -> float:
        """Stage 0: AR of the gradients; 1: RS of them, AG of the weights; 2: AG, RS; 3: AG twice, RS.

        FSDP2 (2 and 3) cuts dim 0 of every weight, and pads it to do so.
        """
        if self.stage < 2:
            return 2 * f(ranks) * sum(prod(shape) for shape in shapes) * self.e_weight
        padded = sum(ceil(rows / ranks) * ranks * prod(columns) for rows, *columns in shapes)
        return f(ranks) * padded * ((self.stage - 1) * self.e + self.e_weight)

    def attention_shapes(self, tp: int = 1) -> list[tuple[int, ...]]:
        kv = max(self.d_k // tp, self.head_dim)
        return [(self.d_q // tp, self.d), (kv, self.d), (kv, self.d), (self.d, self.d_q // tp)]

    def mlp_shapes(self, tp: int = 1) -> list[tuple[int, ...]]:
        return [(ceil(self.i / tp), self.d)] * 2 + [(self.d, ceil(self.i / tp))]

    def zero_model(self, mlp: bool = True) -> float:
        """ZeRO over all ranks with different tokens, of what tp leaves to each, with or without the MLPs."""
        ranks = self.dp * self.u * self.r
        norms = [(self.d,), (self.d,)]
        block = self.attention_shapes(self.tp) + (self.mlp_shapes(self.tp) if mlp else []) + norms
        vocab = [(ceil(self.vocab / self.tp), self.d)]
        ends = vocab + [(self.d,)] + ([] if self.tied else vocab)
        return self.layers * self.zero(block, ranks) + self.zero(ends, ranks)


def single(s: Step) -> float:
    return 0.0


def zero(s: Step) -> float:
    """2 AG(P) + RS(P)."""
    return s.zero_model()


def vocab_loss(s: Step) -> float:
    """AR of three fp32 numbers a token: its highest logit, its sum of exponentials, its label's logit."""
    return s.loss_passes * 2 * f(s.tp) * 3 * s.tokens * WIDE


def shared_kv_heads(s: Step) -> float:
    """AR, in fp32, of the gradients of k and v weights that rho = tp / n_kv_heads ranks share."""
    rho = max(1, s.tp // s.n_kv_heads)
    return s.layers * 2 * f(rho) * ceil(2 * s.head_dim * s.d / s.grad_shards) * WIDE


def norms(s: Step) -> float:
    """AR, in fp32, of the norms' gradients, each of which saw its own tokens only."""
    return 2 * f(s.tp) * (2 * s.layers + 1) * ceil(s.d / s.grad_shards) * WIDE


def tp(s: Step) -> float:
    """A block: 2 AR(D) forward, 2 AR(D) backward, and one more where recomputation needs attention's output."""
    block = (4 + s.passes - 1) * 2 * f(s.tp) * s.tokens * s.d * s.e
    ends = 2 * 2 * f(s.tp) * s.tokens * s.d * s.e  # AR of the embeddings, AR of the gradient of the head's input
    return s.layers * block + ends + vocab_loss(s) + shared_kv_heads(s) + s.zero_model()


def tp_sp_ends(s: Step) -> float:
    """RS and AG of the embeddings, 2 AG and RS at the head; in chunks, one AG more."""
    return f(s.tp) * s.tokens * s.d * (4 + s.loss_passes) * s.e + vocab_loss(s)


def tp_sp(s: Step) -> float:
    """A block: 6 AG(D) + 4 RS(D).

    Recomputed, the AG and RS of attention once more, and the AG of the MLP. An MLP in chunks repeats its AG by itself,
    and leaves to the block's recomputation the AG and RS of all chunks but the last, which the others' inputs need not.
    """
    again = s.passes - 1
    mlp_again = again if s.mlp_passes == 1 else 1 + again * 2 * (1 - s.last_chunk)
    block = (10 + 2 * again + mlp_again) * f(s.tp) * s.tokens * s.d * s.e
    return s.layers * block + tp_sp_ends(s) + norms(s) + shared_kv_heads(s) + s.zero_model()


def exchanges(s: Step) -> float:
    """Over ulysses: A2A of q, k, v and the output, and of their gradients."""
    return s.layers * (1 + s.passes) * f(s.u) * s.tokens * (2 * s.q + 2 * s.rho * s.kv) * s.e


def hops(s: Step) -> float:
    """Around the ring: r-1 hops of k and v forward, r-1 of them backward, and r-1 of their gradients.

    With ring.kv=all_gather: AG of all k and v forward and backward, RS of their gradients; the same bytes.
    """
    return s.layers * (s.r - 1) * 2 * s.tokens * s.rho * s.kv * ((1 + s.passes) * s.e + s.e_grad_kv)


def ulysses(s: Step) -> float:
    return exchanges(s) + s.zero_model()


def ring(s: Step) -> float:
    return hops(s) + s.zero_model()


def usp(s: Step) -> float:
    return exchanges(s) + hops(s) + s.zero_model()


def tp_usp(s: Step) -> float:
    """TP-SP's linears, with USP's exchanges and hops inside."""
    return tp_sp(s) + exchanges(s) + hops(s)


def attention_alone(s: Step, backward: bool) -> float:
    """workload=attention: what is exchanged between the projections of one block."""
    sent = f(s.u) * s.tokens * (2 * s.q + 2 * s.rho * s.kv) * s.e * (1 + backward)
    return sent + (s.r - 1) * 2 * s.tokens * s.rho * s.kv * (s.e + backward * (s.e + s.e_grad_kv))


def odysseus(s: Step) -> float:
    """A block: 3 AG(D) + 2 RS(D), AG and RS once more if recomputed; ZeRO for the MLP over all ranks; a ring's hops."""
    block = (5 + 2 * (s.passes - 1)) * f(s.tp) * s.tokens * s.d * s.e
    mlp = s.zero(s.mlp_shapes(), s.world)
    return s.layers * (block + mlp) + hops(s) + tp_sp_ends(s) + norms(s) + shared_kv_heads(s) + s.zero_model(mlp=False)


STRATEGIES = {
    "single": single,
    "zero": zero,
    "tp": tp,
    "tp_sp": tp_sp,
    "ulysses": ulysses,
    "ring": ring,
    "usp": usp,
    "tp_usp": tp_usp,
    "odysseus": odysseus,
}


def step_bytes(config: dict) -> int | None:
    """The bytes that the busiest rank sends in a training step of a resolved configuration; None without a formula."""
    formula = STRATEGIES.get(config["strategy"]["name"])
    if formula is None:
        return None
    step = Step(config)
    if config["workload"] == "attention":
        return round(attention_alone(step, config["direction"] == "forward_backward"))
    clipping = config["optim"]["grad_clip"] is not None
    return round(formula(step) + (2 * f(step.world) * WIDE if clipping else 0))
