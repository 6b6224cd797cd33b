"""Ours beside the libraries that people would pick instead: ratios of times that were measured in turn, round by round.

A peer's row is paired with the row of ours that differs from it in nothing but the strategy.
"""

import statistics
from collections.abc import Sequence

import pandas as pd

from analysis.reading import Sweep
from conf.keys import Config, Key, keys
from conf.labels import swept, variant, where
from conf.meshes import PEERS

ANSWERS = {name: (peer.ours, *peer.also) for name, peer in PEERS.items()}  # whichever of ours has the mesh
MAY_DIFFER = ("strategy.name", "attention.kernel", "timeout_s")  # within a pair, beside where a row is kept
SAID = ("precision", "model.n_heads", "model.n_kv_heads")  # of every setting


def race(sweep: Sweep) -> list[dict]:
    """A line for each pair: what ran, times, the busiest ranks' CPU times, and theirs / ours over the rounds."""
    ok = {row.run_id: row for _, row in sweep.ok.iterrows() if sweep.records.get(row.run_id, {}).get("round_ms")}
    among = [key for key in swept([row.to_dict() for row in ok.values()]) if shared(key) and key.path not in SAID]
    lines = []
    for run_id, ours in ok.items():
        for other, theirs in ok.items():
            answers = ours.strategy in ANSWERS.get(theirs.strategy, ())
            if answers and alike(sweep.configs[run_id], sweep.configs[other]):
                lines.append(line(ours, theirs, among))
    return sorted(lines, key=lambda line: (line["theirs"], line["ours"], line["setting"]))


def alike(ours: Config, theirs: Config) -> bool:
    """Do the two differ in nothing but the strategy?"""
    return all(key.of(ours) == key.of(theirs) for key in keys().values() if shared(key))


def shared(key: Key) -> bool:
    return key.declared.metadata["identity"] and key.path not in MAY_DIFFER


def line(ours: pd.Series, theirs: pd.Series, among: Sequence[Key]) -> dict:
    """ours, theirs: rows of the sweep. among: the keys in which pairs differ from each other."""
    ratios = [their_ms / our_ms for their_ms, our_ms in zip(theirs.round_ms, ours.round_ms, strict=False)]
    heads = f"heads {ours.n_heads:g}/{ours.n_kv_heads:g}"
    said = (where(ours), f"seq_len={int(ours.seq_len):,}", heads, ours.precision, variant(ours, among))
    return {
        "ours": ours.strategy,
        "theirs": theirs.strategy,
        "setting": ", ".join(part for part in said if part),
        "our_ms": ours.step_ms_median,
        "their_ms": theirs.step_ms_median,
        "our_cpu_ms": ours.cpu_ms_max,
        "their_cpu_ms": theirs.cpu_ms_max,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "pairs": len(ratios),
        "said": theirs.reason,
    }


def notes(lines: list[dict]) -> list[str]:
    """What is to be known of a peer's rows, and of which, if not of all."""
    said = []
    for peer, note in dict.fromkeys((line["theirs"], line["said"]) for line in lines if line["said"]):
        of_peer = [line for line in lines if line["theirs"] == peer]
        of = [line["setting"] for line in of_peer if line["said"] == note]
        where_it_holds = "" if len(of) == len(of_peer) else f" ({'; '.join(of)})"
        said.append(f"{peer}{where_it_holds}: {note}.")
    return said


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
