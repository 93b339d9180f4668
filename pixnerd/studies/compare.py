"""Comparisons between values of a study's axis: differences of pairs that share everything else, the seed included."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import InputError

RESAMPLES = 10_000
EXACT = 16  # pairs up to which every assignment of signs is counted
LEVEL = 0.95


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


def table(rows: Sequence[Row], axis: str) -> list[list[str]]:
    """Titles, then a line for each measure, pair of values and combination of the other axes.

    Every value is compared with the axis's first one, the one that comes first in `rows`. Raises InputError if there
    is no such axis or nothing to compare.
    """
    if not rows or axis not in rows[0].choices:
        axes = ", ".join(rows[0].choices) if rows else "none, as no run is done"
        raise InputError(f"the study has no axis {axis!r}; its axes: {axes}")
    first, *others = dict.fromkeys(row.choices[axis] for row in rows)
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(tuple(value for name, value in row.choices.items() if name != axis), []).append(row)
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


def _pairs(rows: Iterable[Row], axis: str, a: str, b: str, measure: str) -> dict[tuple, tuple[float, float]]:
    """(the other choices, seed) → the measure of a and of b, where there are both."""
    sides: dict[str, dict[tuple, float]] = {a: {}, b: {}}
    for row in rows:
        value = row.choices.get(axis)
        if value in sides and measure in row.measures:
            others = tuple(sorted((name, choice) for name, choice in row.choices.items() if name != axis))
            sides[value][others, row.repeat] = row.measures[measure]
    return {key: (before, sides[b][key]) for key, before in sides[a].items() if key in sides[b]}
