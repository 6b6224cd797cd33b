"""What an account of a strategy is: what it exchanges and keeps by its paper, what was published, how it is drawn.

A strategy's account is `analysis/accounts/<its name>.py`, written from its paper and read beside `strategies/<its
name>.py`: a prediction must not be computed by the code that it judges. Whatever it leaves out is as by default.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from analysis.accounts import flops, weights
from analysis.accounts.letters import WIDE, Amount, Letters
from analysis.accounts.published import Published
from analysis.accounts.sent import Sent, something
from analysis.accounts.weights import Group
from conf.seen import PAIR, PAIR_BACKWARD

Exchange = Callable[[Letters], list[Sent]]


def kept_by_kernel(s: Letters) -> Amount:
    """What attention's backward needs: q, out, k and v, and the log-sum-exp of every head."""
    return 2 * s.q + 2 * s.kv + s.numbers


@dataclass(frozen=True)
class Account:
    """A strategy by the book. Methods return lines of what is sent, or bytes that are kept, of the letters' rank.

    linears: what a block exchanges around its matrices. attention: between its projections, and kept_in_attention the
    bytes that it keeps there. ends: what the embedding, the head and the loss exchange. groups: the blocks' weights, as
    they travel together; whole: those with which a rank computes, where it has no more than shards of them. summed:
    gradients of which ranks have a part, beside those of tp, once a step. pairs: of a query and a key, that a rank
    computes. in_grid: are they of a row's queries and a column's keys. whole_norms: does a norm see all tokens of a tp
    group, not 1/tp of them. staged: are heads made in stages, and again in backward. rows: those of the table, variant
    -> the letters that it changes; a word stands for its symbol.
    """

    linears: tuple[Exchange, ...] = ()
    attention: tuple[Exchange, ...] = ()
    ends: Exchange = lambda s: []
    kept_in_attention: Callable[[Letters], Amount] = kept_by_kernel
    groups: Callable[[Letters], list[Group]] = weights.of_blocks
    whole: Callable[[Letters], list[Group]] | None = None
    summed: Exchange = lambda s: []
    pairs: Callable[[Letters], Amount] = flops.pairs
    in_grid: bool = False
    whole_norms: bool = False
    staged: bool = False
    rows: Mapping[str, Mapping[str, object]] = field(default_factory=lambda: {"": {}})
    published: tuple[Published, ...] = ()
    colour: str = ""
    marker: str = ""

    def exchanges(self, s: Letters) -> list[Sent]:
        """Of a block, beside its weights."""
        return [line for part in (*self.linears, *self.attention) for line in part(s)]

    def of_block(self, s: Letters) -> list[Sent]:
        """What one block sends, forward and backward."""
        return something([*self.exchanges(s), *(line for group in self.groups(s) for line in weights.zero(group, s))])

    def of_step(self, s: Letters) -> list[Sent]:
        """What a whole training step sends: blocks, embedding, head, clipping.

        With every micro-batch again, but for what is summed over replicas and over tp, and the clipping.
        """
        blocks = [line.times(s.layers * s.micro) for line in self.exchanges(s)]
        ends = [line.times(s.micro) for line in self.ends(s)]
        zero = weights.zero_step([*self.groups(s), *weights.of_ends(s)], s)
        return something([*blocks, *ends, *zero, *self.summed_at_end(s), *weights.clipped(s)])

    def summed_at_end(self, s: Letters) -> list[Sent]:
        """Gradients of which ranks have a part."""
        return [*weights.summed_over_tp(s, split_norms=not self.whole_norms), *self.summed(s)]

    def of_attention(self, s: Letters, backward: bool) -> list[Sent]:
        """workload=attention: what is exchanged between the projections of one block."""
        phases = ("forward", "backward") if backward else ("forward",)
        return something(line for part in self.attention for line in part(s) if line.phase in phases)

    def flops_of_step(self, s: Letters) -> Amount:
        """What a rank computes in a step, forward and backward; what is run again does not count."""
        head = weights.of_ends(s)[-1]
        matrices = flops.of_matrices([*(self.whole or self.groups)(s), head], s)
        return s.micro * (matrices + s.layers * self.flops_of_attention(s, backward=True))

    def flops_of_attention(self, s: Letters, backward: bool) -> Amount:
        """workload=attention: what it computes between the projections of one block."""
        if backward and s.queries:
            return flops.where_queries_travel(s)
        return (PAIR + backward * PAIR_BACKWARD) * s.K * self.pairs(s)

    def saved_by_block(self, s: Letters) -> Amount:
        """Bytes that a block keeps for its backward.

        Between the matrices: both norms' inputs and outputs, each [T, d] (their 1/rms in fp32 beside). In the MLP gate,
        up and their gated product, each [T, i]. Selectively, outputs and product are made again; but an MLP in chunks,
        of which each is run again, keeps its input.
        """
        between = self.between(s)
        if s.recompute:
            return between * s.d * s.e
        outputs = 2 - s.selective * (1 if s.mlp_chunks > 1 else 2)
        norms = between * ((2 + outputs) * s.d * s.e + 2 * WIDE)
        mlp = 0 if s.mlp_chunks > 1 else (3 - s.selective) * s.tokens / s.tp * s.i * s.e
        return norms + self.kept_in_attention(s) + mlp

    def saved_by_ends(self, s: Letters) -> Amount:
        """Bytes that embedding, head and loss keep: tokens, the norm's in and out, probabilities in fp32.

        And the tables of rotary angles, a cosine and a sine for every position and dim of a head.
        """
        probabilities = 0 if s.loss_chunks > 1 else s.tokens * s.V / s.tp * WIDE
        rope = 2 * s.tokens / s.B * s.K * s.e
        return self.between(s) * (2 * s.d * s.e + WIDE) + probabilities + rope + s.tokens * 8

    def between(self, s: Letters) -> Amount:
        """Tokens of a rank between the matrices."""
        return s.tokens if self.whole_norms else s.tokens / s.tp

    def state(self, s: Letters, ends: bool = True) -> dict[str, Amount]:
        """Bytes of params, grads and optimizer that a rank keeps."""
        return weights.kept([*self.groups(s), *(weights.of_ends(s) if ends else [])], s)
