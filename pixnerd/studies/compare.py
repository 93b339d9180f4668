"""Comparisons between values of a study's axis: differences of pairs that share everything else, the seed included."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..errors import InputError

RESAMPLES = 10_000
EXACT = 16  # pairs up to which every assignment of signs is counted
LEVEL = 0.95
SMALL_IS_GOOD = ("velocity_error", "kid", "softened_kid", "fd", "softened_fd", "loss")


@dataclass(frozen=True)
class Row:
    """What was measured for one run of a study."""

    index: int
    choices: dict[str, str]
    """axis → its value"""
    repeat: str
    """the seed, or in a study of models the model"""
    measures: dict[str, float]
    """by name; a run may lack some"""


class Comparison(NamedTuple):
    """The difference b − a of a measure over pairs of runs."""

    mean: float
    low: float
    """lower end of the bootstrap interval of the mean, 95 %"""
    high: float
    p: float
    """two-sided, of sign flips: how often a mean as far from 0 comes about if a and b are alike"""
    pairs: int
    seeds: int
    """how many different seeds, or models, the pairs have: pairs of one seed are not independent"""


def paired(rows: Iterable[Row], axis: str, a: str, b: str, measure: str) -> Comparison:
    """Compare two values of an axis over all pairs of rows that agree in every other axis and in the seed.

    Args:
        rows: of a study; those without the measure are left out.
        axis: which axis.
        a: one of its values, that which is subtracted.
        b: the other one.
        measure: name of a measure.

    Raises:
        InputError: there is no such pair.
    """
    pairs = _pairs(rows, axis, a, b, measure)
    if not pairs:
        raise InputError(f"no two runs differ in {axis} alone, {a} and {b}, and have the measure {measure!r}")
    differences = np.array([after - before for before, after in pairs.values()])
    low, high = bootstrap_interval(differences)
    seeds = len({repeat for _, repeat in pairs})
    return Comparison(float(differences.mean()), low, high, sign_flip_p(differences), len(differences), seeds)


def best_values(rows: Iterable[Row], axis: str, measure: str) -> dict[tuple[str, ...], str]:
    """The best value of a tuned axis, such as the learning rate, for each combination of the other axes' values.

    The value with the largest mean of the measure, over the seeds that all values share, is dropped, until one is left:
    one seed with every value is enough, and the more seeds the good values have, the more decide among them.

    Args:
        rows: of a study.
        axis: the tuned one.
        measure: one of SMALL_IS_GOOD.

    Returns:
        by the values of the other axes, in the order in which they are first met.

    Raises:
        InputError: there is no such axis or measure, or values of a combination that are left share no seed.
    """
    if measure not in SMALL_IS_GOOD:
        raise InputError(
            f"by is {measure!r}; it has to be one of {', '.join(SMALL_IS_GOOD)}, which are best when small"
        )
    arms: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for row in rows:
        if axis not in row.choices:
            raise InputError(f"the study has no axis {axis!r} to tune; its axes: {', '.join(row.choices)}")
        if measure in row.measures:
            values = arms.setdefault(_others(row, axis), {})
            values.setdefault(row.choices[axis], {})[row.repeat] = row.measures[measure]
    if not arms:
        raise InputError(f"no run of the study that is done has the measure {measure!r}")
    found = {}
    for arm, values in arms.items():
        left = list(values)
        while len(left) > 1:
            shared = sorted(set.intersection(*(set(values[value]) for value in left)))
            if not shared:
                raise InputError(f"the values {', '.join(left)} of {axis} share no seed for {'-'.join(arm)}")
            sums = {value: sum(values[value][repeat] for repeat in shared) for value in left}
            left.remove(max(reversed(left), key=sums.__getitem__))
        found[arm] = left[0]
    return found


def at_best(rows: Iterable[Row], axis: str, best: dict[tuple[str, ...], str]) -> list[Row]:
    """The rows with the best value of their combination, see best_values, as rows of a study without this axis."""
    found = []
    for row in rows:
        if best.get(_others(row, axis)) == row.choices[axis]:
            choices = {name: value for name, value in row.choices.items() if name != axis}
            found.append(replace(row, choices=choices))
    return found


def bootstrap_interval(differences: np.ndarray) -> tuple[float, float]:
    """The percentile interval, 95 %, of the mean of differences [n] under resampling; the same for the same numbers."""
    chosen = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(differences[chosen].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_flip_p(differences: np.ndarray) -> float:
    """The two-sided p of differences [n] under random signs: exact up to 16 of them, else of seeded random signs."""
    count = len(differences)
    if exact := count <= EXACT:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
    else:
        bits = np.random.default_rng(0).integers(2, size=(RESAMPLES, count))
    means = np.abs(((1 - 2 * bits) * differences).mean(axis=1))
    observed = abs(differences.mean())
    as_far = int((means >= observed * (1 - 1e-12)).sum())  # the observed one itself, whatever its rounding
    return as_far / len(means) if exact else (as_far + 1) / (len(means) + 1)


def table(rows: Sequence[Row], axis: str, against: str = "") -> list[list[str]]:
    """Titles, then a line for each measure, pair of values and combination of the other axes.

    Every value is compared with `against`, by default the one that comes first in `rows`. Raises InputError if there
    is no such axis or value, or nothing to compare.
    """
    if not rows or axis not in rows[0].choices:
        axes = ", ".join(rows[0].choices) if rows else "none, as no run is done"
        raise InputError(f"the study has no axis {axis!r}; its axes: {axes}")
    values = list(dict.fromkeys(row.choices[axis] for row in rows))
    first = against or values[0]
    if first not in values:
        raise InputError(f"no run that is done has {axis} {first!r}; there are {', '.join(values)}")
    others = [value for value in values if value != first]
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(_others(row, axis), []).append(row)
    lines = [["measure", axis, *(name for name in rows[0].choices if name != axis)]]
    lines[0] += ["difference", "95 % from", "to", "p", "pairs"]
    for measure in dict.fromkeys(name for row in rows for name in row.measures):
        for other in others:
            for panel, members in panels.items():
                if _pairs(members, axis, first, other, measure):
                    found = paired(members, axis, first, other, measure)
                    figures = [f"{value:.4g}" for value in (found.mean, found.low, found.high)]
                    lines.append([measure, f"{other} − {first}", *panel, *figures, f"{found.p:.2g}", str(found.pairs)])
    if len(lines) == 1:
        raise InputError(f"no two runs that are done differ in {axis} alone")
    return lines


def _others(row: Row, axis: str) -> tuple[str, ...]:
    """A row's values on all axes but one."""
    return tuple(value for name, value in row.choices.items() if name != axis)


def _pairs(rows: Iterable[Row], axis: str, a: str, b: str, measure: str) -> dict[tuple, tuple[float, float]]:
    """(the other choices, seed) → the measure of a and of b, where there are both."""
    sides: dict[str, dict[tuple, float]] = {a: {}, b: {}}
    for row in rows:
        value = row.choices.get(axis)
        if value in sides and measure in row.measures:
            others = tuple(sorted((name, choice) for name, choice in row.choices.items() if name != axis))
            sides[value][others, row.repeat] = row.measures[measure]
    return {key: (before, sides[b][key]) for key, before in sides[a].items() if key in sides[b]}
