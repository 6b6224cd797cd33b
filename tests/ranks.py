"""A pool of gloo ranks that stay up between tests: a test runs on N of them in milliseconds plus its work."""

import contextlib
import multiprocessing as mp
import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

from bench.ranks.launch import loopback, start_server

TIMEOUT_S = 120


def serve(rank: int, world_size: int, rendezvous: str | None, pipe) -> None:
    """One rank: run what arrives, answer with its result or its traceback. Without a rendezvous it is in no group."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = loopback()
    if rendezvous:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((True, function(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    if rendezvous:
        dist.destroy_process_group()
    os._exit(0)


class Pool:
    """world_size ranks in a process group of their own, or in none."""

    def __init__(self, world_size: int, grouped: bool = True) -> None:
        start_server()
        context = mp.get_context("forkserver")
        self.folder = tempfile.TemporaryDirectory()
        rendezvous = os.path.join(self.folder.name, "rendezvous") if grouped else None
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, world_size, rendezvous, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args) -> list:
        """function(rank, *args) on every rank -> the results in rank order. Raises with the traceback that came first.

        Ranks that wait for one that failed would answer only when gloo gives up, with an error that says less.
        """
        for pipe in self.pipes:
            pipe.send((function, args))
        silent, results = dict(zip(self.pipes, range(len(self.pipes)), strict=True)), {}
        while silent:
            if not (answered := wait(silent, TIMEOUT_S)):
                raise TimeoutError(f"ranks {sorted(silent.values())} did not answer in {TIMEOUT_S} s")
            for pipe in answered:
                rank = silent.pop(pipe)
                fine, results[rank] = pipe.recv()
                if not fine:
                    raise AssertionError(f"rank {rank}:\n{results[rank]}")
        return [results[rank] for rank in sorted(results)]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(1)
            process.kill()


pools: dict[tuple[int, bool], Pool] = {}


def on_ranks(world_size: int, function, *args, grouped: bool = True) -> list:
    """Run function(rank, *args) on world_size ranks; a pool that fails is replaced before the next test."""
    key = world_size, grouped
    pool = pools.get(key) or pools.setdefault(key, Pool(*key))
    try:
        return pool.run(function, *args)
    except BaseException:
        pools.pop(key).close()
        raise


@contextlib.contextmanager
def standing_for(rank: int, world_size: int, device: str = "cpu"):
    """This process, which is in no group, is one rank of a made-up one meanwhile."""
    from torch import distributed
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from bench.simulation.emulated import stand_for
    from strategies.ops import mesh
    from strategies.ops.hooks import hooks

    hanging = hooks.backend_of
    stand_for(rank, world_size, device)
    yield
    hooks.backend_of = hanging
    distributed.destroy_process_group()
    mesh.axis_of.cache_clear()
    _clear_sharding_prop_cache()  # DTensor remembers meshes that are equal to the next ones, with groups that are gone
