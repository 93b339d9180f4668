"""Averages with power-function profiles against their definition, and others made from them."""

import numpy as np
import pytest

from pixnerd import InputError
from pixnerd.averages import exponent, power_decay, synthesis_weights


def followed(values, width, every=1):
    """The average after every step, updated after every so many."""
    average, found = 0.0, []
    for step, value in enumerate(values, start=1):
        if step % every == 0:
            decay = power_decay(width, step, every)
            average = decay * average + (1 - decay) * value
        found.append(average)
    return np.array(found)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_width_is_the_profiles_standard_deviation(width):
    share = (np.arange(200_000) + 0.5) / 200_000
    profile = share ** exponent(width)
    profile /= profile.sum()
    mean = (profile * share).sum()
    assert np.sqrt((profile * (share - mean) ** 2).sum()) == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [0.05, 0.2])
def test_the_update_keeps_the_profile(width):
    """The share of each step's weights, by averaging a one at that step alone."""
    steps = 100
    shares = np.array([followed(np.eye(steps)[step], width)[-1] for step in range(steps)])
    assert shares.sum() == pytest.approx(1)
    profile = (np.arange(1, steps + 1) - 0.5) ** exponent(width)
    np.testing.assert_allclose(shares, profile / profile.sum(), atol=0.05 * shares.max())


@pytest.mark.parametrize("every", [4, 10])
def test_an_update_after_several_steps_gives_each_of_them_its_share(every):
    """An update gives the weights of its step the shares of all the steps since the last update."""
    steps, width = 120, 0.1
    each = np.array([followed(np.eye(steps)[step], width)[-1] for step in range(steps)])
    shares = np.array([followed(np.eye(steps)[step], width, every)[-1] for step in range(steps)])
    np.testing.assert_allclose(shares.reshape(-1, every)[:, :-1], 0)
    np.testing.assert_allclose(shares.reshape(-1, every)[:, -1], each.reshape(-1, every).sum(1), atol=1e-12)


def test_the_first_step_is_copied():
    assert power_decay(0.1, 1) == 0


@pytest.mark.parametrize(("width", "error"), [(0.05, 1e-9), (0.07, 2e-3), (0.12, 2e-2)])
def test_another_width_is_made_from_two(width, error):
    """On the path of a weight that wanders, from averages of two widths at ten steps."""
    steps = 1000
    path = np.cumsum(np.random.default_rng(0).standard_normal(steps)) / steps**0.5
    kept = [(step, w) for step in range(100, steps + 1, 100) for w in (0.05, 0.1)]
    values = {w: followed(path, w) for w in (0.05, 0.1)}
    weights = synthesis_weights([step for step, _ in kept], [w for _, w in kept], steps, width)
    found = sum(weight * values[w][step - 1] for weight, (step, w) in zip(weights, kept, strict=True))
    assert found == pytest.approx(followed(path, width)[-1], abs=error)
    assert sum(weights) == pytest.approx(1)
    assert abs(found - values[0.1][-1]) > 2 * error  # the averages themselves are further away


@pytest.mark.parametrize("width", [0.02, 0.28])
def test_few_kept_averages_leave_a_weight_that_never_changes_as_it_is(width):
    """However far the profile that they make is from the wanted one."""
    assert sum(synthesis_weights([50, 50, 100, 100], [0.05, 0.1, 0.05, 0.1], 100, width)) == pytest.approx(1)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, float("nan")])
def test_what_is_no_width(width):
    with pytest.raises(InputError, match="average's width is"):
        exponent(width)


def test_nothing_to_combine():
    with pytest.raises(InputError, match="no averages"):
        synthesis_weights([], [], 10, 0.1)
