"""One configuration to one row, and the table at the end."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import records
from bench.check import Invalid, resolve
from bench.config import Job
from bench.fit import longest
from bench.launch import Outcome, launch, start_server
from strategies import PEERS

RUNS = Path("runs")
console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, highlight=False, markup=False)


def stays(row: dict, rerun: str, rounds: int) -> bool:
    """Is this row kept, and not measured again? An invalid one costs nothing to look at again."""
    if row["status"] == "invalid" or (row["status"] == "ok" and len(row.get("round_ms", [0])) < rounds):
        return False
    return rerun == "none" or (rerun == "failed" and row["status"] == "ok")


Launcher = Callable[[dict, str], Outcome]  # of a configuration, and what it is in a few words


def in_silence(config: dict, what: str) -> Outcome:
    return launch(config, lambda text: None)


def in_sight(config: dict, what: str) -> Outcome:
    """Say meanwhile what runs; on a terminal in a line that also says how far it is, and goes."""
    if not console.is_terminal:
        console.print(what)
        return in_silence(config, what)
    with console.status(what) as status:
        return launch(config, lambda text: status.update(f"{what} · {text}"))


class Families:
    """Launches simulated configurations of which many differ in nothing but how long and how many sequences are.

    How a step grows with depth is the same for these: the third depth (bench/simulate.py) is run for the first alone.
    """

    def __init__(self) -> None:
        self.foretold: set[str] = set()

    def __call__(self, config: dict, what: str) -> Outcome:
        family = records.run_id({**config, **dict.fromkeys(("seq_len", "batch_size", "traces"))})
        outcome = in_silence({**config, "foretold": family in self.foretold}, what)
        if outcome.status == "ok" and all(rank["foretold"] for rank in outcome.ranks):
            self.foretold.add(family)
        return outcome


def run(job: Job, rerun: str, launcher: Launcher = in_sight, earlier: list[list[dict]] | None = None) -> dict:
    """Run one configuration and write its row, or return the row that is kept from an earlier run.

    earlier: what the ranks measured in earlier rounds of this sweep; this round's is added to it.
    """
    rounds = earlier if earlier is not None else []
    folder = RUNS / job.config["name"]
    started = time.time()
    record = {
        "status": "invalid",
        "reason": "",
        **records.provenance(),
        "command": job.command,
        "started_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    comm: list[dict] = []
    try:
        config = resolve(job.config)
    except Invalid as fault:
        record |= {"run_id": records.run_id(job.config), "reason": str(fault), **records.describe(job.config)}
    else:
        record |= {"run_id": records.run_id(config), **records.describe(config), "config": config}
        stored = records.load(folder, record["run_id"])
        if stored and not rounds and stays(stored, rerun, config["rounds"]):
            return {**stored, "kept": True}
        traces = str((folder / record["run_id"]).resolve())  # where ranks leave them
        outcome = launcher({**config, "traces": traces}, title(record))
        if outcome.status == "ok" and config["exposed_comm"]:
            silent = launcher({**config, "mode": "silent"}, f"{title(record)} · collectives return at once")
            outcome.ranks[0]["silent"] = silent.ranks
            outcome = outcome if silent.status == "ok" else silent
        record |= {"status": outcome.status, "reason": outcome.reason}
        if outcome.status == "ok":
            rounds.append(outcome.ranks)
            measured, comm = records.measure(config, rounds)
            record |= {**measured, "reason": "; ".join(config["notes"]), "mode_seconds": outcome.seconds}
            if (fault := records.implausible(record)) is not None:
                record |= {"status": "error", "reason": fault}
            elif (wrong := records.inaccurate(record)) is not None:
                ours = record["strategy"] not in PEERS
                record |= {"status": "error" if ours else "ok", "reason": joined(wrong, record["reason"])}
            elif config["mode"] == "simulate" and config["cluster"]:
                record |= fit(config, record, launcher)
        elif outcome.traceback:
            record["traceback"] = outcome.traceback
    record["seconds"] = round(time.time() - started, 3)
    records.save(folder, record, comm)
    return record


def fit(config: dict, record: dict, launcher: Launcher) -> dict:
    """Does the simulated rank fit into its GPU, and, if that is asked, up to which sequence would it?"""
    capacity, peak = record["capacity_bytes"], record["peak_bytes"]
    status, reason = record["status"], record["reason"]
    if peak > capacity:
        have = f"the fullest rank holds {gib(peak)} and a {record['cluster']} has {gib(capacity)}"
        status, reason = "oom", joined(have, reason)
    if config["search"] == "none":
        return {"status": status, "reason": reason}

    def peak_of(seq_len: int) -> int:
        outcome = launcher({**config, "seq_len": seq_len}, f"{title(record)} · does seq_len={seq_len} fit?")
        if outcome.status != "ok":
            raise RuntimeError(f"search={config['search']} ended at seq_len={seq_len}: {outcome.reason}")
        return max(rank["peak"]["total"] for rank in outcome.ranks)

    try:
        found = longest(config, capacity, peak_of)
    except RuntimeError as error:
        return {"status": "error", "reason": str(error)}
    said = f"seq_len={found} is the longest that fits" if found else "no sequence is short enough to fit"
    return {"status": status, "reason": joined(reason, said), "max_seq_len": found}


def joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def title(row: dict) -> str:
    """What a row ran, in a few words."""
    layout = f" {row['ring_layout']}" if (row["ring"] or 1) > 1 else ""
    return f"{row['strategy']} · {mesh(row)}{layout} · seq_len={row['seq_len']}"


def mesh(row: dict) -> str:
    degrees = {axis: row[axis] for axis in ("dp", "tp", "ulysses", "ring") if (row[axis] or 1) > 1}
    return " ".join(f"{axis}={degree}" for axis, degree in degrees.items()) or f"world_size={row['world_size']}"


def outcome_line(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    kept = " (kept from an earlier run)" if row.get("kept") else ""
    if row.get("step_ms_median") is None:
        return f"{gib(row['peak_bytes'])} at most on a rank, {row['comm_bytes'] / 2**20:,.1f} MiB sent{kept}"
    return f"{row['step_ms_median']:.1f} ms a step{kept}"


def cell(key: str, form: str, unit: float = 1) -> Callable[[dict], str]:
    """Writes a row's value of `key`, in `unit`; nothing where it has none."""
    return lambda row: form.format(row[key] / unit if unit > 1 else row[key]) if row.get(key) is not None else ""


CELLS = {  # of the table at the end
    "": lambda row: row["status"] if row["status"] != "ok" else "",
    "step ms": cell("step_ms_median", "{:.1f}"),
    "tokens/s": cell("tokens_per_s", "{:,.0f}"),
    "exposed ms": cell("exposed_comm_ms", "{:.1f}"),
    "peak MiB": cell("peak_bytes", "{:,.1f}", 2**20),
    "of memory": lambda row: f"{row['peak_bytes'] / row['capacity_bytes']:.0%}" if fits_known(row) else "",
    "longest": cell("max_seq_len", "{:,}"),
    "sent MiB": cell("comm_bytes", "{:,.2f}", 2**20),
    "of ideal": cell("share_of_ideal", "{:.0%}"),
    "loss": lambda row: f"{row['loss_first']:.4f} → {row['loss_last']:.4f}" if row.get("losses") else "",
}


def fits_known(row: dict) -> bool:
    return row.get("peak_bytes") is not None and row.get("capacity_bytes") is not None


def print_table(rows: list[dict], name: str) -> None:
    """One line a row: strategy, mesh, length, and the columns that some row has a value for."""
    table = Table(title=f"sweep {name}" if len(rows) > 1 else None, title_justify="left")
    shown = {head: cell for head, cell in CELLS.items() if any(cell(row) for row in rows)}
    for column in ("strategy", "mesh"):
        table.add_column(column)
    for column in ("seq_len", *shown):
        table.add_column(column, justify="right")
    for row in rows:
        layout = f" {row['ring_layout']}" if (row["ring"] or 1) > 1 else ""
        cells = [cell(row) for cell in shown.values()]
        table.add_row(row["strategy"], mesh(row) + layout, str(row["seq_len"]), *cells)
    console.print(table)
    if all(row["mode"] == "simulate" for row in rows):
        console.print("mode=simulate has no clock yet: times are left empty")
    for row in rows:
        if row["reason"]:
            console.print(f"{title(row)} · {row['status']}: {row['reason']}")
    console.print(f"{os.path.join(RUNS, name, 'results.csv')}: one row each, with memory, bytes by phase and command")


def run_one(job: Job) -> dict:
    """A single run always measures."""
    start_server()
    row = run(job, rerun="all")
    if row["status"] == "ok":
        print_table([row], job.config["name"])
    else:
        console.print(f"{title(row)} · {outcome_line(row)}", style="red")
    return row


def run_all(jobs: list[Job]) -> list[dict]:
    """Run a sweep's jobs one after the other, and print the table. Ctrl-C leaves every finished row on disk."""
    done: dict[int, dict] = {}
    try:
        start_server()
        simulated = all(job.config["mode"] == "simulate" for job in jobs)
        for i, row in (simulate_each if simulated else run_each)(jobs):
            done[i] = row
    except KeyboardInterrupt:
        console.print(f"interrupted: {len(done)} of {len(jobs)} rows are in {RUNS / jobs[0].config['name']}; ", end="")
        console.print("the same command again goes on from there")
        sys.exit(130)
    rows = [done[i] for i in sorted(done)]
    print_table(rows, jobs[0].config["name"])
    return rows


def simulate_each(jobs: list[Job]) -> Iterator[tuple[int, dict]]:
    """The same for simulated ranks, which need no quiet machine: as many jobs at a time as there are cores."""
    started, launcher = time.monotonic(), Families()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        waiting = {pool.submit(run, job, job.config["rerun"], launcher): i for i, job in enumerate(jobs)}
        try:
            for n, future in enumerate(as_completed(waiting), 1):
                row = future.result()
                left = (time.monotonic() - started) / n * (len(jobs) - n)
                place = f"[{n}/{len(jobs)}, about {left:.0f} s left] "
                console.print(
                    f"{place}{title(row)} · {outcome_line(row)}", style=None if row["status"] == "ok" else "red"
                )
                yield waiting[future], row
        finally:
            pool.shutdown(cancel_futures=True)


def run_each(jobs: list[Job]) -> Iterator[tuple[int, dict]]:
    """The number of a job and its row, as they are done; a line for each run: which, how many are left, how long.

    With rounds, every job runs once before any runs again, so that all meet the same good and bad moments.
    """
    spent: list[float] = []
    turns = [(turn, i) for turn in range(max(job.config["rounds"] for job in jobs)) for i in range(len(jobs))]
    turns = [(turn, i) for turn, i in turns if turn < jobs[i].config["rounds"]]
    measured: list[list[list[dict]]] = [[] for _ in jobs]
    over = set()
    for n, (turn, i) in enumerate(turns):
        if i in over:
            continue
        job = jobs[i]
        left = f", about {sum(spent) / len(spent) * (len(turns) - n):.0f} s left" if spent else ""
        place = f"[{n + 1}/{len(turns)}{left}] "
        started = time.monotonic()
        row = run(job, job.config["rerun"], lambda config, what: in_sight(config, place + what), measured[i])  # noqa: B023
        if not row.get("kept"):
            spent.append(time.monotonic() - started)
        launched = row["status"] != "invalid" and not row.get("kept")
        said = "    → " if launched and not console.is_terminal else f"{place}{title(row)} · "
        console.print(f"{said}{outcome_line(row)}", style=None if row["status"] == "ok" else "red")
        if turn + 1 == job.config["rounds"] or row.get("kept") or row["status"] != "ok":
            over.add(i)
            yield i, row
