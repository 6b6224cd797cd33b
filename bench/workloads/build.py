"""From a resolved configuration to what one rank runs: its training, or its attention alone, and its batches."""

import zlib
from collections.abc import Callable
from typing import Any

import torch

import strategies
from bench.workloads import data
from bench.workloads.attention import AttentionAlone
from bench.workloads.training import PRECISIONS, Batch, Training
from conf import hub
from conf.documents import mask_of, without_label
from conf.keys import INITIAL_STD, Config
from conf.mask import Mask
from models import checkpoint
from strategies.base import Options, Strategy
from strategies.ops.kernels import pick_kernel


def build_strategy(config: Config) -> Strategy:
    """This rank's strategy on its mesh. Simulated tensors are on the CPU, whatever device they stand for."""
    device = "cpu" if config.mode == "simulate" else config.device
    compute_dtype = PRECISIONS[config.precision][1]
    kernel = pick_kernel(config.attention.kernel, device, compute_dtype, config.model.dim_of_head)
    options = Options.of(config, kernel, compute_dtype)
    return strategies.build(config.strategy.name, vars(config.mesh), options, device, config.placement)


def build_training(config: Config, strategy: Strategy) -> Training:
    """workload=step, without its weights yet."""
    return Training(
        config.model,
        strategy,
        config.optim,
        PRECISIONS[config.precision],
        recompute=config.recompute,
        mlp_chunks=config.mlp.chunks,
        loss_chunks=config.loss.chunks,
        offload=config.offload,
        compiled=config.compile,
    )


def build_attention(config: Config, strategy: Strategy) -> AttentionAlone:
    """workload=attention."""
    return AttentionAlone(
        config.model,
        strategy,
        config.batch_size,
        config.seq_len,
        backward=config.direction == "forward_backward",
        seed=config.seed,
        mask=mask_of(config),
    )


def build(config: Config) -> tuple[Training | AttentionAlone, Callable[[int], list[Any]]]:
    """What runs, and the micro-batches of a step; attention alone takes the same q, k and v every time."""
    strategy = build_strategy(config)
    if config.workload == "attention":
        return build_attention(config, strategy), lambda step: [None]
    training = build_training(config, strategy).load(initial_weights(config))
    source = data.load(config)

    def batches_of(step: int) -> list[Batch]:
        tokens, labels, mask = global_batch(source, step, config)
        return training.micro_batches(tokens, labels, config.micro_batches, mask)

    return training, batches_of


def initial_weights(config: Config) -> Callable[[str, torch.Size], torch.Tensor]:
    """A checkpoint's, or random ones."""
    if config.model.name == "hf":
        files = checkpoint.Checkpoint(hub.folder_here(str(config.model.path)))
        return lambda name, shape: files.tensor(name)
    return lambda name, shape: initial(name, shape, config.seed, config.device)


def initial(name: str, shape: torch.Size, seed: int, device: str) -> torch.Tensor:
    """A whole initial parameter, fp32: ones for norms, N(0, 0.02) for matrices, a function of (seed, name) alone."""
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape, device=device).normal_(0, INITIAL_STD, generator=generator)


def global_batch(source: data.Source, step: int, config: Config) -> tuple[torch.Tensor, torch.Tensor, Mask]:
    """Inputs and labels [B, S] of one step, and which tokens see each other, the same on every rank."""
    samples = data.samples(source, step, config)
    tokens, labels = samples[:, :-1], samples[:, 1:].copy()
    mask = mask_of(config, tokens)
    if config.documents.name != "none":
        labels[without_label(config, mask, tokens)] = data.IGNORED
    return torch.from_numpy(tokens).clamp(min=0), torch.from_numpy(labels), mask
