"""Everything that could be run, priced: strategy x mesh x ZeRO x recompute x placement x ring layout, in any scenario.

Legal is what conf/meshes.py calls so. What branches the formulas makes a group of its own, and all of a group goes
through them as arrays, one element a configuration.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.accounts import account_of
from analysis.accounts.account import Account
from analysis.accounts.letters import OF_AXES, Letters, whole
from analysis.accounts.sent import total
from analysis.peak import Held
from analysis.predict import Step
from analysis.prices import Machine, Places, mesh_of
from conf import meshes
from conf.keys import Config, MeshConfig, StrategyConfig, keys
from conf.words import divisors

GROUPS = (*OF_AXES, "inner", "outer", "zero", "world", "tp_replicas")
NEEDED = {"usp": ("ulysses", "ring"), "tp_usp": ("tp",), "odysseus": ("tp",)}  # or it is a strategy of fewer axes
ALONE = ("tp", "sharing", "kv_shared", "dp")  # letters of which 1 branches the formulas


@dataclass(frozen=True)
class Scenario:
    """The job as it was asked for, or other than that: ranks, tokens, and how many times as fast the links are.

    usual: with the placement and the ring's layout of the configuration alone.
    """

    name: str
    world_size: int
    seq_len: int
    links: float = 1.0
    usual: bool = False


@dataclass(frozen=True)
class Space:
    """A resolved configuration, whatever its strategy; and the keys that were given, which stay as they are."""

    config: Config
    given: frozenset[str]
    machine: Machine

    def values(self, path: str) -> list[Any]:
        """Of a key: what was given, or all that there are. A causal mask is as balanced in zigzag as it can be."""
        key = keys()[path]
        return [key.of(self.config)] if path in self.given else [value for value in key.choices if value != "balanced"]

    @property
    def strategies(self) -> list[str]:
        chosen = [self.config.strategy.name] if "strategy" in self.given else list(meshes.STRATEGIES)
        return [name for name in chosen if account_of(name) is not None]

    def priced(self, scenarios: Sequence[Scenario]) -> pd.DataFrame:
        """A row a configuration: scenario, strategy, mesh, keys; step_ms and its parts, bytes at the peak and sent."""
        tables = [self.of_strategy(name, scenarios) for name in self.strategies]
        return pd.concat([table for table in tables if not table.empty] or [pd.DataFrame()], ignore_index=True)

    def of_strategy(self, name: str, scenarios: Sequence[Scenario]) -> pd.DataFrame:
        account = account_of(name)
        config, kv_heads = self.of(name), self.config.model.n_kv_heads
        places = pd.DataFrame([place for scenario in scenarios for place in self.places(config, scenario)])
        if account is None or places.empty:
            return pd.DataFrame()
        places["sharing"] = places.dp * places.u * places.r
        places["rho"] = np.maximum(1, places.u // np.maximum(1, kv_heads // places.tp))
        places["kv_shared"] = np.maximum(1, places.tp // kv_heads)
        found = []
        branches = [*(places[letter] == 1 for letter in ALONE), places["queries"]]
        for _, group in places.groupby(branches, sort=False):
            columns = {name: group[name].to_numpy() for name in group}
            places_of = {axis: Places(columns[f"{axis} ranks"], columns[f"{axis} stride"]) for axis in GROUPS}
            known: dict[Any, Any] = {}
            shares = bool((group.sharing > 1).any()) or name == "odysseus"  # or ZeRO has nothing to do
            for stage in self.values("zero_stage")[0 if shares else -1 :]:
                for again in self.values("recompute"):
                    found.append(self.of_group(account, config, columns, places_of, stage, again, known))
        together = {column: np.concatenate([table[column] for table in found]) for column in found[0]}
        return pd.DataFrame(together).assign(strategy=name)

    def of_group(
        self,
        account: Account,
        config: Config,
        columns: Mapping[str, np.ndarray],
        places: Mapping[str, Places],
        stage: int,
        recompute: str,
        known: dict[Any, Any],
    ) -> dict[str, np.ndarray]:
        sizes: dict[str, Any] = {name: columns[name] for name in (*OF_AXES.values(), "inner", "rho", "kv_shared", "L")}
        sizes |= {"layout": columns["layout"].astype(str), "stage": stage, "queries": bool(columns["queries"][0])}
        sizes |= {"recompute": recompute == "block", "selective": recompute == "selective"}
        batch = np.maximum(1, whole(config.micro_batch_size / columns["dp"]))
        s = replace(Letters.of(config), B=batch, **sizes)
        offload = config.offload != "none" and recompute == "block"
        times = Step(account, s, self.machine, places, offload, columns["links"], known=known).times()
        priced = {
            "step_ms": times.step,
            **times.parts,
            **times.exposed,
            "peak_bytes": Held(account, s, offload).peak,
            "sent_bytes": total(account.of_step(s)),
            "zero_stage": stage,
            "recompute": recompute,
        }
        named = ("scenario", "layout", "inner", "queries", "placement", *OF_AXES.values(), "rho")
        same = {name: columns[name] for name in named}
        if not account.in_grid:  # one ring
            same["inner"] = np.where(columns["inner"] == columns["r"], np.nan, columns["inner"])
        return {**same, **{name: np.broadcast_to(value, batch.shape) for name, value in priced.items()}}

    def of(self, name: str) -> Config:
        """The configuration as this strategy runs it."""
        config = copy.deepcopy(replace(self.config, strategy=StrategyConfig(name)))
        meshes.fix(config)
        return config

    # Meshes.

    def places(self, config: Config, scenario: Scenario) -> Iterator[dict[str, Any]]:
        """Every legal mesh, layout and placement, but for those that are another strategy's, or the same again."""
        asked = {"scenario": scenario.name, "L": scenario.seq_len, "links": scenario.links}
        for degrees in self.meshes_of(config.strategy.name, scenario.world_size):
            letters = {OF_AXES[axis]: degree for axis, degree in degrees.items()}
            places = list(self.placed(config, degrees, scenario))
            several = degrees["ring"] > 1 and not scenario.usual
            for layout in self.values("ring.layout") if several else [self.config.ring.layout]:
                if stands(config, degrees, layout, scenario):
                    yield from ({**asked, **letters, "layout": layout, **place} for place in places)

    def placed(self, config: Config, degrees: Mapping[str, int], scenario: Scenario) -> Iterator[dict[str, Any]]:
        """Placements that differ, with the ranks and the stride of every axis, and ways to go around the ring."""
        seen, kv_shared = [], max(1, degrees["tp"] // self.config.model.n_kv_heads)
        for placement in [self.config.placement] if scenario.usual else self.values("placement"):
            lines = mesh_of(degrees, placement, kv_shared)
            if (strides := [stride for ranks, stride in lines.values() if ranks > 1]) in seen:
                continue
            seen.append(strides)
            for inner in self.inner_rings(config, degrees["ring"], lines["ring"][1], scenario):
                lines = mesh_of(degrees, placement, kv_shared, inner)
                ranks = {f"{axis} ranks": line[0] for axis, line in lines.items()}
                strides_of = {f"{axis} stride": line[1] for axis, line in lines.items()}
                for queries in self.travels(config, degrees["ring"], scenario):
                    yield {"placement": placement, "inner": inner, "queries": queries, **ranks, **strides_of}

    def inner_rings(self, config: Config, ring: int, stride: int, scenario: Scenario) -> list[int]:
        """Of mesh_attention rows; of a ring over several nodes one, or rings inside these."""
        in_grid = meshes.footing_of(config.strategy.name).grid
        if in_grid and "ring.inner" not in self.given:
            return [meshes.best_row(ring, config.model)] if scenario.usual else [*divisors(ring)]
        here = self.machine.ranks_per_node // stride
        goes_around = ring > 1 and config.ring.kv == "rotate"
        if in_grid or (goes_around and "ring.inner" in self.given):
            return [config.ring.inner or ring]
        inside = goes_around and not scenario.usual and 1 < here < ring and ring % here == 0
        return [ring, here] if inside else [ring]

    def travels(self, config: Config, ring: int, scenario: Scenario) -> list[bool]:
        """May queries go around in backward? With fewer heads of keys they are never less to send."""
        if "ring.backward" in self.given or scenario.usual:
            return [config.ring.backward == "q"]
        alike = config.model.n_kv_heads == config.model.n_heads
        return [False, True] if alike and ring > 1 and config.ring.kv == "rotate" else [False]

    def meshes_of(self, name: str, world_size: int) -> Iterator[dict[str, int]]:
        """Degrees of every axis. Of dp no more than there are sequences, but for zero, which has nothing else."""
        axes = meshes.footing_of(name).axes
        if name == "zero" and world_size == 1 and "strategy" not in self.given:
            return  # it is single
        for split in factors(world_size, len(axes) + 1):
            degrees = {**dict.fromkeys(OF_AXES, 1), **dict(zip(("dp", *axes), split, strict=True))}
            fixed = all(getattr(self.config.mesh, axis) in (None, degree) for axis, degree in degrees.items())
            idle = degrees["dp"] > self.config.micro_batch_size and bool(axes)
            wide = [axis for axis in axes if degrees[axis] > 1]
            itself = all(axis in wide for axis in NEEDED.get(name, axes)) and (name != "tp_usp" or len(wide) > 1)
            if fixed and itself and not idle:
                yield degrees


def stands(config: Config, degrees: Mapping[str, int], layout: str, scenario: Scenario) -> bool:
    there = replace(
        config,
        mesh=MeshConfig(**degrees),
        ring=replace(config.ring, layout=layout),
        world_size=scenario.world_size,
        seq_len=scenario.seq_len,
    )
    return all(rule.value in rule.allowed for rule in meshes.rules(there))


def factors(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """n as a product of so many numbers, in every order."""
    if parts == 1:
        yield (n,)
        return
    for first in divisors(n):
        yield from ((first, *rest) for rest in factors(n // first, parts - 1))
