"""One rank of one configuration: train, time, count, and send the measurements to the parent."""

import faulthandler
import gc
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing import util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP2 imports it when first used: better once in the server than again in every rank
import torch.distributed as dist

from bench.instruments import areas, capacity, machine
from bench.instruments.exchanges import watched
from bench.instruments.held import Held
from bench.instruments.instrument import replaced
from bench.instruments.memory import MemoryLog
from bench.instruments.observe import Observed, observe
from bench.instruments.step import run_step
from bench.instruments.timing import Stopwatch
from bench.instruments.trace import in_lanes, trace, write_trace
from bench.ranks import ends
from bench.ranks.task import Failure, Meeting, Ready, Task
from bench.simulation.emulated import stand_for
from bench.simulation.simulate import simulate
from bench.workloads import collectives, kernels
from bench.workloads.attention import AttentionAlone
from bench.workloads.build import build, build_strategy
from bench.workloads.training import PRECISIONS, Training
from conf.keys import OF_A_MACHINE, Config
from conf.measurement import Peak, Rank, Timed, Work
from models import checkpoint
from models.offload import waiting
from strategies.ops.weights import whole_parameters

machine.this_host()  # once in the server, as the imports, for all ranks that are forked from it
gc.freeze()  # what was imported stays: in a rank each full collection would look at it again, for 0.2 s


def serve(rank: int, task: Task, meeting: Meeting, folder: str, pipe: Connection) -> None:
    """The process of one rank. Sends that it is ready, texts about its progress, and in the end a Rank or a Failure.

    folder is where it writes its stack when the parent asks (SIGUSR1), and its last words.
    """
    os.setpgrp()  # Ctrl-C is the parent's to handle
    words = open(ends.words_file(folder, rank), "w")  # noqa: SIM115 (open as long as the process)
    os.dup2(words.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    stacks = open(ends.stack_file(folder, rank), "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
    threading.Thread(target=die_with_parent, args=(pipe,), daemon=True).start()
    try:
        pipe.send(Ready())
        measured = run(rank, task, meeting, pipe.send)
        util._exit_function()  # type: ignore[attr-defined]  # or locks that libraries have made are reported as leaked
        pipe.send(measured)
    except BaseException as error:
        pipe.send(describe(error))
        os._exit(1)
    os._exit(0)


def die_with_parent(pipe: Connection) -> None:
    """The parent never sends: when its end closes, it is gone."""
    pipe.poll(None)
    os._exit(1)


def describe(error: BaseException) -> Failure:
    """What happened, whether memory was short, and whether it is but the echo of another rank's end."""
    message = " ".join(str(error).split()) or type(error).__name__
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or short_of_memory(message)
    echo = any(words in message for words in ECHOES)
    said = "".join(traceback.format_exception(error))
    return Failure(f"{type(error).__name__}: {message}", out_of_memory, echo, said)


ECHOES = (
    "onnection closed by peer",
    "onnection reset by peer",
    "onnection refused",
    "connectFullMesh failed",
    "Broken pipe",
)


def short_of_memory(message: str) -> bool:
    """Under a limit of the address space a thread that cannot start has found no room for its stack."""
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    no_room = limited and any(words in message for words in ("start new thread", "Resource temporarily unavailable"))
    return no_room or any(words in message for words in ends.SHORT_OF_MEMORY)


def run(rank: int, task: Task, meeting: Meeting, progress: Callable[[str], None]) -> Rank:
    """One rank's measurements of a configuration in its mode."""
    torch.set_num_threads(max(1, capacity.cores() // task.processes))
    join(rank, task, meeting)
    if task.config.mode == "simulate":
        observed, foretold = simulate(task.config, progress, task.known)
        cluster = task.config.cluster
        if observed.spans:
            write_trace(in_lanes(observed.spans), trace_file(task, rank))
        found = measured(observed, device_name=cluster.name if cluster else None, foretold=foretold)
        if isinstance(observed.predicted, str):
            return replace(found, unpredicted=observed.predicted)
        return replace(found, predicted=observed.predicted)
    load_before = machine.load()
    found = (run_series if task.config.workload in OF_A_MACHINE else run_steps)(task, progress)
    found.host = machine.facts(meeting.interface, task.config.device, load_before)
    return found


def trace_file(task: Task, rank: int) -> Path:
    return Path(task.traces) / f"trace_rank{rank}.json"


def join(rank: int, task: Task, meeting: Meeting) -> None:
    """Become rank `rank`: of a group of processes, or of one that is made up."""
    config = task.config
    world_size, device = config.world_size, config.device
    if device == "cuda" and config.mode != "simulate":
        torch.cuda.set_device(rank % task.processes % torch.cuda.device_count())
    if world_size == 1:
        return
    if config.mode != "real" or task.silent:
        stand_for(rank, world_size, device)
        return
    for library in ("GLOO", "NCCL"):
        os.environ[f"{library}_SOCKET_IFNAME"] = meeting.interface
    dist.init_process_group(
        BACKENDS[device],
        store=store_of(meeting, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=config.timeout_s + 60),  # the parent's limit comes first
        device_id=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None,
    )


def store_of(meeting: Meeting, world_size: int) -> dist.Store:
    if meeting.file:
        return dist.FileStore(meeting.file, world_size)
    return dist.PrefixStore(meeting.prefix, dist.TCPStore(*meeting.store, is_master=False))


def run_steps(task: Task, progress: Callable[[str], None]) -> Rank:
    """Real tensors: time the steps, then observe one more."""
    config = task.config
    on_gpu = config.device == "cuda"
    made_up = config.mode != "real" or task.silent  # what others would have sent, and so the loss
    rank = dist.get_rank() if dist.is_initialized() else 0
    workload, batches_of = build(config)
    watch, held = Stopwatch(config.device), Held(config.device)
    shares: list[torch.Tensor] = []
    token_shares: list[float] = []
    labels = 0.0
    total = config.warmup + config.steps
    for step in range(total):
        batches = batches_of(step)
        if config.world_size > 1:
            dist.barrier()
        with held.step(), replaced(waiting, "around", watch.aside), watch.step():
            results = run_step(workload, batches, watch.lap)
        if isinstance(workload, AttentionAlone):
            workload.time_the_whole()
        else:
            shares.append(torch.stack(results).sum())
            token_shares.append(sum(batch.share for batch in batches))
            labels = labels or min((batch.labels_by_weight() for batch in batches if batch.n_own), default=0)
        progress(f"step {step + 1}/{total}")
    found: dict[str, Any] = {"steps": watch.steps()[config.warmup :], "held": held.by_step}
    if isinstance(workload, AttentionAlone):
        found["ideal"] = workload.ideal_ms()[config.warmup :]
    elif not made_up:
        found["losses"] = workload.global_loss(torch.stack(shares))
        found |= {"loss_shares": torch.stack(shares).tolist(), "token_shares": token_shares, "labels": labels}
    held.look()
    found["reserved"] = held.reserved if on_gpu else None
    if isinstance(workload, Training) and config.save_path is not None and not made_up:
        save(workload, config, rank)
    if config.profile and not task.silent:
        trace(workload, batches, trace_file(task, rank))
    if isinstance(workload, AttentionAlone) and not made_up:
        found["errors"] = workload.errors()
    progress("counting")
    observed = observe(workload, batches, MemoryLog(config.device, workload.state()))
    counted = measured(observed, device_name=device_name(config), **found)
    if config.exchanges and not task.silent:
        areas.write(watched(workload, batches[0], config.seq_len), Path(task.traces) / "exchanges.json")
    if on_gpu:  # the real allocator's peak includes what kernels take inside themselves
        peak = counted.peak
        counted.peak = replace(peak, total=held.allocated, other=peak.other + held.allocated - peak.total)
    return counted


SERIES = {"collectives": collectives.measured, "kernels": kernels.measured}
PASSES = 3  # through a whole series: what disturbs the machine for a moment meets none of its parts in all of them
NOTHING = Observed([], 0, {"": Peak()}, 0)


def run_series(task: Task, progress: Callable[[str], None]) -> Rank:
    """Time one thing after the other, of those of which a step consists."""
    config, strategy, series = task.config, build_strategy(task.config), dict[Work, Timed]()
    for n in range(PASSES):
        for timed in SERIES[config.workload](config, strategy):
            series.setdefault(timed.work, Timed(timed.work, [])).us.extend(timed.us)
            progress(f"pass {n + 1}/{PASSES} {timed.work.kind} {timed.work.shape or timed.work.bytes}")
    return measured(NOTHING, device_name=device_name(config), series=list(series.values()))


def device_name(config: Config) -> str:
    return torch.cuda.get_device_name() if config.device == "cuda" else machine.cpu_name()


def measured(observed: Observed, **found: Any) -> Rank:
    """What was observed, and what else was found."""
    return Rank(
        comm=observed.comm,
        flops=observed.flops,
        peak=observed.peak,
        after_forward=observed.after_forward,
        host_bytes=observed.host_bytes,
        backend=dist.get_backend() if dist.is_initialized() else "none",
        torch_version=torch.__version__,
        rank=dist.get_rank() if dist.is_initialized() else 0,
        **found,
    )


BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def save(training: Training, config: Config, rank: int) -> None:
    """Write the trained weights as a Hugging Face directory. Every rank takes part; rank 0 writes."""
    tensors = whole_parameters(training.model, training.shapes)
    if rank == 0:
        dtype = str(PRECISIONS[config.precision][0]).removeprefix("torch.")
        checkpoint.write(str(config.save_path), training.model.config, tensors, dtype)
    else:
        for _ in tensors:
            pass
