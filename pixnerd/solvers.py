"""Solvers: how to follow a velocity field from noise (t = 0) to an image (t = 1) in few steps.

A solver is a generator: given velocity(x, t, start), a start x and the times t_0 < t_1 < … < t_n, it yields x at
t_1 … t_n. `start` is the time at which the step began and decides on guidance; it differs from t only where a solver
looks a second time. No solver asks for the velocity at t_n. Source: arXiv 2507.23268, section 5, and the released code.
The solver of a few-step student, `map`, asks for a mean velocity instead: velocity(x, t, start, end) over [t, end].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError

if TYPE_CHECKING:  # nothing here needs torch to run, so the solvers' names are available without it
    from torch import Tensor

    Velocity = Callable[..., Tensor]  # (x [B, ...], t, start of the step[, end of the interval]) → velocity [B, ...]
    Noise = Callable[[], Tensor]  # fresh standard normal noise like x; only the stochastic solver uses it
    Solver = Callable[[Velocity, Tensor, list[float], Noise], Iterator[Tensor]]


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """t_i = i/n for i = 0 … n, then shifted: steps + 1 times from 0 to 1.

    A shift above 1 spends more steps near the noise.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; sampling needs at least 1")
    if shift <= 0:
        raise InputError(f"shift is {shift}; it has to be greater than 0")
    even = (i / steps for i in range(steps + 1))
    return [t / (t + (1 - t) * shift) for t in even]


def euler(velocity: Velocity, x: Tensor, times: list[float], noise: Noise) -> Iterator[Tensor]:
    """x ← x + (t_{i+1} − t_i)·v(x, t_i): one evaluation per step, order 1."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t, t)
        yield x


def heun(velocity: Velocity, x: Tensor, times: list[float], noise: Noise) -> Iterator[Tensor]:
    """The mean of the velocities here and at Euler's prediction of the next point: two evaluations per step, order 2.

    The last step is Euler's, because its second evaluation would be at t = 1.
    """
    for t, t_next in pairwise(times):
        v = velocity(x, t, t)
        if t_next < times[-1]:
            v = (v + velocity(x + (t_next - t) * v, t_next, t)) / 2
        x = x + (t_next - t) * v
        yield x


def heun_reuse(velocity: Velocity, x: Tensor, times: list[float], noise: Noise) -> Iterator[Tensor]:
    """Heun with one evaluation per step, still order 2: the velocity at the prediction starts the next step.

    On an even grid its predictions are Adams–Bashforth 2's points, and since the last step is Euler's, both end at the
    same image; on a shifted grid they differ.
    """
    v = velocity(x, times[0], times[0])
    for t, t_next in pairwise(times):
        if t_next < times[-1]:
            ahead = velocity(x + (t_next - t) * v, t_next, t)
            x = x + (t_next - t) * (v + ahead) / 2
            v = ahead
        else:
            x = x + (t_next - t) * v
        yield x


def adams_weights(times: list[float], t_next: float) -> list[float]:
    """Weights of the velocities at past `times` (the last one is now) for the mean velocity over [times[-1], t_next].

    The integral of the Lagrange polynomial through them, divided by the step's length: exact for polynomials of degree
    below len(times). These conditions are the linear system solved here, on a step scaled to [0, 1].
    """
    scaled = (np.array(times) - times[-1]) / (t_next - times[-1])  # […, −1, 0] on an even grid
    powers = np.arange(len(times))
    return np.linalg.solve(scaled[None, :] ** powers[:, None], 1 / (powers + 1)).tolist()


def adams(velocity: Velocity, x: Tensor, times: list[float], noise: Noise, *, order: int) -> Iterator[Tensor]:
    """Adams–Bashforth: x ← x + dt·Σ w_i v_i over the last `order` velocities; one evaluation per step.

    The first steps have fewer past velocities and hence a lower order.
    """
    seen_times, seen = deque(maxlen=order), deque(maxlen=order)
    for t, t_next in pairwise(times):
        seen_times.append(t)
        seen.append(velocity(x, t, t))
        weights = adams_weights(list(seen_times), t_next)
        x = x + (t_next - t) * sum(w * v for w, v in zip(weights, seen, strict=True))
        yield x


def sde(velocity: Velocity, x: Tensor, times: list[float], noise: Noise) -> Iterator[Tensor]:
    """Euler–Maruyama: noise is added and the score removes it again, which corrects earlier errors; order 1.

    score = (t·v − x)/(1 − t) and x ← x + v·dt + ½·w·score·dt + √(w·dt)·noise with w = 1 − t. At every t, x has the same
    distribution as under the plain velocity. The last step is Euler's, without noise.
    """
    for t, t_next in pairwise(times):
        dt, w = t_next - t, 1 - t
        v = velocity(x, t, t)
        if t_next < times[-1]:
            score = (t * v - x) / (1 - t)
            x = x + v * dt + 0.5 * w * score * dt + (w * dt) ** 0.5 * noise()
        else:
            x = x + v * dt
        yield x


def follow_map(velocity: Velocity, x: Tensor, times: list[float], noise: Noise) -> Iterator[Tensor]:
    """x ← x + (t_{i+1} − t_i)·u(x, t_i, t_{i+1}) with a student's mean velocity u: one evaluation per step.

    A step is exact, however long, if u is. Source: 2505.13447 (mean velocity), 2410.12557 (shortcut models).
    """
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t, t, t_next)
        yield x


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "heun-reuse": heun_reuse,
    "adams2": partial(adams, order=2),
    "adams3": partial(adams, order=3),
    "adams4": partial(adams, order=4),
    "sde": sde,
    "map": follow_map,
}
STUDENT_SOLVER = "map"  # the only one that follows a student, and it follows nothing else
