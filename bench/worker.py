"""One rank of one configuration: train, time, count, and send the measurements to the parent."""

import faulthandler
import os
import signal
import threading
import traceback
from dataclasses import asdict
from datetime import timedelta
from multiprocessing import util
from pathlib import Path

import torch
import torch._dynamo  # FSDP2 imports it when first used: better once in the server than again in every rank
import torch.distributed as dist

from bench.build import build
from bench.emulated import stand_for
from bench.memory import MemoryLog
from bench.observe import observe
from bench.simulate import simulate
from bench.timing import Stopwatch
from bench.trace import trace
from bench.training import PRECISIONS, Training
from models import checkpoint
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
        measured = run(rank, config, folder, pipe)
        util._exit_function()  # or locks that libraries have made are reported as leaked
        pipe.send(("measured", measured))
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
    """One rank's measurements of a configuration in its mode."""
    processes = config["world_size"] if config["mode"] in ("real", "silent") else 1
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    join(rank, config, folder)
    return MODES[config["mode"]](config, pipe)


def join(rank: int, config: dict, folder: str) -> None:
    """Become rank `rank`: of a group of processes, or of one that is made up."""
    world_size, device = config["world_size"], config["device"]
    if device == "cuda" and config["mode"] != "simulate":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if world_size == 1:
        return
    if config["mode"] != "real":
        stand_for(rank, world_size, device)
        return
    dist.init_process_group(
        BACKENDS[device],
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=config["timeout_s"] + 60),  # the parent's limit comes first
        device_id=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None,
    )


def run_steps(config: dict, pipe) -> dict:
    """Real tensors: time the steps, then observe one more."""
    device = config["device"]
    training, batch_of = build(config)
    watch = Stopwatch(device)
    shares = []
    total = config["warmup"] + config["steps"]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(total):
        batch = batch_of(step)
        if config["world_size"] > 1:
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
    made_up = config["mode"] != "real"  # what others would have sent, and so the loss
    losses = training.global_loss(torch.stack(shares)) if shares and not made_up else []
    steps = watch.steps()[config["warmup"] :]
    allocated = reserved = None
    if device == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    if config["save_path"] is not None:
        save(training, config, dist.get_rank() if dist.is_initialized() else 0)

    if config["profile"]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        trace(training, batch, Path(config["traces"]) / f"trace_rank{rank}.json")
    errors = training.errors() if config["workload"] == "attention" and not made_up else {}
    pipe.send(("progress", "counting"))
    observed = observe(training, batch, MemoryLog(device, training.state()))
    peak = asdict(observed.peak)
    if allocated is not None:  # the real allocator's peak includes what kernels take inside themselves
        peak = {**peak, "total": allocated, "other": peak["other"] + allocated - peak["total"]}
    return {
        "losses": losses,
        "steps": steps,
        "ideal": training.ideal_ms()[config["warmup"] :] if config["workload"] == "attention" else [],
        "errors": errors,
        "comm": observed.comm,
        "flops": observed.flops,
        "peak": peak,
        "after_forward": observed.after_forward,
        "reserved": reserved,
        "kernel": training.strategy.options.kernel.name,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "backend": dist.get_backend() if dist.is_initialized() else "none",
        "torch_version": torch.__version__,
    }


def run_simulated(config: dict, pipe) -> dict:
    """Shapes alone."""
    observed, foretold = simulate(config, lambda text: pipe.send(("progress", text)))
    return {
        "foretold": foretold,
        "losses": [],
        "steps": [],
        "ideal": [],
        "errors": {},
        "comm": observed.comm,
        "flops": observed.flops,
        "peak": asdict(observed.peak),
        "after_forward": observed.after_forward,
        "reserved": None,
        "kernel": config["attention"]["kernel"],
        "device_name": config["cluster"]["name"] if config["cluster"] else None,
        "backend": "fake" if dist.is_initialized() else "none",
        "torch_version": torch.__version__,
    }


MODES = {
    "real": run_steps,
    "silent": run_steps,  # every rank at once, with collectives that return at once: what the others' time exposes
    "emulate": run_steps,
    "simulate": run_simulated,
}
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


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
