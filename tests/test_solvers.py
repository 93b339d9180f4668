import math

import pytest
import torch

from pixnerd import InputError
from pixnerd.solvers import SOLVERS, time_grid


def error_at_the_end(solver, steps):
    """dx/dt = x·cos(3t) + t from x = 1, with a fine trapezoidal quadrature of the closed form as the truth."""
    fine = torch.linspace(0, 1, 20001, dtype=torch.float64)
    truth = math.exp(math.sin(3) / 3) * (1 + torch.trapezoid(fine * torch.exp(-torch.sin(3 * fine) / 3), fine))
    *_, x = SOLVERS[solver](lambda x, t: x * math.cos(3 * t) + t, torch.ones(1, dtype=torch.float64), time_grid(steps))
    return abs(float(x - truth))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1)])
def test_order_of_convergence(solver, order):
    measured = math.log2(error_at_the_end(solver, 64) / error_at_the_end(solver, 128))
    assert measured == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_state_a_step_and_never_the_velocity_at_one(solver):
    asked = []

    def velocity(x, t):
        asked.append(t)
        return torch.ones_like(x)

    states = list(SOLVERS[solver](velocity, torch.zeros(2), time_grid(7)))
    assert len(states) == 7
    assert max(asked) < 1
    torch.testing.assert_close(states[-1], torch.ones(2))  # a constant field is solved exactly
    torch.testing.assert_close(states[2], torch.full((2,), 3 / 7))


def test_shifted_grid():
    assert time_grid(4) == [0, 0.25, 0.5, 0.75, 1]
    assert time_grid(4, shift=3.0) == pytest.approx([0, 0.25 / 2.5, 0.5 / 2, 0.75 / 1.5, 1])


@pytest.mark.parametrize(("steps", "shift", "sentence"), [(0, 1.0, "steps is 0"), (5, 0.0, "shift is 0.0")])
def test_bad_grid(steps, shift, sentence):
    with pytest.raises(InputError, match=sentence):
        time_grid(steps, shift)
