import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pixnerd import InputError
from pixnerd.solvers import SOLVERS, adams_weights, time_grid


def no_noise():
    raise AssertionError("a deterministic solver asked for noise")


def end_of_known_field(solver, steps, shift):
    """dx/dt = 7 t⁶·x from x = 1, so x(1) = e; returns the error in float64.

    The field vanishes at the start, so that the first steps of a multistep method, which have a lower order for lack
    of a past, add no error: what remains shows the method's order.
    """
    x = torch.ones(1, dtype=torch.float64)
    *_, x = SOLVERS[solver](lambda x, t, _: 7 * t**6 * x, x, time_grid(steps, shift), no_noise)
    return abs(float(x) - math.e)


KNOWN = {  # solver → (order of convergence, evaluations for 7 steps); the SDE and students have their own tests
    "euler": (1, 7),
    "heun": (2, 13),
    "heun-reuse": (2, 7),
    "adams2": (2, 7),
    "adams3": (3, 7),
    "adams4": (4, 7),
    "sde": (None, 7),
    "map": (None, 7),
}


def test_every_solver_is_known_here():
    assert KNOWN.keys() == SOLVERS.keys(), "a new solver needs its order and its evaluations in KNOWN"


@pytest.mark.parametrize("shift", [1.0, 0.5])
@pytest.mark.parametrize("solver", [solver for solver, (order, _) in KNOWN.items() if order])
def test_order_of_convergence(solver, shift):
    order, _ = KNOWN[solver]
    measured = math.log2(end_of_known_field(solver, 400, shift) / end_of_known_field(solver, 800, shift))
    assert measured == pytest.approx(order, abs=0.15)


def test_adams_weights_on_an_even_grid_are_the_textbook_ones():
    assert adams_weights([0.0], 0.1) == pytest.approx([1])
    assert adams_weights([0.0, 0.1], 0.2) == pytest.approx([-1 / 2, 3 / 2])
    assert adams_weights([0.0, 0.1, 0.2], 0.3) == pytest.approx([5 / 12, -16 / 12, 23 / 12])
    assert adams_weights([0.0, 0.1, 0.2, 0.3], 0.4) == pytest.approx([-9 / 24, 37 / 24, -59 / 24, 55 / 24])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5, unique=True))
def test_adams_weights_are_integrals_of_lagrange_polynomials(times):
    times = sorted(times)
    assume(min(np.diff(times)) > 0.02)
    *past, t_next = times
    weights = adams_weights(past, t_next)
    assert sum(weights) == pytest.approx(1)
    for j, weight in enumerate(weights):
        others = [t for i, t in enumerate(past) if i != j]
        lagrange = np.poly1d(np.poly(others) / np.prod([past[j] - t for t in others])).integ()
        assert weight == pytest.approx(
            (lagrange(t_next) - lagrange(past[-1])) / (t_next - past[-1]), rel=1e-4, abs=1e-4
        )


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_state_per_step_and_never_the_velocity_at_one(solver):
    asked = []

    def velocity(x, t, start, end=None):
        asked.append((t, start))
        return torch.ones_like(x)

    states = list(SOLVERS[solver](velocity, torch.zeros(2), time_grid(7), lambda: torch.zeros(2)))
    assert len(states) == 7
    assert len(asked) == KNOWN[solver][1]
    assert max(t for t, _ in asked) < 1
    assert all(start <= t for t, start in asked)
    if solver != "sde":  # a constant field is solved exactly
        torch.testing.assert_close(states[-1], torch.ones(2))
        torch.testing.assert_close(states[2], torch.full((2,), 3 / 7))


def test_sde_keeps_the_marginals_of_a_gaussian():
    """Data N(1, 0.5²): x_t ~ N(t, t²·0.25 + (1−t)²), whose velocity is E[x − ε | x_t] in closed form."""
    generator = torch.Generator().manual_seed(0)
    n, s = 200_000, 0.5

    def velocity(x, t, _):
        variance = t**2 * s**2 + (1 - t) ** 2
        return 1 + (t * s**2 - (1 - t)) / variance * (x - t)

    x, times = torch.randn(n, generator=generator), time_grid(400)
    noisy = SOLVERS["sde"](velocity, x, times, lambda: torch.randn(n, generator=generator))
    for t, noisy_x in zip(times[1:], noisy, strict=True):
        if any(abs(t - stop) < 1e-9 for stop in (0.25, 0.5, 0.75, 1.0)):
            assert noisy_x.mean() == pytest.approx(t, abs=0.01)
            assert noisy_x.std() == pytest.approx(math.sqrt(t**2 * s**2 + (1 - t) ** 2), rel=0.015)
    (plain,) = list(SOLVERS["euler"](velocity, x, times, no_noise))[-1:]
    assert torch.corrcoef(torch.stack((plain, x)))[0, 1] > 0.999  # the plain flow only stretches the start …
    assert torch.corrcoef(torch.stack((noisy_x, x)))[0, 1] < 0.9  # … the stochastic one forgets it


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_mean_velocity_is_followed_exactly_however_long_the_steps(steps):
    """dx/dt = 7 t⁶·x: x_r = x_t·e^(r⁷ − t⁷), also between the steps."""
    x, times = torch.ones(1, dtype=torch.float64), time_grid(steps)
    path = SOLVERS["map"](lambda x, t, _, r: x * (math.exp(r**7 - t**7) - 1) / (r - t), x, times, no_noise)
    for time, state in zip(times[1:], path, strict=True):
        assert float(state) == pytest.approx(math.exp(time**7), rel=1e-12)


def test_shifted_grid():
    assert time_grid(4) == [0, 0.25, 0.5, 0.75, 1]
    assert time_grid(4, shift=3.0) == pytest.approx([0, 0.25 / 2.5, 0.5 / 2, 0.75 / 1.5, 1])


@pytest.mark.parametrize(("steps", "shift", "sentence"), [(0, 1.0, "steps is 0"), (5, 0.0, "shift is 0.0")])
def test_bad_grid(steps, shift, sentence):
    with pytest.raises(InputError, match=sentence):
        time_grid(steps, shift)


def test_heun_with_reuse_is_adams2_on_an_even_grid():
    def end(solver, shift):
        x = torch.linspace(-1, 1, 5, dtype=torch.float64)
        *_, x = SOLVERS[solver](lambda x, t, _: torch.sin(3 * x) + t, x, time_grid(9, shift), no_noise)
        return x

    torch.testing.assert_close(end("heun-reuse", 1.0), end("adams2", 1.0), rtol=1e-12, atol=0)
    assert (end("heun-reuse", 3.0) - end("adams2", 3.0)).abs().max() > 1e-4
