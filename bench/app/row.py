"""One configuration to one row."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime

from analysis import UserError
from analysis.accounts import step_bytes, step_flops, work_max_by_mean
from bench.app import here, judge, records
from bench.app.job import Job
from bench.app.records import Row
from bench.ranks.task import Outcome, Task
from bench.simulation.fit import longest
from bench.workloads import data
from conf.clock import LAUNCH_BOUND
from conf.columns import described, measured
from conf.keys import OF_A_MACHINE, Config, run_id
from conf.measurement import Entry, Measured, Round
from conf.meshes import PEERS
from conf.resolve import Resolved, resolve
from conf.series import written
from conf.words import Invalid

Launcher = Callable[[Task, str], Outcome]  # of a task, and what is special about it


def resolved_here(config: Config) -> Resolved:
    """The configuration that will run on this machine. Raises Invalid."""
    resolved = resolve(config)
    here.check(resolved)
    return resolved


def run(job: Job, rerun: str, launcher: Launcher, rounds: list[Round] | None = None) -> Row:
    """Run one configuration and write its row, or return the row that is kept from an earlier run.

    rounds: what was measured in earlier rounds of this sweep; this round's is added to it.
    """
    rounds = rounds if rounds is not None else []
    folder = records.RUNS / job.config.name
    started = time.time()
    began = datetime.now(UTC).isoformat(timespec="milliseconds")
    where_from = {**records.provenance(), "command": job.command, "started_at": began}
    comm: list[Entry] = []
    series: list[dict] = []
    replaced = []  # rows of the same under another id: of an older version, or refused before it could be resolved
    try:
        resolved = resolved_here(job.config)
    except Invalid as fault:
        row = {"run_id": run_id(job.config), "status": "invalid", "reason": str(fault), **described(job.config)}
    else:
        config = resolved.config
        stored = records.find(folder, config)
        if stored and not rounds and stays(stored, rerun, config.rounds):
            return {**stored, "kept": True}
        replaced = [run_id(job.config), *([stored["run_id"]] if stored else [])]
        row = {"run_id": run_id(config), "status": "", "reason": "", **described(config), "config": asdict(config)}
        answer, unanswered = searched(resolved, launcher)
        row |= answer
        traces = str((folder / row["run_id"]).resolve())
        outcome = (
            Outcome("error", unanswered, []) if unanswered else launched(resolved.config, traces, launcher, rounds)
        )
        row |= {"status": outcome.status, "reason": outcome.reason}
        if outcome.traceback:
            row["traceback"] = outcome.traceback
        if outcome.status == "ok":
            found = Measured(resolved.config, rounds, seconds=outcome.seconds, peak_tflops=peak_tflops(config, rounds))
            if config.workload in OF_A_MACHINE:
                series = written(config.workload, found.ranks)
            else:
                found.mask = data.mask_of_step(resolved.config)
                put_derived(resolved, found)
                resolved.notes += timeless(found)
            row |= {**measured(found), "reason": "; ".join(resolved.notes)}
            row |= judged(found, row["reason"]) or fit(resolved.config, row)
            comm = found.busiest.comm
    row |= {**where_from, "seconds": round(time.time() - started, 3)}
    records.save(folder, row, comm, replaced, series)
    return row


def stays(row: Row, rerun: str, rounds: int) -> bool:
    """Is this row kept, and not measured again? An invalid one costs nothing to look at again."""
    if row["status"] == "invalid" or (row["status"] == "ok" and len(row.get("round_ms") or [0]) < rounds):
        return False
    return rerun == "none" or (rerun == "failed" and row["status"] == "ok")


def launched(config: Config, traces: str, launcher: Launcher, rounds: list[Round]) -> Outcome:
    """A round of a configuration, added to its rounds if it ended well."""
    task = Task(config, traces)
    outcome = believed(task, launcher(task, ""))
    if outcome.status != "ok":
        return outcome
    found = Round(outcome.ranks)
    if config.exposed_comm:
        in_silence = replace(task, silent=True)
        silent = believed(in_silence, launcher(in_silence, "collectives return at once"))
        if silent.status != "ok":
            return silent
        found.silent = silent.ranks
    rounds.append(found)
    return outcome


def believed(task: Task, outcome: Outcome) -> Outcome:
    """An outcome, or what makes it none."""
    fault = judge.broken(task.config, task.silent, outcome.ranks) if outcome.status == "ok" else None
    return outcome if fault is None else Outcome("error", fault, [])


def put_derived(resolved: Resolved, found: Measured) -> None:
    """What the strategy's account says that the ranks send and compute; a note if it cannot be read."""
    try:
        config, mask = resolved.config, found.mask
        found.derived_bytes = step_bytes(config, found.busiest.rank, mask)
        found.derived_flops = max(step_flops(config, rank.rank, mask) or 0 for rank in found.ranks) or None
        found.work_max_by_mean = work_max_by_mean(config, mask)
    except UserError as error:
        resolved.notes.append(str(error))


def timeless(found: Measured) -> list[str]:
    """What is to be said of a predicted time, or of none where the cluster has a clock."""
    config = found.config
    lacking = dict.fromkeys(rank.unpredicted for rank in found.ranks if rank.unpredicted)
    tokens = config.micro_batch_size * config.seq_len // config.world_size
    if found.predicted and config.device == "cuda" and tokens < LAUNCH_BOUND:
        return [f"predicted for {tokens} tokens a GPU, where launches decide: no published time was held against that"]
    return [f"no predicted time: {said}" for said in lacking]


def peak_tflops(config: Config, rounds: list[Round]) -> float | None:
    device_name = rounds[0].ranks[0].device_name
    return judge.peak_tflops_of(device_name, config.precision) if config.device == "cuda" and device_name else None


def judged(found: Measured, noted: str) -> Row:
    """What is to be said of a row that is wrong; a peer's is still a row."""
    if (fault := next(judge.faults(found), None)) is not None:
        return {"status": "error", "reason": fault}
    if (wrong := judge.inaccurate([rank.errors for rank in found.ranks], found.config.precision)) is not None:
        return {"status": "ok" if found.config.strategy.name in PEERS else "error", "reason": joined(wrong, noted)}
    return {}


def fit(config: Config, row: Row) -> Row:
    """Does the simulated rank fit into its GPU?"""
    if config.mode != "simulate" or config.cluster is None or row["fits"] != "oom":
        return {}
    has = f"{gib(row['capacity_bytes'])}, of which {gib(row['context_bytes'])} is taken before it begins"
    have = f"the fullest rank holds {gib(row['peak_bytes'])} and a {config.cluster.name} has {has}"
    return {"status": "oom", "reason": joined(have, row["reason"])}


def searched(resolved: Resolved, launcher: Launcher) -> tuple[Row, str]:
    """search=max_seq_len: the longest sequence that fits is from here on the configuration's; or why it has none."""
    config = resolved.config
    if config.search == "none" or config.cluster is None:
        return {}, ""
    room = config.cluster.capacity_bytes - config.cluster.context_bytes

    def peak_of(seq_len: int) -> int:
        outcome = launcher(Task(replace(config, seq_len=seq_len)), f"does seq_len={seq_len} fit?")
        if outcome.status != "ok":
            raise RuntimeError(f"search={config.search} ended at seq_len={seq_len}: {outcome.reason}")
        return max(rank.peak.total for rank in outcome.ranks)

    try:
        found = longest(config, room, peak_of)
    except RuntimeError as error:
        return {}, str(error)
    resolved.notes.append(
        f"seq_len={found} is the longest that fits" if found else "no sequence is short enough to fit"
    )
    resolved.config = replace(config, seq_len=found or config.seq_len)
    return {"seq_len": resolved.config.seq_len, "max_seq_len": found}, ""


def joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
