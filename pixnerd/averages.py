"""Moving averages of weights with power-function profiles, and any other length of them made after training.

The average at step T weighs the weights of step τ by p(τ) ∝ τ^γ, τ = 1 … T, so its length grows with training. From
two of them, kept at several steps, any other profile is a least-squares combination. Source: Karras et al. 2312.02696,
section 3. Nothing here needs torch.
"""

import functools

import numpy as np

from .errors import InputError

WIDEST = 0.28  # of a profile that rises at all: γ = 0 has a width of 12^−½


@functools.lru_cache
def exponent(width: float) -> float:
    """γ of the profile τ^γ whose standard deviation is `width` of the training so far, 0 < width ≤ 0.28."""
    if not 0 < width <= WIDEST:
        raise InputError(f"an average's width is {width:g}; it has to lie above 0 and at most at {WIDEST}")
    inverse = width**-2  # width² = (γ + 1) / ((γ + 2)²·(γ + 3))
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real[np.abs(roots.imag) < 1e-9].max())


def power_decay(width: float, step: int, since: int = 1) -> float:
    """The decay (1 − k/T)^(γ+1) of the update after step T = 1, 2, …, k steps since the last; it keeps the profile."""
    return (1 - since / step) ** (exponent(width) + 1)


def synthesis_weights(steps: list[int], widths: list[float], step: int, width: float) -> list[float]:
    """How much of each kept average, of the given step and width, makes the average of one more step and width.

    The combination whose profile is nearest to the wanted one, as the integral of the squared difference, among those
    whose shares add up to 1: with few kept averages the nearest of all would shrink the weights. Raises InputError
    without a kept average.
    """
    if not steps:
        raise InputError("there are no averages with power-function profiles to combine")
    t, g = np.array(steps, float), np.array([exponent(value) for value in widths])
    overlaps = np.ones((len(t) + 1, len(t) + 1))  # the last row and column: the sum, and its Lagrange multiplier
    overlaps[:-1, :-1], overlaps[-1, -1] = _overlap(t[:, None], g[:, None], t, g), 0
    wanted = np.append(_overlap(t, g, np.array(float(step)), np.array(exponent(width))), 1)
    return np.linalg.lstsq(overlaps, wanted, rcond=None)[0][:-1].tolist()


def _overlap(t_1: np.ndarray, g_1: np.ndarray, t_2: np.ndarray, g_2: np.ndarray) -> np.ndarray:
    """∫ p_1·p_2 of two profiles with exponents g that end at t."""
    ratio = (t_1 / t_2) ** np.where(t_1 < t_2, g_2, -g_1)
    return (g_1 + 1) * (g_2 + 1) * ratio / ((g_1 + g_2 + 1) * np.maximum(t_1, t_2))
