"""A cluster's file from what was measured on it: python -m analysis calibrate runs/calibrate [--out FILE.yaml]

Curves are fitted to kernels.csv and collectives.csv, and to nothing else: no step's time is looked at. What the file
says of a GPU beside its clock is that of conf/cluster/; of a CPU, what its host told.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from analysis import UserError, machine, plots
from analysis.curves import Fit, fit
from analysis.reading import Sweep, load
from conf import tiers
from conf.clock import Rate
from conf.clusters import of_device
from conf.files import FileFault, check_writable
from conf.keys import OF_A_MACHINE

AGAIN = "python -m bench -m sweep=calibrate measures it"
TILES = (1, 32, 64, 128, 256, 512, 1024)  # keys


@dataclass
class Calibration:
    """A cluster's clock, and the fits that it was made of, by their names in it."""

    tile: int
    call_us: float
    group_us: float
    kernels: dict[str, Fit]
    links: dict[tuple[str, str, int], Fit]

    @property
    def all(self) -> dict[str, Fit]:
        links = {".".join(map(str, key)): found for key, found in self.links.items()}
        names = {name: name if name in machine.BY_FLOPS else f"kernels.{name}" for name in self.kernels}
        return {**{names[name]: found for name, found in self.kernels.items()}, **links}


def printed(folder: Path, out: Path | None) -> str:
    """What the command prints: the curves with what is left of each, and where the file is."""
    sweep = complete(load(folder))
    found = calibrated(sweep)
    file, table = out or folder / "cluster.yaml", f"{left_over(found)}\n{quiet(sweep)}"
    write(file, cluster_of(sweep, found), table)
    for name, figure in pictures(sweep, found).items():
        plots.save(figure, folder / "calibration", name)
    return (
        f"{table}\n\n{file}: cluster={file if '/' in str(file) else f'./{file}'} takes it; "
        f"{folder / 'calibration'} has the pictures"
    )


def complete(sweep: Sweep) -> Sweep:
    """A sweep of which a clock can be made. Raises UserError for one that is half done, or of different things."""
    folder, rows = sweep.folder, sweep.rows[sweep.rows.workload.isin(OF_A_MACHINE)]
    if rows.empty:
        raise UserError(f"{folder}: no row is of workload=kernels or collectives; {AGAIN}")
    for _, row in rows[rows.status != "ok"].iterrows():
        raise UserError(f"{folder}: its row of workload={row.workload} ended as {row.status}: {row.reason}")
    for run_id, workload in zip(rows.run_id, rows.workload, strict=True):
        if run_id not in sweep.series:
            raise UserError(next((p for p in sweep.problems if run_id in p), f"{folder / run_id}: no {workload}.csv"))
    kernels, collectives = (rows[rows.workload == workload] for workload in ("kernels", "collectives"))
    if kernels.empty or (collectives.empty and (kernels.world_size > 1).any()):
        raise UserError(f"{folder}: no row is of workload={'kernels' if kernels.empty else 'collectives'}; {AGAIN}")
    for column in ("device_name", "precision", "backend"):
        values = [value for value in dict.fromkeys(rows[column]) if value != "none"]
        if len(values) > 1:
            raise UserError(f"{folder}: rows of {column} {' and '.join(values)}, and a clock is of one")
    threads = sorted({threads_of(sweep, run_id) for run_id in kernels.run_id})
    if len(threads) > 1 and (rows.device == "cpu").all():
        raise UserError(f"{folder}: kernels of ranks with {' and '.join(map(str, threads))} threads; a folder of each")
    return sweep


def threads_of(sweep: Sweep, run_id: str) -> int:
    """Of a rank, as bench/ranks/worker.py sets them."""
    return max(1, sweep.records[run_id]["machines"][0]["cores"] // tiers.ranks_per_host(sweep.configs[run_id]))


def calibrated(sweep: Sweep) -> Calibration:
    tile = min(TILES, key=lambda tile: squares(sweep, tile))
    kernels = {name: fit(points) for name, points in machine.of_kernels(sweep, tile).items()}
    links = {key: fit(points) for key, points in machine.of_links(sweep).items()}
    call, group = (machine.us_of_the_host(sweep, kind) for kind in ("call", "group"))
    return Calibration(tile, call, group, kernels, links)


def squares(sweep: Sweep, tile: int) -> float:
    """What is left of attention, if whole tiles of so many keys are computed."""
    points = machine.of_kernels(sweep, tile)
    return sum(float(np.sum(fit(points[name]).errors ** 2)) for name in machine.ATTENTION if name in points)


def left_over(found: Calibration) -> str:
    """Every curve: its figures, and how far the points are from it."""
    rows = [
        {
            "curve": name,
            "points": len(each.points.us),
            "at most": f"{each.rate.rate:,.4g} {'GFLOP/s' if each.points.unit == 'FLOP' else 'GB/s'}",
            "half of it at": f"{each.rate.half:,.3g} {each.points.unit}",
            "power": f"{each.rate.power:.2f}",
            "floor us": f"{each.rate.floor_us:.4g}",
            "median error": f"{np.median(each.errors):.1%}",
            "worst error": f"{each.errors.max():.1%}",
        }
        for name, each in found.all.items()
    ]
    return pd.DataFrame(rows).to_string(index=False)


def quiet(sweep: Sweep) -> str:
    """How steady the machine was: what others ran on it meanwhile is in the curves, too."""
    lines = [line for table in sweep.series.values() for line in table]
    spreads = [(line["time_us_p90"] - line["time_us_p10"]) / line["time_us"] for line in lines]
    loads = [record["load_after"] for run_id, record in sweep.records.items() if run_id in sweep.series]
    said = f"Times spread (p10 to p90) over {np.median(spreads):.0%} of their median, in the median of {len(lines)}"
    return f"{said}; load at the end {max(filter(None, loads), default=0):.2f}."


# The file.


def cluster_of(sweep: Sweep, found: Calibration) -> dict[str, Any]:
    """All keys of a cluster's file."""
    clock = {
        "sources": sources(sweep),
        **{name: plain(found.kernels[name].rate) for name in machine.BY_FLOPS if name in found.kernels},
        "tile": found.tile,
        "kernels": {name: plain(each.rate) for name, each in found.kernels.items() if name not in machine.BY_FLOPS},
        **{tier: tier_of(found, tier) for tier in ("intra", "inter")},
        "call_us": found.call_us,
        "group_us": found.group_us,
    }
    return {**hardware(sweep, found), "clock": clock}


def tier_of(found: Calibration, tier: str) -> dict[str, dict[str, dict]]:
    """collective -> ranks or nodes, as text: JSON, in which a record keeps them, has no other names."""
    nested: dict[str, dict[str, dict]] = {}
    for (of, kind, size), each in found.links.items():
        if of == tier:
            nested.setdefault(kind, {})[str(size)] = plain(each.rate)
    return nested


def plain(rate: Rate) -> dict[str, float]:
    """Without what is as by default."""
    return {name: value for name, value in asdict(rate).items() if value != getattr(Rate, name, None)}


def sources(sweep: Sweep) -> str:
    rows = sweep.rows[sweep.rows.run_id.isin(sweep.series)]
    first = rows.iloc[0]
    host = sweep.records[first.run_id]["machines"][0]
    ranks = f"threads a rank {threads_of(sweep, first.run_id)} of {host['cores']}"
    commit = f"commit {first.git_sha[:10]}{' with changes' if str(first.git_dirty) == 'True' else ''}"
    when = min(rows.started_at)[:10]
    commands = "; ".join(dict.fromkeys(rows.command))
    of = f"{first.device_name} in {host['name']}, {ranks}, {first.backend}, torch {first.torch_version}"
    return f"measured: {of}, {first.precision}, {when}, {commit}: {commands}"


def hardware(sweep: Sweep, found: Calibration) -> dict[str, Any]:
    """What a cluster's file says beside its clock: of a known GPU what conf/cluster/ has, of a CPU what is known."""
    run_id = next(iter(sweep.measured("kernels")))
    record, config = sweep.records[run_id], sweep.configs[run_id]
    device, host, ranks = record["device_name"], record["machines"][0], tiers.ranks_per_host(config)
    if config.device == "cuda":
        if (known := of_device(device)) is not None:
            return known
        raise UserError(f"{device} is none of conf/cluster/; a file there that says its memory and its peak would do")
    return {
        "name": f"{device}, {ranks} ranks",
        "device_names": [device],
        "bf16_dense_tflops": float(f"{fastest(found, 'products') / 1000:.4g}"),
        "mem_gb": round(host["memory_bytes"] / 2**30 / ranks, 2),
        "context_gb": 0,
        "hbm_gbps": fastest(found, "copy"),
        "intra_kind": record["backend"],
        "intra_uni_gbps_per_gpu": max([*rates(found, "intra")], default=fastest(found, "copy")),
        "gpus_per_node": ranks,
        "nic_uni_gbps_per_gpu": max([*rates(found, "inter")], default=None),
    }


def fastest(found: Calibration, kernel: str) -> float:
    """The best rate of its points: no peak of a CPU is published as a GPU's is."""
    return highest(found.kernels[kernel])


def highest(each: Fit) -> float:
    return float(f"{np.max(each.points.work / each.points.us) / 1000:.4g}")


def rates(found: Calibration, tier: str) -> Iterator[float]:
    yield from (highest(each) for (of, _, _), each in found.links.items() if of == tier)


def write(file: Path, cluster: dict[str, Any], table: str) -> None:
    """The file, with what is left of each curve as comments. Raises UserError where it cannot be written."""
    head = ["Measured, and fitted by python -m analysis calibrate. What is left of each curve:", *table.splitlines()]
    text = yaml.safe_dump(cluster, sort_keys=False, width=120, allow_unicode=True)
    try:
        check_writable(file.parent)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"# {line}".rstrip() + "\n" for line in head) + text, encoding="utf-8")
    except FileFault as fault:
        raise UserError(f"--out: {fault}") from None
    except OSError as error:
        raise UserError(f"--out: {file}: {error.strerror}") from None


def pictures(sweep: Sweep, found: Calibration) -> dict[str, Any]:
    """Points and curves over each other."""
    figures = {
        "flops_over_size": plots.flops_over_size(sweep, found.kernels, found.tile),
        "bytes_over_size": plots.bytes_over_size(sweep, found.kernels),
    }
    if found.links:
        figures["bandwidth_over_size"] = plots.bandwidth_over_size(sweep, found.links)
    return figures
