"""search=max_seq_len: the longest sequence that a simulated cluster has memory for."""

from collections.abc import Callable

from conf.keys import Config
from conf.meshes import rules


def granule(config: Config) -> int:
    """The shortest sequence that the strategy can split over the mesh: longer ones are its multiples."""
    return next((rule.allowed[0] for rule in rules(config) if rule.key == "seq_len"), 1)


def longest(config: Config, capacity: int, peak_of: Callable[[int], int]) -> int:
    """The longest seq_len whose peak_of(seq_len), in bytes, is at most `capacity`; 0 if even the shortest has more.

    By bisection, in turns at the middle and where a straight line through both ends meets the capacity: memory grows
    almost in proportion to the sequence, so that is nearly always next to the answer.
    """
    step = granule(config)
    peaks = {n: peak_of(n * step) for n in (1, 2)}
    if peaks[1] > capacity:
        return 0
    low, high = 1, 2
    while peaks[high] <= capacity:
        slope = (peaks[high] - peaks[low]) / (high - low)
        guess = high + int((capacity - peaks[high]) / slope) + 1 if slope > 0 else 2 * high
        low, high = high, max(2 * high, min(guess, 1024 * high))
        peaks[high] = peak_of(high * step)
    straight = True
    while high - low > 1:
        middle = (low + high) // 2
        if straight:
            middle = low + int((high - low) * (capacity - peaks[low]) / (peaks[high] - peaks[low]))
            middle = min(max(middle, low + 1), high - 1)
        straight = not straight
        peaks[middle] = peak_of(middle * step)
        low, high = (middle, high) if peaks[middle] <= capacity else (low, middle)
    return low * step
