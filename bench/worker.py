"""One rank of one configuration: train, time, count, and send the measurements to the parent."""

import faulthandler
import os
import signal
import threading
import traceback
import zlib
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta

import torch
import torch._dynamo  # FSDP2 imports it when first used: better once in the server than again in every rank
import torch.distributed as dist

from bench import data
from bench.attention import AttentionAlone
from bench.check import tokens_needed
from bench.comm import Ledger
from bench.config import OptimSection
from bench.flops import CountedKernel, FlopCounter
from bench.memory import MemoryLog
from bench.timing import Stopwatch
from bench.training import PRECISIONS, Batch, Training
from models import checkpoint
from models.config import ModelConfig
from strategies.base import Options
from strategies.ops.kernels import pick_kernel
from strategies.ops.weights import whole_parameters


def serve(rank: int, config: dict, folder: str, pipe) -> None:
    """The process of one rank. Sends ("progress", text), then ("measured", dict) or ("failed", dict).

    folder holds the rendezvous file, and where a rank writes its stack when the parent asks (SIGUSR1).
    """
    os.setpgrp()  # Ctrl-C is the parent's to handle
    stacks = open(os.path.join(folder, f"stack{rank}"), "w")  # noqa: SIM115 (open as long as the process)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
    threading.Thread(target=die_with_parent, args=(pipe,), daemon=True).start()
    try:
        pipe.send(("measured", run(rank, config, folder, pipe)))
    except BaseException as error:
        pipe.send(("failed", describe(error)))
        os._exit(1)
    os._exit(0)


def die_with_parent(pipe) -> None:
    """The parent never sends: when its end closes, it is gone."""
    pipe.poll(None)
    os._exit(1)


def describe(error: BaseException) -> dict:
    """What happened, whether memory was short, and whether it is but the echo of another rank's end."""
    message = " ".join(str(error).split()) or type(error).__name__
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in message
    echo = any(words in message for words in ("onnection closed by peer", "onnection reset by peer", "Broken pipe"))
    return {
        "oom": out_of_memory,
        "echo": echo,
        "message": f"{type(error).__name__}: {message}",
        "traceback": "".join(traceback.format_exception(error)),
    }


def run(rank: int, config: dict, folder: str, pipe) -> dict:
    world_size, device = config["world_size"], config["device"]
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    backend = "nccl" if device == "cuda" else "gloo"
    if world_size > 1:
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=config["timeout_s"] + 60),  # the parent's limit comes first
            device_id=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None,
        )

    training, batch_of = BUILD[config["workload"]](config)
    watch = Stopwatch(device)
    shares = []
    total = config["warmup"] + config["steps"]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(total):
        batch = batch_of(step)
        if world_size > 1:
            dist.barrier()
        with watch.step():
            loss = training.forward(batch)
            watch.lap()
            training.backward(loss)
            watch.lap()
            training.update()
        if config["workload"] == "attention":
            training.time_the_whole()
        else:
            shares.append(loss.detach())
        pipe.send(("progress", f"step {step + 1}/{total}"))
    losses = training.global_loss(torch.stack(shares)) if shares else []
    steps = watch.steps()[config["warmup"] :]
    allocated = reserved = None
    if device == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    if config["save_path"] is not None:
        save(training, config, rank)

    pipe.send(("progress", "counting"))
    ledger, flops = count(training, batch)
    peak = log_memory(training, batch, device)
    if allocated is not None:  # the real allocator's peak includes what kernels take inside themselves
        peak = {**peak, "total": allocated, "other": peak["other"] + allocated - peak["total"]}
    return {
        "losses": losses,
        "steps": steps,
        "ideal": training.ideal_ms()[config["warmup"] :] if config["workload"] == "attention" else [],
        "comm": [asdict(entry) for entry in ledger.entries.values()],
        "flops": flops,
        "peak": peak,
        "reserved": reserved,
        "kernel": training.strategy.options.kernel.name,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "backend": backend if world_size > 1 else "none",
        "torch_version": torch.__version__,
    }


def options_of(config: dict) -> Options:
    compute_dtype = PRECISIONS[config["precision"]][1]
    return Options(
        kernel=pick_kernel(config["attention"]["kernel"], config["device"], compute_dtype, config["model"]["head_dim"]),
        compute_dtype=compute_dtype,
        zero_stage=config["zero_stage"],
        ring_layout=config["ring"]["layout"],
        ring_grad_dtype=config["ring"]["grad_dtype"],
        ring_kv=config["ring"]["kv"],
        ulysses_packed=config["ulysses"]["packed"],
    )


def build_step(config: dict) -> tuple[Training, Callable[[int], Batch]]:
    """The training of workload=step, and what it trains on in a step."""
    model = ModelConfig.of(config["model"])
    if config["model"]["name"] == "hf":
        files = checkpoint.Checkpoint(config["model"]["path"])
        whole = lambda name, shape: files.tensor(name)  # noqa: E731
    else:
        whole = lambda name, shape: initial(name, shape, config["seed"], config["device"])  # noqa: E731
    training = Training(
        model,
        config["strategy"]["name"],
        config["mesh"],
        options_of(config),
        OptimSection(**config["optim"]),
        whole,
        config["device"],
        PRECISIONS[config["precision"]],
        recompute=config["recompute"] == "block",
        mlp_chunks=config["mlp"]["chunks"],
        loss_chunks=config["loss"]["chunks"],
        placement=config["placement"],
    )
    source = data.load(
        config["data"]["name"], config["data"]["path"], tokens_needed(config), model.vocab_size, config["seed"]
    )
    return training, lambda step: training.place(*global_batch(source, step, config))


def build_attention(config: dict) -> tuple[AttentionAlone, Callable[[int], None]]:
    """workload=attention, which takes the same q, k, v in every step."""
    alone = AttentionAlone(
        ModelConfig.of(config["model"]),
        config["strategy"]["name"],
        config["mesh"],
        options_of(config),
        config["batch_size"],
        config["seq_len"],
        config["device"],
        backward=config["direction"] == "forward_backward",
        placement=config["placement"],
        seed=config["seed"],
    )
    return alone, lambda step: None


BUILD = {"step": build_step, "attention": build_attention}


def initial(name: str, shape: torch.Size, seed: int, device: str) -> torch.Tensor:
    """A whole initial parameter, fp32: ones for norms, N(0, 0.02) for matrices, a function of (seed, name) alone."""
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)


def global_batch(source, step: int, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels [B, S] of one step, the same on every rank."""
    first = step * config["batch_size"]
    rows = [source.sample(first + b, config["seq_len"]) for b in range(config["batch_size"])]
    samples = torch.stack([torch.from_numpy(row) for row in rows])
    return samples[:, :-1].clamp(min=0), samples[:, 1:]


def count(training: Training, batch) -> tuple[Ledger, int]:
    """One more step, untimed, with the ledger and the FLOP counter on."""
    ledger, counter = Ledger(training.model), FlopCounter()
    options = training.strategy.options
    kernel, options.kernel = options.kernel, CountedKernel(options.kernel, counter)
    with ledger, counter:
        loss = training.forward(batch)
        ledger.phase = "backward"
        training.backward(loss)
        ledger.phase = "optimizer"
        training.update()
    options.kernel = kernel
    return ledger, counter.total


def log_memory(training: Training, batch, device: str) -> dict:
    """One more step, untimed, with the memory log on."""
    log = MemoryLog(device, training.state())
    with log:
        loss = training.forward(batch)
        log.end_forward()
        training.backward(loss)
        training.update()
    return asdict(log.peak())


def save(training: Training, config: dict, rank: int) -> None:
    """Write the trained weights as a Hugging Face directory. Every rank takes part; rank 0 writes."""
    tensors = whole_parameters(training.model, training.shapes)
    if rank == 0:
        dtype = str(PRECISIONS[config["precision"]][0]).removeprefix("torch.")
        checkpoint.write(config["save_path"], training.model.config, tensors, dtype)
    else:
        for _ in tensors:
            pass


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"
