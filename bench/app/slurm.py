"""launch=slurm: the whole sweep as one job, on each of whose hosts torchrun runs the same command with launch=torchrun.

submitit writes the batch file and submits it, and submits it again before its time is over or when Slurm needs its
hosts for others; the rows that exist are kept. What launch.* has no key for, sbatch takes from its own variables
(SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_CONSTRAINT, ...).
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import Checkpointable

from bench.app import records
from bench.app.interrupts import leave
from bench.ranks.launch import loopback
from conf.keys import Config, keys
from conf.resolve import check_value
from conf.words import Invalid

POLL_S = 2.0
END_S = 40.0  # for torchrun, which gives its process 30 s
FIRST_PORT, PORTS = 20000, 10000
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "REVOKED",
    "TIMEOUT",
)


class OnEveryHost(Checkpointable):
    """What the job runs on each of its hosts; after a requeue the same again."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def __call__(self) -> None:
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/many_machines.md says why
        torchrun = subprocess.Popen(self.command(), env=environment, preexec_fn=ignore_usr2)
        try:
            code = torchrun.wait()
        finally:
            end(torchrun)
        if code != 0:
            sys.exit(code)  # an exception would be the job's result, and a requeued job has none yet

    def command(self) -> list[str]:
        job = submitit.JobEnvironment()
        local = job.cluster == "local"
        addresses = ["127.0.0.1"] * job.num_tasks if local else job.hostnames
        port = FIRST_PORT + int(job.raw_job_id) % PORTS
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={job.num_tasks}", "--nproc-per-node=1"),
            *("--rdzv-backend=c10d", f"--rdzv-id={job.job_id}", f"--rdzv-endpoint={addresses[0]}:{port}"),
            f"--rdzv-conf=is_host={int(job.global_rank == 0)},read_timeout=600",
            f"--local-addr={addresses[job.global_rank]}",
            *("-m", "bench", *self.words),
        ]


def ignore_usr2() -> None:
    """It tells submitit that the time is nearly over, and would end all others to whom Slurm sends it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()


def submit(config: Config) -> NoReturn:
    """Submit this command, follow the job until it ends, and end as it did."""
    job = submitted(config)
    log = job.task(0).paths.stdout
    print(f"job {job.job_id} is submitted; the logs of its hosts are in {log.parent}", flush=True)
    try:
        state = follow(job)
    except KeyboardInterrupt as error:
        if config.launch.executor == "local":
            job.cancel()
            print(f"{str(error) or 'interrupted'}: job {job.job_id} ends too")
        else:
            print(f"{str(error) or 'interrupted'}: job {job.job_id} goes on without this command; {how_to_watch(job)}")
        leave(error)
    print(f"job {job.job_id} ended: {state}")
    sys.exit(0 if state.startswith("COMPLETED") else 1)


def how_to_watch(job: submitit.Job) -> str:
    return f"tail -f {job.task(0).paths.stdout} shows what it does, scancel {job.job_id} ends it"


def submitted(config: Config) -> submitit.Job:
    check(config)
    launch, folder = config.launch, (records.RUNS / config.name / "slurm").resolve()
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "WARNING")  # of the job, whose log is the sweep's
    local = launch.executor == "local"
    asked = {
        "name": f"bench-{config.name}",
        "nodes": 1 if local else launch.nodes,
        "tasks_per_node": launch.nodes if local else 1,  # which stand for hosts there
        "gpus_per_node": launch.gpus_per_node,
        "timeout_min": launch.time,
        "stderr_to_stdout": True,
        "mem_gb": 0,  # all that a host has
        "slurm_partition": launch.partition,
        "slurm_exclusive": True,  # what others do on a host would be measured too
        "slurm_additional_parameters": {"requeue": True},
        "slurm_srun_args": ["--cpu-bind=none"],
    }
    try:
        executor = submitit.AutoExecutor(folder, cluster=launch.executor)
        executor.update_parameters(**asked)
        return executor.submit(OnEveryHost(words(config)))
    except (FailedJobError, FailedSubmissionError) as error:
        said = str(error).strip().rpartition("\n")[2]  # sbatch has said it all already
        raise Invalid(f"launch=slurm: the job is not submitted ({said.removeprefix('sbatch: ')})") from None
    except RuntimeError:  # of submitit, which looks for srun
        raise Invalid(
            "launch=slurm: this machine has no sbatch and srun; a login node of the cluster, or to try it out here "
            "launch.executor=local, would do"
        ) from None


def check(config: Config) -> None:
    """Each launch.* by itself, before it is written into a batch file. Raises Invalid."""
    for path, each in keys().items():
        if path.startswith("launch."):
            check_value(path, each.declared.metadata, each.of(config))
    partition = config.launch.partition
    if partition is not None and not re.fullmatch(r"[\w.,-]+", partition):
        raise Invalid(f"launch.partition={partition!r} is no name of a partition; sinfo lists those that there are")


def words(config: Config) -> list[str]:
    """This command's, as its hosts run it."""
    said = [word for word in sys.argv[1:] if not word.startswith("launch=")]
    only_here = config.launch.executor == "local" and config.launch.interface is None
    return [*said, "launch=torchrun", *([f"launch.interface={loopback()}"] if only_here else [])]


def follow(job: submitit.Job) -> str:
    """Show what the hosts say until the job ends -> its last state, and its exit code."""
    logs = [job.task(number).paths.stdout for number in range(job.num_tasks)]
    shown = dict.fromkeys(logs, 0)
    state = ""
    while True:
        before, state = state, state_of(job) or state
        if state != before:
            print(f"job {job.job_id}: {state}", flush=True)
        for log in logs:
            shown[log] += show(log, shown[log])
        if state.startswith(ENDED):
            return state
        time.sleep(POLL_S)


def show(log: Path, start: int) -> int:
    """Print what a log holds from there on -> how much that was."""
    if not log.exists():
        return 0
    with open(log, "rb") as file:
        file.seek(start)
        text = file.read()
    print(text.decode(errors="replace"), end="", flush=True)
    return len(text)


def state_of(job: submitit.Job) -> str:
    """In Slurm's words; nothing where Slurm does not answer now."""
    if isinstance(job, submitit.LocalJob):
        return "RUNNING" if not job.done() else "COMPLETED" if all_have_results(job) else "FAILED"
    asked = subprocess.run(["scontrol", "--oneliner", "show", "job", job.job_id], capture_output=True, text=True)
    if "Invalid job id" in asked.stderr:  # it ended long ago
        return "COMPLETED" if all_have_results(job) else "FAILED"
    known = dict(re.findall(r"\b(JobState|ExitCode)=(\S+)", asked.stdout))
    state = known.get("JobState", "")
    return f"{state}, exit code {known['ExitCode'].partition(':')[0]}" if state.startswith(ENDED) else state


def all_have_results(job: submitit.Job) -> bool:
    return all(job.task(number).paths.result_pickle.exists() for number in range(job.num_tasks))
