"""Measuring several things fairly: in turns, warm, synchronised, by wall clock and by processor time."""

import time
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import numpy as np

from ..cost import clock

WARM = 3  # rounds before anything counts: they compile, allocate and fill caches
Name = TypeVar("Name", bound=Hashable)


class Reading(NamedTuple):
    """What one measurement took."""

    wall: float
    """seconds on the clock"""
    processor: float
    """seconds of this process's threads together: on a CPU, what a busy machine changes least"""


class Spread(NamedTuple):
    """The median of some values, and the quartiles around it."""

    median: float
    low: float
    high: float


def take_turns(
    actions: dict[Name, Callable[[], object]],
    rounds: int,
    before_round: Callable[[], object] | None = None,
    warm: int = WARM,
) -> dict[Name, list[Reading]]:
    """Measure every action once in each round; every round begins with the action after the one before it began with.

    Args:
        actions: what to measure, by name.
        rounds: that count.
        before_round: prepares a round, such as its batch; not measured.
        warm: rounds before them.
    """
    readings: dict[Name, list[Reading]] = {name: [] for name in actions}
    names = list(actions)
    for number in range(warm + rounds):
        if before_round is not None:
            before_round()
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begin, processor = clock(), time.process_time()
            actions[name]()
            reading = Reading(clock() - begin, time.process_time() - processor)
            if number >= warm:
                readings[name].append(reading)
    return readings


def median_and_quartiles(values: list[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return Spread(median, low, high)


def ratios(readings: list[Reading], reference: list[Reading]) -> dict[str, Spread]:
    """How long one thing takes of another, round by round, by each clock."""
    pairs = list(zip(readings, reference, strict=True))
    return {
        "wall": median_and_quartiles([one.wall / other.wall for one, other in pairs]),
        "processor": median_and_quartiles([one.processor / max(other.processor, 1e-9) for one, other in pairs]),
    }


def exponent(sizes: list[float], costs: list[float]) -> float:
    """p of the power law cost ∝ sizeᵖ that is nearest in the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def largest_that_fits(fits: Callable[[int], bool], first: int) -> int:
    """The largest n for which `fits` holds, if it holds for all smaller ones; 0 if not even 1 does. Starts at `first`.

    Exact to one part in 16, since every trial is a training step.
    """
    fitting, too_large = 0, None
    trial = first
    while too_large is None or too_large - fitting > max(1, fitting // 16):
        if fits(trial):
            fitting = trial
        else:
            too_large = trial
        trial = 2 * trial if too_large is None else (fitting + too_large) // 2
    return fitting
