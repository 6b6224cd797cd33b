"""workload=attention: the strategy's attention alone, on q, k and v of the model's head shape (Fang and Zhao 2024).

It stands where Training stands and has the same parts of a step, so every instrument works on it too. Beside each
step, one process computes the attention of all heads over the whole sequence: the share of the ideal is how close the
ranks together come to that, and the error is how far from it they are.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.instruments import capacity
from bench.instruments.timing import Stopwatch
from conf.keys import ModelConfig
from conf.mask import PLAIN, Mask
from strategies.base import Strategy
from strategies.ops.attention import attend
from strategies.ops.mesh import Axis, neighbours


class AttentionAlone:
    """One rank's q, k, v, cut from whole ones that depend on `seed` alone, and a step of attention on them."""

    def __init__(
        self,
        config: ModelConfig,
        strategy: Strategy,
        batch_size: int,
        seq_len: int,
        backward: bool = True,
        seed: int = 0,
        mask: Mask = PLAIN,
    ) -> None:
        self.strategy, self.mesh, self.device = strategy, strategy.mesh, strategy.mesh.device
        self.model = nn.Module()  # none, for the instruments that look for its weights
        self.with_backward = backward
        generator = torch.Generator(self.device).manual_seed(seed)
        q_shape = (batch_size, seq_len, config.n_heads, config.dim_of_head)
        kv_shape = (batch_size, seq_len, config.n_kv_heads, config.dim_of_head)
        self.whole = [
            torch.randn(shape, device=self.device, generator=generator).to(strategy.options.compute_dtype)
            for shape in (q_shape, kv_shape, kv_shape, q_shape)
        ]  # q, k, v and the output's gradient
        self.mask = mask  # of the whole batch
        strategy.options.mask = mask.of(*self.mesh.dp.span(batch_size))
        q, k, v, self.grad = (self.part(whole) for whole in self.whole)
        self.qkv = [t.requires_grad_(backward) for t in (q, k, v)]
        self.shapes = {"output": q_shape, "grad of q": q_shape, "grad of k": kv_shape, "grad of v": kv_shape}
        if not self.times_the_whole:
            self.whole = []
        self.watch = Stopwatch(self.device)
        self.truth: dict[str, Tensor] = {}

    @property
    def times_the_whole(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0 or dist.get_backend() == "fake"

    def part(self, whole: Tensor) -> Tensor:
        """[B, S, H, K] -> this rank's [B_dp, S_local, H_tp, K]."""
        positions = self.strategy.split(torch.arange(whole.shape[1])[None])[0].to(whole.device)
        rows, heads = slice(*self.mesh.dp.span(len(whole))), slice(*span_of_heads(whole.shape[2], self.mesh.tp))
        return whole[rows, :, heads].index_select(1, positions).contiguous()

    def forward(self, batch: None = None) -> Tensor:
        return self.strategy.core_attention(*self.qkv)

    def backward(self, out: Tensor, last: bool = True) -> None:
        if self.with_backward:
            out.backward(self.grad)

    def finish(self) -> None:
        """There is no model: no gradient is anybody else's, too."""

    def update(self) -> None:
        for t in self.qkv:
            t.grad = None

    def state(self) -> dict[str, list[Tensor]]:
        """There is no model: what the step starts from are the activations q, k, v and the output's gradient."""
        return {"activations": [*self.qkv, self.grad]}

    def time_the_whole(self) -> None:
        """On one rank, while the others wait: the whole attention in one process, with every core of a CPU."""
        if self.times_the_whole:
            threads = torch.get_num_threads()
            if self.device == "cpu":
                torch.set_num_threads(capacity.cores())
            q, k, v, grad = self.whole
            q, k, v = qkv = [t.detach().requires_grad_(self.with_backward) for t in (q, k, v)]
            with self.watch.step():
                self.watch.lap("forward")
                out = attend(q, k, v, replace(self.strategy.options, mask=self.mask))
                self.watch.lap("backward")
                if self.with_backward:
                    out.backward(grad)
            torch.set_num_threads(threads)
            self.truth = self.results(out, qkv)
        if dist.is_initialized():
            dist.barrier()

    def errors(self) -> dict[str, float]:
        """How far this rank's output and gradients are from its part of the whole ones, which one rank has.

        As root mean squares, relative to the whole's: a part may be zero but for rounding, as is the gradient of the
        first query, which sees one key.
        """
        out = self.forward()
        self.backward(out)
        found = self.results(out, self.qkv)
        self.update()
        errors = {}
        n_kv_heads = self.shapes["grad of k"][2]
        sharing = neighbours(self.mesh, max(1, self.mesh.tp.size // n_kv_heads))  # one kv head, each with its queries
        for name, mine in found.items():
            if name in ("grad of k", "grad of v") and sharing.size > 1:
                dist.all_reduce(mine := mine.float(), group=sharing.group)
            whole = self.truth[name].float() if self.truth else torch.empty(self.shapes[name], device=self.device)
            whole = whole.contiguous()  # a broadcast sends memory as it lies, and kernels leave theirs in any order
            if dist.is_initialized():
                dist.broadcast(whole, 0)
            errors[name] = rms(mine.double() - self.part(whole).double()) / rms(whole.double())
        return errors

    def results(self, out: Tensor, qkv: list[Tensor]) -> dict[str, Tensor]:
        grads = {f"grad of {name}": t.grad for name, t in zip("qkv", qkv, strict=True) if t.grad is not None}
        return {"output": out.detach(), **grads}

    def ideal_ms(self) -> list[float]:
        """Of each step, what a perfect division of the whole among the ranks would take, where this rank timed it.

        GPUs divide it, and so do emulated ranks, which have the device to themselves; real ranks on a CPU share the
        cores that the one process had.
        """
        alone = dist.is_initialized() and (self.device == "cuda" or dist.get_backend() == "fake")
        divided = dist.get_world_size() if alone else 1
        return [step.step / divided for step in self.watch.steps()]


def span_of_heads(n: int, tp: Axis) -> tuple[int, int]:
    """This tp rank's heads of n: an equal part, or the one that it shares with its neighbours."""
    if n >= tp.size:
        return tp.span(n)
    mine = tp.rank * n // tp.size
    return mine, mine + 1


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
