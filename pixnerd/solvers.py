"""Solvers: how to follow a velocity field from noise (t = 0) to an image (t = 1) in few steps.

A solver is a generator: given velocity(x, t), a start x and the times t_0 < t_1 < … < t_n, it yields x at t_1 … t_n.
It never asks for the velocity at t_n. Source: arXiv 2507.23268, section 5.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .errors import InputError
from .flow import shift_time

Velocity = Callable[[Tensor, float], Tensor]  # (x [B, ...], t) → velocity [B, ...]
Solver = Callable[[Velocity, Tensor, list[float]], Iterator[Tensor]]


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """t_i = i/n for i = 0 … n, shifted as a whole: steps + 1 times from 0 to 1.

    A shift above 1 spends more of the steps near the noise.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; sampling needs at least 1")
    if shift <= 0:
        raise InputError(f"shift is {shift}; it has to be greater than 0")
    return shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()


def euler(velocity: Velocity, x: Tensor, times: list[float]) -> Iterator[Tensor]:
    """x ← x + (t_{i+1} − t_i)·v(x, t_i): one evaluation a step, order 1."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
        yield x


SOLVERS: dict[str, Solver] = {"euler": euler}
