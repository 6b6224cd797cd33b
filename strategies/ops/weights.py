"""Which weights a rank owns: column and row slices (Megatron), replicas, and ZeRO by FSDP2.

Sharding happens on the meta device, before any weight exists. materialize() then makes this rank's share only, from
one whole parameter at a time, and whole_parameters() puts the wholes together again. A training step goes
finish_gradients(), the optimizer over trained(), publish_weights().
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from strategies.ops.collectives import reduce_scatter_chunks, start_all_gather, sum_over
from strategies.ops.hooks import meaning
from strategies.ops.mesh import Axis


@dataclass(frozen=True)
class Share:
    """This rank's slice of a parameter along `dim`, one of `ways`, before ZeRO cuts that again along dim 0.

    `partial` is the axis along which ranks that hold the same slice each see only a part of its gradient.
    `replicas`: of ZeRO below stage 2, which keeps weights whole. `wide`: of a weight in the activations' dtype, the
    dtypes of its master, which the optimizer updates, and of its gradient as it is kept and reduced.
    """

    dim: int = 0
    start: int = 0
    stop: int | None = None
    ways: int = 1
    partial: Axis | None = None
    replicas: tuple[int, Axis] | None = None  # the stage, and the axis along which the replicas are
    wide: tuple[torch.dtype, torch.dtype] | None = None

    def of(self, whole: Tensor) -> Tensor:
        stop = whole.shape[self.dim] if self.stop is None else self.stop
        return whole.narrow(self.dim, self.start, stop - self.start)


def set_share(module: nn.Module, share: Share, name: str = "weight") -> None:
    """Replace the module's (meta) parameter by this rank's slice of it."""
    local = share.of(getattr(module, name).detach())
    setattr(module, name, nn.Parameter(torch.empty_like(local, memory_format=torch.contiguous_format)))
    module.shares = {name: share}


def column(linear: nn.Module, axis: Axis) -> None:
    """Y_tp = X W_tp^T: split the outputs (or an embedding's rows), evenly or off by one."""
    set_share(linear, Share(0, *axis.span(linear.weight.shape[0]), axis.size))


def row(linear: nn.Module, axis: Axis) -> None:
    """{Y_tp} = X_tp W_tp^T: split the inputs."""
    set_share(linear, Share(1, *axis.span(linear.weight.shape[1]), axis.size))


def column_heads(linear: nn.Module, n_heads: int, axis: Axis, replicas: Axis) -> None:
    """Split the outputs by heads. With more ranks than heads, `replicas.size` neighbours hold the same head."""
    head_dim = linear.weight.shape[0] // n_heads
    owners = Axis(axis.name, axis.size // replicas.size, axis.rank // replicas.size)
    start, stop = owners.span(n_heads)
    partial = replicas if replicas.size > 1 else None
    set_share(linear, Share(0, start * head_dim, stop * head_dim, owners.size, partial))


def partial_gradients(module: nn.Module, axis: Axis) -> None:
    """Every rank holds the weight but sees only its own tokens: the gradient is to be summed along the axis."""
    if axis.size > 1:
        set_share(module, Share(partial=axis))


class ReduceScatter:
    """FSDP2's reduce-scatter through ours, so that on gloo it sends no more than it must."""

    def allocate(self, size: torch.Size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if op != dist.ReduceOp.SUM:
            raise RuntimeError(f"gradients are summed over ranks, and FSDP2 asked for {op}")
        reduce_scatter_chunks(output_tensor, input_tensor.view(group.size(), -1), group).wait()


def zero(*modules: nn.Module, axis: Axis, compute_dtype: torch.dtype, grad_dtype: torch.dtype, stage: int) -> None:
    """Spread the modules' training state over the axis (Rajbhandari et al. 2020, section 5).

    stage 0  nothing is sharded, gradients are all-reduced: plain data parallelism
          1  the optimizer's state is sharded: gradients are reduce-scattered, new weights all-gathered
          2  gradients and weights too, and gathered weights are kept from forward to backward (FSDP2)
          3  and gathered again in backward (FSDP2)

    From stage 2 on, what is sharded is the weights as they are updated; they travel together, in `compute_dtype`, when
    the modules' own forward is called. Gradients travel in `grad_dtype`, and are summed, never averaged: the loss is
    already divided by the global token count.
    """
    if axis.size == 1:
        return
    if stage < 2:
        for module in (inner for outer in modules for inner in outer.modules()):
            shares = module.__dict__.setdefault("shares", {})
            for name, _ in module.named_parameters(recurse=False):
                share = shares.get(name, Share())
                shares[name] = share if share.replicas else replace(share, replicas=(stage, axis))
        return
    master_dtype = next(modules[0].parameters()).dtype
    mixed = {"param_dtype": compute_dtype, "reduce_dtype": grad_dtype} if compute_dtype != master_dtype else {}
    policy = MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)
    fully_shard(list(modules), mesh=axis.mesh, reshard_after_forward=stage == 3, mp_policy=policy)
    modules[0].set_gradient_divide_factor(1.0)
    modules[0].set_force_sum_reduction_for_comms(True)
    if axis.mesh.device_type == "cpu":
        modules[0].set_custom_reduce_scatter(ReduceScatter())


def lower(model: nn.Module, compute_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Mixed precision (Micikevicius et al. 2018, section 3.1) of what no ZeRO has sharded: weights in `compute_dtype`.

    Masters, in the dtype that the weights have had, exist only of what this rank's optimizer updates.
    """
    for module in model.modules():
        shares = module.__dict__.setdefault("shares", {})
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor) and parameter.dtype != compute_dtype:
                shares[name] = replace(shares.get(name, Share()), wide=(parameter.dtype, grad_dtype))
                parameter.data = parameter.data.to(compute_dtype)


def schedule_as_one(model: nn.Module, axis: Axis) -> None:
    """Let FSDP2 run the units inside the model, whose other weights it leaves alone, as those of one model.

    Each would otherwise be a root, and a root keeps the buffer of its whole gradient until all of backward is over.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        plain = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
        fully_shard(model, mesh=axis.mesh, ignored_params=plain)


def gather_nothing_ahead(module: nn.Module) -> None:
    """In its backward, where FSDP2 takes for the next what comes after all blocks, of which it knows nothing."""
    if isinstance(module, FSDPModule):
        module.set_modules_to_backward_prefetch([module])  # which is here already; none would mean the default


class Replicas:
    """Parameters that every rank of an axis holds whole (ZeRO 0 and 1), in one flat buffer: one message for all."""

    def __init__(self, parameters: list[nn.Parameter], share: Share) -> None:
        self.share = share
        self.stage, self.axis = share.replicas
        chunk = -(-sum(p.numel() for p in parameters) // self.axis.size)
        self.weights = parameters[0].new_zeros(self.axis.size, chunk)
        master_dtype, grad_dtype = share.wide or (self.weights.dtype, self.weights.dtype)
        self.grads = torch.zeros_like(self.weights, dtype=grad_dtype)
        self.mine = slice(self.axis.rank, self.axis.rank + 1) if self.stage == 1 else slice(None)
        self.masters = self.weights[self.mine].to(master_dtype)  # the weights themselves, if they are as wide
        sizes = [p.numel() for p in parameters]
        parts = (buffer.flatten()[: sum(sizes)].split(sizes) for buffer in (self.weights, self.grads))
        self.starts: dict[nn.Parameter, int] = {}
        start = 0
        for parameter, weights, grad in zip(parameters, *parts, strict=True):
            parameter.data = weights.view_as(parameter)
            keep_gradient(parameter, grad.view_as(parameter))
            self.starts[parameter] = start
            start += parameter.numel()

    def trained(self) -> tuple[Tensor, Tensor]:
        """The weights that this rank's optimizer updates, and their gradient."""
        return self.masters, self.grads[self.mine]

    def master_of(self, parameter: nn.Parameter) -> tuple[Tensor, slice]:
        """The part of a parameter's master that this rank has, and which of the flat parameter that is."""
        begin = (self.mine.start or 0) * self.weights.shape[1]
        start, numel = self.starts[parameter], parameter.numel()
        low, high = (min(max(start, at), start + numel) for at in (begin, begin + self.masters.numel()))
        return self.masters.flatten()[low - begin : high - begin], slice(low - start, high - start)

    def reduce(self) -> None:
        """Sum the gradient over the axis, as far as this rank trains it."""
        with meaning(source=f"zero{self.stage} model", weights=True):
            if self.stage == 0:
                dist.all_reduce(self.grads, group=self.axis.group)
            else:
                reduce_scatter_chunks(self.grads[self.axis.rank], self.grads, self.axis.group).wait()

    def publish(self) -> None:
        """What this rank has trained becomes the weights that are used, and is sent to the others."""
        if self.share.wide:
            self.weights[self.mine].copy_(self.masters)
        if self.stage == 1:
            with meaning(source="zero1 model", weights=True):
                self.weights.copy_(
                    start_all_gather(self.weights[self.axis.rank], 0, self.axis).wait().view_as(self.weights)
                )


def owned(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Share]]:
    """Every parameter once, under its name in the unsharded model, with this rank's share of it."""
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        yield name, parameter, getattr(model.get_submodule(path), "shares", {}).get(leaf, Share())


def local(parameter: Tensor) -> Tensor:
    """What of a parameter (or gradient) is in this rank's memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def in_whole(whole: Tensor, parameter: Tensor, share: Share) -> Tensor:
    """The view of the whole parameter that local(parameter) holds."""
    part = share.of(whole)
    if isinstance(parameter, DTensor):
        placed = [*enumerate(parameter.placements)]
        for i, placement in reversed(placed):  # FSDP2 comes first in a mesh, and cuts what tensor parallelism has left
            if not placement.is_replicate():
                size, chunk = part.shape[placement.dim], -(-part.shape[placement.dim] // parameter.device_mesh.size(i))
                start = min(parameter.device_mesh.get_local_rank(i) * chunk, size)
                part = part.narrow(placement.dim, start, min(chunk, size - start))
    return part


def materialize(model: nn.Module, device: str, whole: Callable[[str], Tensor]) -> None:
    """Give a sharded meta model its weights. whole(name) is called for one parameter at a time, in order."""
    model.ranks = dist.get_world_size() if dist.is_initialized() else 1
    model.to_empty(device=device)
    model.tie()  # to_empty gave the head a weight of its own
    alike: dict[tuple, list[tuple[nn.Parameter, Share]]] = {}
    for _, parameter, share in owned(model):
        if share.replicas:
            alike.setdefault((share.replicas, share.partial, share.ways), []).append((parameter, share))
    model.with_masters = []  # parameters that have one of their own
    with torch.no_grad():
        model.replicas = [Replicas([parameter for parameter, _ in group], group[0][1]) for group in alike.values()]
        for name, parameter, share in owned(model):
            load(model, parameter, share, in_whole(whole(name), parameter, share))


def load(model: nn.Module, parameter: nn.Parameter, share: Share, values: Tensor) -> None:
    """Give a parameter its values, and its master, if it has one, as far as this rank's optimizer updates it."""
    local(parameter).copy_(values)
    if not share.wide:
        return
    master_dtype, grad_dtype = share.wide
    if share.replicas:
        part, where = replicas_of(model, parameter).master_of(parameter)
        part.copy_(values.flatten()[where])
    else:
        model.with_masters.append(parameter)
        parameter.master = values.to(parameter.device, master_dtype, copy=True, memory_format=torch.contiguous_format)
        if grad_dtype != parameter.dtype:
            keep_gradient(parameter, torch.zeros_like(parameter.master, dtype=grad_dtype))


def replicas_of(model: nn.Module, parameter: nn.Parameter) -> Replicas:
    return next(replicas for replicas in model.replicas if parameter in replicas.starts)


def keep_gradient(parameter: nn.Parameter, buffer: Tensor) -> None:
    """The parameter's gradient is kept in this buffer: added up there, if its dtype is another."""
    if buffer.dtype == parameter.dtype:
        parameter.grad = buffer
        return
    parameter.main_grad = buffer  # Megatron's name

    def add(parameter: nn.Parameter) -> None:
        buffer.add_(parameter.grad)
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(add)


def gradient(parameter: nn.Parameter) -> Tensor | None:
    """What of a parameter's gradient is in this rank's memory, where it is kept; None before there is one."""
    if (kept := getattr(parameter, "main_grad", None)) is not None:
        return kept
    return None if parameter.grad is None else local(parameter.grad)


def whole_parameters(model: nn.Module, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Every whole parameter, one at a time, on every rank: what a checkpoint holds."""
    for name, parameter, share in owned(model):
        mine = held_master(model, parameter, share)
        whole = mine.new_full(shapes[name], float("-inf"))
        in_whole(whole, parameter, share).copy_(mine)
        if dist.is_initialized():
            dist.all_reduce(whole, dist.ReduceOp.MAX)  # every element is held somewhere; replicas agree
        yield name, whole


def held_master(model: nn.Module, parameter: nn.Parameter, share: Share) -> Tensor:
    """What this rank has of a parameter as the optimizer updates it; -inf where it is another rank's to update."""
    if not share.wide:
        return local(parameter).detach()
    if not share.replicas:
        return parameter.master
    part, where = replicas_of(model, parameter).master_of(parameter)
    held = part.new_full((parameter.numel(),), float("-inf"))
    held[where] = part
    return held.view_as(parameter)


def trained(model: nn.Module) -> Iterator[tuple[Tensor, Tensor, Share, int]]:
    """What this rank's optimizer updates: weights, their gradient, their share, and how many ranks update the same."""
    for replicas in model.replicas:
        ways = replicas.share.ways * (replicas.axis.size if replicas.stage == 1 else 1)
        yield *replicas.trained(), replicas.share, model.ranks // ways
    for _, parameter, share in owned(model):
        if not share.replicas:
            ways = share.ways * shards(parameter)
            weights = parameter.master if share.wide else local(parameter).detach()
            yield weights, gradient(parameter), share, model.ranks // ways


def shards(parameter: Tensor) -> int:
    """In how many pieces a parameter is, those that hold the same piece counted once."""
    if not isinstance(parameter, DTensor):
        return 1
    sizes = parameter.device_mesh.shape
    return prod(
        size for size, placement in zip(sizes, parameter.placements, strict=True) if not placement.is_replicate()
    )


@torch.no_grad()
def finish_gradients(model: nn.Module) -> None:
    """After backward: reduce replicas', then sum partial ones, those of an axis in one all-reduce in fp32."""
    for replicas in model.replicas:
        replicas.reduce()
    by_axis: dict[str, list[tuple[Tensor, Share]]] = {}
    for _, grad, share, _ in trained(model):
        if share.partial is not None:
            by_axis.setdefault(share.partial.name, []).append((grad, share))
    for grads in by_axis.values():
        wide = torch.promote_types(grads[0][0].dtype, torch.float32)
        flat = torch.cat([grad.flatten().to(wide) for grad, _ in grads])
        share = grads[0][1]
        with meaning(verb="column_heads" if share.partial.name == "tp_replicas" else "partial_gradients", weights=True):
            total = sum_over(flat, share.partial)
        for (grad, _), part in zip(grads, total.split([grad.numel() for grad, _ in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def publish_weights(model: nn.Module) -> None:
    """After the optimizer: masters become the weights that are used, and every rank's replicas the same again."""
    for replicas in model.replicas:
        replicas.publish()
    for parameter in model.with_masters:
        parameter.data.copy_(parameter.master)


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of the whole model's gradient, every element counted once however many ranks hold it."""
    squares = []
    for _, grad, _, holders in trained(model):
        squares.append(grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum() / holders)
    total = torch.stack(squares).sum()
    if model.ranks > 1:
        dist.all_reduce(total)
    return total.sqrt()
