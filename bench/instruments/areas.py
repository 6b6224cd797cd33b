"""A block's exchanges, as all ranks have seen them (exchanges.py), in rectangles: what analysis/exchanges.py draws."""

import json
import linecache
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from bench.instruments.exchanges import Exchange, Exchanges, Planes
from bench.instruments.labels import field
from bench.instruments.ledger import ROOT


def write(seen: Exchanges, file: Path) -> None:
    """Every rank takes part; rank 0 writes."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(seen.seen, ranks if seen.labels.rank == 0 else None)
    if seen.labels.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(of_a_block(ranks, seen.planes), separators=(",", ":")) + "\n")


def of_a_block(ranks: list[list[Exchange]], planes: Planes) -> list[dict[str, Any]]:
    """Of each collective of the block, which anybody sends, every rank's areas before and after."""
    found = []
    for each in zip(*ranks, strict=True):
        entry = next((exchange.entry for exchange in each if exchange.entry is not None), None)
        if entry is None or not each[0].in_block:
            continue
        given = np.concatenate([exchange.before for exchange in each])
        here = np.unique(field(given[given >= 0], "plane")).tolist()
        found.append(
            {
                "source": entry.source,
                "line": line_of(entry.source),
                "kind": entry.kind,
                "axis": entry.axis,
                "planes": [shown(*planes[plane], weights=plane % 2 == 1) for plane in here],
                "before": [list(areas(exchange.before, here, planes)) for exchange in each],
                "after": [list(areas(exchange.after, here, planes)) for exchange in each],
            }
        )
    return found


def line_of(source: str) -> str:
    """Its text, by which it is found when it has moved."""
    file, _, number = source.partition(":")
    return linecache.getline(str(ROOT / file), int(number)).strip() if number else ""


def shown(name: str, x: int, y: int, weights: bool) -> dict[str, Any]:
    """Activations by the matrix that made them: q, o; x is what came of the embedding."""
    name = "x" if name.startswith("embed") else name.removesuffix(".weight").rpartition(".")[2]
    return {"name": name, "weights": weights, "x": x, "y": y}


def areas(labels: np.ndarray, order: list[int], planes: Planes) -> Iterator[list[int]]:
    """Rectangles [plane, x, y, width, height, owners], of each owner a bit, that cover what is labelled."""
    for place, plane in enumerate(order):
        here = labels[(labels >= 0) & (field(labels, "plane") == plane)]
        grid = np.zeros(planes[plane][1:], dtype=np.int64)
        for owner in np.unique(field(here, "owner")):
            its = here[field(here, "owner") == owner]
            grid[field(its, "x"), field(its, "y")] |= 1 << int(owner)
        yield from ([place, *rectangle] for rectangle in rectangles(grid))


def rectangles(grid: np.ndarray) -> Iterator[tuple[int, int, int, int, int]]:
    """Of equal numbers other than 0: where a row and those after it are alike, the runs in it."""
    for x, end in pairwise([0, *(np.flatnonzero((grid[1:] != grid[:-1]).any(1)) + 1).tolist(), len(grid)]):
        row = grid[x]
        for y, stop in pairwise([0, *(np.flatnonzero(row[1:] != row[:-1]) + 1).tolist(), len(row)]):
            if row[y]:
                yield x, y, end - x, stop - y, int(row[y])
