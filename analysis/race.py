"""Ours beside the libraries that people would pick instead: ratios of times that were measured in turn, round by round.

A peer's row is paired with the row of ours that differs from it in nothing but the strategy.
"""

import statistics

from analysis.reading import Sweep, mesh

ANSWERS = {  # peer -> the strategies of ours that do the same, whichever has the mesh
    "ddp": ("zero",),
    "fsdp2": ("zero",),
    "torch_tp": ("tp_sp",),
    "deepspeed_ulysses": ("ulysses",),
    "torch_cp": ("ring",),
    "yunchang": ("usp", "ulysses", "ring"),
}
# What may differ within a pair.
APART = ("strategy", "attention", "notes", "name", "rerun", "rounds", "timeout_s", "profile")


def race(sweep: Sweep) -> list[dict]:
    """A line for each pair: what ran, times, the busiest ranks' CPU times, and theirs / ours over the rounds."""
    ok = {row.run_id: row for _, row in sweep.ok.iterrows() if sweep.records.get(row.run_id, {}).get("round_ms")}
    configs = {run_id: sweep.records[run_id]["config"] for run_id in ok}
    lines = []
    for run_id, row in ok.items():
        for other, theirs in ok.items():
            if row.strategy in ANSWERS.get(theirs.strategy, ()) and alike(configs[run_id], configs[other]):
                lines.append(line(row, theirs, sweep.records[run_id], sweep.records[other]))
    return sorted(lines, key=lambda line: (line["theirs"], line["ours"], line["setting"]))


def alike(ours: dict, theirs: dict) -> bool:
    """Do the two differ in nothing but the strategy?"""
    return {**theirs, **dict.fromkeys(APART)} == {**ours, **dict.fromkeys(APART)}


def line(ours, theirs, our_record: dict, their_record: dict) -> dict:
    pairs = zip(their_record["round_ms"], our_record["round_ms"], strict=False)
    ratios = [their_ms / our_ms for their_ms, our_ms in pairs]
    model = our_record["config"]["model"]
    layout = f" {ours.ring_layout}" if (ours.ring or 1) > 1 else ""
    heads = f"heads {model['n_heads']}/{model['n_kv_heads']}"
    return {
        "ours": ours.strategy,
        "theirs": theirs.strategy,
        "setting": f"{mesh(ours)}{layout}, seq_len={int(ours.seq_len):,}, {heads}, {ours.precision}",
        "our_ms": ours.step_ms_median,
        "their_ms": theirs.step_ms_median,
        "our_cpu_ms": ours.cpu_ms_max,
        "their_cpu_ms": theirs.cpu_ms_max,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "pairs": len(ratios),
        "said": theirs.reason or "",
    }


def verdict(lines: list[dict]) -> list[str]:
    """For each peer, how its pairs ended, in a sentence."""
    said = []
    for peer in dict.fromkeys(line["theirs"] for line in lines):
        pairs = [line for line in lines if line["theirs"] == peer]
        ratios = sorted(line["ratio"] for line in pairs)
        ours = " and ".join(dict.fromkeys(line["ours"] for line in pairs))
        won, lost = sum(line["least"] > 1 for line in pairs), sum(line["most"] < 1 for line in pairs)
        number = f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''}, {ratios[0]:.2f} to {ratios[-1]:.2f}"
        said.append(
            f"{peer} takes {statistics.median(ratios):.2f} times as long as {ours} ({number}); "
            f"ours is faster in every round of {won} and slower in every round of {lost}."
        )
    return said
