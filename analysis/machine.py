"""What was measured of a machine, as the points of each of a clock's rates (conf/clock.py), by its name there."""

from typing import Any

import numpy as np

from analysis.curves import Points
from analysis.reading import Sweep
from conf import tiers
from conf.clock import KERNELS, computed

ATTENTION = ("attention_forward", "attention_backward")
BY_FLOPS = ("products", *ATTENTION)
EXCHANGES = ("reduce_scatter", "all_to_all")  # on gloo one and the same (strategies/ops/collectives.py)


def of_kernels(sweep: Sweep, tile: int = 1) -> dict[str, Points]:
    """products, attention_.. and the other kernels. tile: of a causal block, keys that are computed as one."""
    lines = [line for table in sweep.measured("kernels").values() for line in table]
    named = {name: [line for line in lines if line["kind"] == name] for name in (*BY_FLOPS, *KERNELS)}
    return {
        name: points([line["flops"] * share(line, tile) for line in here], here, "FLOP")
        if name in BY_FLOPS
        else points([line["bytes"] for line in here], here, "B")
        for name, here in named.items()
        if here
    }


def share(line: dict[str, Any], tile: int) -> float:
    """What is computed of a block, over what of it is visible."""
    return computed(line["tokens"], tile) / computed(line["tokens"], 1) if line["causal"] else 1.0


def of_links(sweep: Sweep) -> dict[tuple[str, str, int], Points]:
    """(intra or inter, kind, ranks or nodes) -> by bytes that a rank sends, or of these those that leave its node.

    What is dispatched as the same thing has the points of both: else noise would make it two.
    """
    on_gloo = set(sweep.rows[sweep.rows.backend == "gloo"].run_id)
    found: dict[tuple[str, str, int], list[tuple[float, dict]]] = {}
    for run_id, table in sweep.measured("collectives").items():
        for line in table:
            group = tiers.group_of(sweep.configs[run_id], 0, line["axis"], line["ranks"], line["kind"])
            tier, size, part = ("inter", group.nodes, group.leaves) if group.nodes > 1 else ("intra", group.ranks, 1.0)
            alike = EXCHANGES if run_id in on_gloo and line["kind"] in EXCHANGES else (line["kind"],)
            for kind in alike:
                found.setdefault((tier, kind, size), []).append((part * line["sent_bytes"], line))
    return {key: points([size for size, _ in here], [line for _, line in here], "B") for key, here in found.items()}


def points(work: list[float], lines: list[dict], unit: str) -> Points:
    return Points(np.array(work, dtype=float), np.array([line["time_us"] for line in lines]), unit)


def us_of_the_host(sweep: Sweep, kind: str) -> float:
    """For a call, or for a group of weights; 0 where it was not measured."""
    tables = sweep.measured("kernels").values()
    found = [line["time_us"] for table in tables for line in table if line["kind"] == kind]
    return round(float(np.median(found)), 3) if found else 0.0
