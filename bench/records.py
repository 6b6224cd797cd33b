"""Records: every configuration ends as runs/<name>/<run_id>/record.json, and as a row of runs/<name>/results.csv."""

import csv
import hashlib
import json
import operator
import os
import statistics
import subprocess
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from analysis.cost_table import step_bytes

# fmt: off
COLUMNS = [
    "run_id", "status", "reason", "mode", "strategy", "model", "world_size", "dp", "tp", "ulysses", "ring",
    "ring_layout", "zero_stage", "seq_len", "batch_size", "precision", "recompute", "attention_kernel", "device",
    "device_name", "backend", "steps", "warmup",
    "step_ms_median", "step_ms_p10", "step_ms_p90", "forward_ms", "backward_ms", "optimizer_ms",
    "cpu_ms_max", "cpu_ms_min", "tokens_per_s", "flops_per_rank", "tflops_per_rank", "mfu",
    "peak_bytes", "peak_reserved_bytes",
    "param_bytes", "grad_bytes", "optimizer_bytes", "activation_bytes", "other_bytes",
    "comm_bytes", "comm_bytes_forward", "comm_bytes_backward", "comm_bytes_optimizer",
    "comm_bytes_params", "comm_bytes_activations",
    "calls_all_gather", "calls_reduce_scatter", "calls_all_reduce", "calls_all_to_all", "calls_p2p",
    "analytic_comm_bytes",
    "loss_first", "loss_last", "torch_version", "git_sha", "git_dirty", "command", "started_at",
    "workload", "direction", "placement", "ulysses_packed", "ring_kv", "mlp_chunks", "loss_chunks", "rounds",
    "iterations_per_s", "ideal_ms", "share_of_ideal",
    "exposed_comm_ms", "cluster", "capacity_bytes", "after_forward_bytes", "max_seq_len", "mode_seconds",
    "relative_error", "n_heads", "n_kv_heads", "ulysses_chunks", "compile",
]
COMM_COLUMNS = ["phase", "kind", "axis", "group_size", "dtype", "calls", "payload_bytes", "sent_bytes", "source"]
# fmt: on
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "p2p")
NOT_IDENTITY = ("name", "rerun", "rounds", "notes", "profile")  # where a configuration is kept, not what it is
CLOSE = {"fp32": 1e-4, "bf16": 0.03, "bf16_mixed": 0.03}  # of two ways to compute the same
ROOT = Path(__file__).parents[1]
saving = threading.Lock()  # simulated configurations run several at a time


def run_id(config: dict) -> str:
    """A hash of the resolved configuration (of the configuration as written, if it is invalid)."""
    identity = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def describe(config: dict) -> dict:
    """The columns that say what was asked for."""
    return {
        "mode": config["mode"],
        "strategy": config["strategy"]["name"],
        "model": config["model"]["name"],
        "n_heads": config["model"]["n_heads"],
        "n_kv_heads": config["model"]["n_kv_heads"],
        "world_size": config["world_size"],
        **config["mesh"],
        "ring_layout": config["ring"]["layout"],
        "attention_kernel": config["attention"]["kernel"],
        **{key: config[key] for key in ["zero_stage", "seq_len", "batch_size", "precision", "recompute", "device"]},
        **{key: config[key] for key in ["steps", "warmup", "workload", "placement", "rounds", "compile"]},
        "direction": config["direction"] if config["workload"] == "attention" else None,
        "ulysses_packed": config["ulysses"]["packed"],
        "ulysses_chunks": config["ulysses"]["chunks"],
        "ring_kv": config["ring"]["kv"],
        "mlp_chunks": config["mlp"]["chunks"],
        "loss_chunks": config["loss"]["chunks"],
        "cluster": config["cluster"]["name"] if config["cluster"] else None,
        "capacity_bytes": int(config["cluster"]["mem_gb"] * 2**30) if config["cluster"] else None,
    }


def exposed_comm(rounds: list[list[dict]]) -> float | None:
    """Step time less that of the same step when collectives return at once, where that was timed, round by round."""
    if "silent" not in rounds[0][0]:
        return None
    pairs = [(of_round, of_round[0]["silent"]) for of_round in rounds]
    medians = [[statistics.median(slowest(ranks)["step"]) for ranks in pair] for pair in pairs]
    return statistics.median(real - silent for real, silent in medians)


def measure(config: dict, rounds: list[list[dict]]) -> tuple[dict, list[dict]]:
    """The columns that say what came out, of all rounds of all ranks' measurements, and the busiest rank's comm.csv.

    Times are medians over the steps of all rounds; what is counted is the same in each, and the last one's is taken.
    """
    ranks = rounds[-1]
    busiest = max(ranks, key=lambda rank: sum(entry["sent_bytes"] for entry in rank["comm"]))
    fullest = max(ranks, key=lambda rank: rank["peak"]["total"])["peak"]
    flops = max(rank["flops"] for rank in ranks)
    first = ranks[0]
    losses = first["losses"]
    row = {
        "device_name": first["device_name"],
        "backend": first["backend"],
        "attention_kernel": first["kernel"],
        "flops_per_rank": flops,
        **(times(config, rounds, flops) if first["steps"] else {}),
        "peak_bytes": fullest["total"],
        "peak_reserved_bytes": max(rank["reserved"] for rank in ranks) if first["reserved"] is not None else None,
        "param_bytes": fullest["params"],
        "grad_bytes": fullest["grads"],
        "optimizer_bytes": fullest["optimizer"],
        "activation_bytes": fullest["activations"],
        "other_bytes": fullest["other"],
        "after_forward_bytes": max(rank["after_forward"] for rank in ranks),
        **communication(busiest["comm"]),
        "analytic_comm_bytes": step_bytes(config),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "losses": losses,
        "errors": first["errors"],
        "relative_error": max(first["errors"].values(), default=None),
        "torch_version": first["torch_version"],
    }
    return row, [{**entry, "sent_bytes": round(entry["sent_bytes"])} for entry in busiest["comm"]]


def times(config: dict, rounds: list[list[dict]], flops: int) -> dict:
    """The columns that need a clock."""
    timed = [slowest(of_round) for of_round in rounds]
    laps = {lap: [ms for of_round in timed for ms in of_round[lap]] for lap in timed[0]}
    step_ms = statistics.median(laps["step"])
    ranks = range(len(rounds[0]))
    cpu_ms = [[step["cpu"] for of_round in rounds for step in of_round[rank]["steps"]] for rank in ranks]
    ideal = [ms for of_round in rounds for ms in of_round[0]["ideal"]]
    device_name = rounds[0][0]["device_name"]
    peak_tflops = peak_tflops_of(device_name, config["precision"]) if config["device"] == "cuda" else None
    tflops = flops / step_ms / 1e9
    return {
        "step_ms_median": step_ms,
        "step_ms_p10": percentile(laps["step"], 0.1),
        "step_ms_p90": percentile(laps["step"], 0.9),
        **{f"{lap}_ms": statistics.median(laps[lap]) for lap in ("forward", "backward", "optimizer")},
        "cpu_ms_max": max(map(statistics.median, cpu_ms)),
        "cpu_ms_min": min(map(statistics.median, cpu_ms)),
        "tokens_per_s": config["batch_size"] * config["seq_len"] / step_ms * 1000,
        "iterations_per_s": 1000 / step_ms,
        "round_ms": [statistics.median(of_round["step"]) for of_round in timed],
        "exposed_comm_ms": exposed_comm(rounds),
        "tflops_per_rank": tflops,
        "mfu": tflops / peak_tflops if peak_tflops else None,
        "ideal_ms": statistics.median(ideal) if ideal else None,
        "share_of_ideal": statistics.median(map(operator.truediv, ideal, laps["step"])) if ideal else None,
    }


def slowest(ranks: list[dict]) -> dict[str, list[float]]:
    """Per lap (forward, backward, optimizer, step), of every step, the rank that took longest."""
    steps = list(zip(*(rank["steps"] for rank in ranks), strict=True))
    return {lap: [max(rank[lap] for rank in step) for step in steps] for lap in steps[0][0]}


def communication(entries: list[dict]) -> dict:
    """The totals of comm.csv. Recomputation is a part of backward."""

    def total(keep) -> int:
        return sum(round(entry["sent_bytes"]) for entry in entries if keep(entry))

    return {
        "comm_bytes": total(lambda e: True),
        "comm_bytes_forward": total(lambda e: e["phase"] == "forward"),
        "comm_bytes_backward": total(lambda e: e["phase"] in ("backward", "recompute")),
        "comm_bytes_optimizer": total(lambda e: e["phase"] == "optimizer"),
        "comm_bytes_params": total(lambda e: e["weights"]),
        "comm_bytes_activations": total(lambda e: not e["weights"]),
        **{f"calls_{kind}": sum(e["calls"] for e in entries if e["kind"] == kind) for kind in KINDS},
    }


def implausible(row: dict) -> str | None:
    """Why a measurement cannot be right, if it cannot: such a row must not look like a result."""
    lost = [loss for loss in row["losses"] if not abs(loss) < float("inf")]
    if lost:
        return f"the loss is not finite at step {row['losses'].index(lost[0]) + 1}"
    if row["world_size"] > 1 and row["comm_bytes"] == 0 and row["analytic_comm_bytes"] != 0:
        return f"{row['world_size']} ranks ran and sent nothing"
    if (row.get("mfu") or 0) > 1:
        return f"{row['tflops_per_rank']:.0f} TFLOPS is more than the device can do"
    return None


def inaccurate(row: dict) -> str | None:
    """What of attention alone is not what one process computes, beyond its precision."""
    wrong = [name for name, error in row["errors"].items() if not error < CLOSE[row["precision"]]]
    if not wrong:
        return None
    worst = max(row["errors"].values())
    return f"wrong: {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} up to {worst:.0%} away from one process'"


def percentile(values: list[float], share: float) -> float:
    """Linearly interpolated, as numpy's."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@cache
def peak_tflops_of(device_name: str, precision: str) -> float | None:
    """The dense 16-bit peak of a known GPU, from conf/cluster/; None for other devices and for fp32."""
    from omegaconf import OmegaConf

    if precision == "fp32":
        return None
    for file in sorted((ROOT / "conf" / "cluster").glob("*.yaml")):
        cluster = OmegaConf.load(file)
        if any(name in device_name for name in cluster.device_names):
            return float(cluster.bf16_dense_tflops)
    return None


@cache
def provenance() -> dict:
    """The commit of this checkout, and whether it was changed since."""

    def git(*args: str) -> str:
        result = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        return {"git_sha": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except FileNotFoundError:  # no git on this machine
        return {"git_sha": "", "git_dirty": None}


def save(folder: Path, record: dict, comm: Iterable[dict]) -> None:
    """Write one configuration's record and its comm.csv, then the sweep's results.csv."""
    target = folder / record["run_id"]
    with saving:
        target.mkdir(parents=True, exist_ok=True)
        write_csv(target / "comm.csv", COMM_COLUMNS, comm)
        replace(target / "record.json", json.dumps(record, indent=2) + "\n")
        write_csv(folder / "results.csv", COLUMNS, load_all(folder))


def load(folder: Path, run_id: str) -> dict | None:
    """A record that was written whole, or None."""
    try:
        return json.loads((folder / run_id / "record.json").read_text())
    except (OSError, ValueError):
        return None


def load_all(folder: Path) -> list[dict]:
    """Every record of a sweep, oldest first."""
    found = (load(folder, file.parent.name) for file in folder.glob("*/record.json"))
    return sorted((record for record in found if record), key=lambda record: (record["started_at"], record["run_id"]))


def write_csv(file: Path, columns: list[str], rows: Iterable[dict]) -> None:
    temporary = file.with_suffix(".tmp")
    with open(temporary, "w", newline="") as out:
        writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, file)


def replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)
