"""torch_cp: ring with torch's own ring attention, the one behind torch.distributed's context_parallel.

It deals the sequence out contiguous or zigzag (its head-tail load balancer); keys travel by all-gather, its default.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from strategies.ops.kernels import Kernel, heads_swapped
from strategies.ring import Ring


class TorchCP(Ring):
    def core_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return TorchRing.apply(q, k, v, self.ring.group, self.options.ring.layout, self.options.kernel)


class TorchRing(Function):
    """Their schedule, forward and backward, on [B, H, S, K], with a kernel of ours in it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, layout: str, kernel: Kernel) -> Tensor:
        from torch.distributed.tensor.experimental._context_parallel import _attention as theirs

        theirs._cp_options.enable_load_balance = layout == "zigzag"

        def block(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
            out, lse = kernel.forward(*heads_swapped(q, k, v), is_causal)
            return out.transpose(1, 2), lse

        out, lse = theirs._templated_ring_attention(group, 2, block, *heads_swapped(q, k, v), is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.kernel = group, kernel
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from torch.distributed.tensor.experimental._context_parallel import _attention as theirs

        q, k, v, out, lse = ctx.saved_tensors

        def block(
            grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
        ) -> tuple[Tensor, ...]:
            tensors = heads_swapped(grad, query, key, value, out)
            return heads_swapped(*ctx.kernel.backward(*tensors, logsumexp, is_causal))

        tensors = (*heads_swapped(q, k, v), out, lse)
        grads = theirs._templated_ring_attention_backward(
            ctx.group, 2, block, grad.transpose(1, 2), "grad", *tensors, is_causal=True
        )
        return *heads_swapped(*grads), None, None, None
