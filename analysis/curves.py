"""Fitting a rate of conf/clock.py to measured times: the least distance of their logarithms, on a grid, in numpy.

Logarithms, for a time is wrong by a factor, whether it is of 10 us or of 10 ms. Distances and not their squares, for
what disturbs a machine triples a few times, and leaves the others as they are.
"""

from dataclasses import dataclass

import numpy as np

from conf.clock import Rate

POWERS = np.arange(0.3, 1.55, 0.05)
HALVES = 60  # of them, from a hundredth of the least work to four times the most
FINE = 21  # values between two neighbours of the grid, once the best is known
BETTER = 0.9  # of the distance that is left: a floor must pay for itself


@dataclass
class Points:
    """What was measured of one rate: work in bytes or FLOPs, and the microseconds that it took."""

    work: np.ndarray
    us: np.ndarray
    unit: str  # B or FLOP


@dataclass
class Fit:
    """A rate, and how far the points are from it, as a part of what was measured."""

    rate: Rate
    points: Points

    @property
    def errors(self) -> np.ndarray:
        return np.abs(self.rate.us(self.points.work, np.maximum) / self.points.us - 1)


def stretched(work: np.ndarray, half: np.ndarray | float, power: np.ndarray | float) -> np.ndarray:
    return work * (1 + (half / work) ** power)


def fit(points: Points) -> Fit:
    """The rate that is nearest to the points."""
    order = np.argsort(points.work)
    work, us = points.work[order], points.us[order]
    plain, far = nearest(work, us, 0.0)
    smallest = range(1, min(len(us) // 2, 8) + 1)
    floors = {float(np.median(us[:n])) for n in smallest}
    tried = [nearest(work, us, floor) for floor in sorted(floors)]
    floored, nearer = min(tried, key=lambda each: each[1], default=(plain, far))
    return Fit(rounded(floored if nearer < BETTER * far else plain), points)


def nearest(work: np.ndarray, us: np.ndarray, floor: float) -> tuple[Rate, float]:
    """With this floor: on the coarse grid, then around its best -> the rate and the mean distance that is left."""
    halves = np.geomspace(work.min() / 100, work.max() * 4, HALVES)
    half, power, _, _ = best(work, us, floor, np.array([0.0, *halves]), POWERS)
    step = halves[1] / halves[0]
    near = np.geomspace(half / step, half * step, FINE) if half else np.array([0.0])
    powers = np.linspace(power - 0.05, power + 0.05, FINE)
    half, power, scale, left = best(work, us, floor, near, powers[powers > 0])
    return Rate(scale, half, power if half else 1.0, floor), left


def best(
    work: np.ndarray, us: np.ndarray, floor: float, halves: np.ndarray, powers: np.ndarray
) -> tuple[float, float, float, float]:
    """half, power, rate and mean distance. The rate has a closed form: the median of what the logarithms differ by."""
    shape = stretched(work, halves[:, None, None], powers[None, :, None])  # [halves, powers, points]
    above = us > 1.2 * floor if floor else np.full(len(us), True)
    if not above.any():
        return 0.0, 1.0, float(np.exp(np.median(np.log(work / us)))) / 1000, np.inf
    scale = np.exp(np.median(np.log(shape[..., above] / us[above]), axis=-1))
    left = np.mean(np.abs(np.log(np.maximum(floor, shape / scale[..., None]) / us)), axis=-1)
    i, j = np.unravel_index(np.argmin(left), left.shape)
    return float(halves[i]), float(powers[j]), float(scale[i, j]) / 1000, float(left[i, j])


def rounded(rate: Rate) -> Rate:
    return Rate(*(float(f"{value:.4g}") for value in (rate.rate, rate.half, rate.power, rate.floor_us)))
