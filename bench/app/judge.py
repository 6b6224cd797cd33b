"""Why a measurement cannot be right, where it cannot: such a row must not look like a result."""

from functools import cache
from typing import Any

from omegaconf import OmegaConf

from conf.groups import HERE

CLOSE = {"fp32": 1e-4, "bf16": 0.03, "bf16_mixed": 0.03}  # of two ways to compute the same


def implausible(row: dict[str, Any]) -> str | None:
    """A loss that is no number, ranks that sent nothing, more operations than the device can do."""
    lost = [loss for loss in row["losses"] if not abs(loss) < float("inf")]
    if lost:
        return f"the loss is not finite at step {row['losses'].index(lost[0]) + 1}"
    if row["world_size"] > 1 and row["comm_bytes"] == 0 and row["analytic_comm_bytes"] != 0:
        return f"{row['world_size']} ranks ran and sent nothing"
    if (row.get("mfu") or 0) > 1:
        return f"{row['tflops_per_rank']:.0f} TFLOPS is more than the device can do"
    return None


def inaccurate(row: dict[str, Any]) -> str | None:
    """What of attention alone is not what one process computes, beyond its precision."""
    wrong = [name for name, error in row["errors"].items() if not error < CLOSE[row["precision"]]]
    verb, worst = "is" if len(wrong) == 1 else "are", max(row["errors"].values(), default=0)
    return f"wrong: {', '.join(wrong)} {verb} up to {worst:.0%} away from one process'" if wrong else None


@cache
def peak_tflops_of(device_name: str, precision: str) -> float | None:
    """The dense 16-bit peak of a known GPU, from conf/cluster/; None for other devices and for fp32."""
    if precision == "fp32":
        return None
    for file in sorted((HERE / "cluster").glob("*.yaml")):
        cluster = OmegaConf.load(file)
        if any(name in device_name for name in cluster.device_names):
            return float(cluster.bf16_dense_tflops)
    return None
