import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnerd import PixNerd, flow
from pixnerd.model import velocity_from_image

from .conftest import TINY, randomised


def test_path_runs_from_noise_to_image_at_constant_velocity():
    image, noise = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(flow.interpolate(image, noise, torch.zeros(2)), noise)
    torch.testing.assert_close(flow.interpolate(image, noise, torch.ones(2)), image)
    t, later = torch.tensor([0.2, 0.5]), torch.tensor([0.6, 0.9])
    moved = flow.interpolate(image, noise, later) - flow.interpolate(image, noise, t)
    torch.testing.assert_close(moved, 0.4 * flow.velocity(image, noise))


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0.1, 10))
def test_shift_keeps_the_ends_and_its_inverse_undoes_it(t, shift):
    t = torch.tensor(t, dtype=torch.float64)
    shifted = flow.shift_time(t, shift)
    assert 0 <= shifted <= 1
    assert shifted <= t + 1e-12 if shift >= 1 else shifted >= t - 1e-12
    torch.testing.assert_close(flow.shift_time(shifted, 1 / shift), t)


def test_training_times_are_logit_normal():
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    t = flow.logit_normal_time(normal)
    logit = torch.log(t / (1 - t))
    assert logit.mean().abs() < 0.02
    assert logit.std() == pytest.approx(1, abs=0.02)
    # a shift s moves the logit by −log s: the median becomes 1 / (1 + s)
    assert flow.logit_normal_time(normal, 4.0).median() == pytest.approx(1 / 5, abs=0.01)


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_loss_is_the_mean_squared_velocity_error(prediction):
    model = randomised(PixNerd(dataclasses.replace(TINY, prediction=prediction), 5)).double()
    image, noise = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64).unbind()
    t, labels = torch.tensor([0.3, 0.98], dtype=torch.float64), torch.tensor([1, 5])
    x_t = t.view(-1, 1, 1, 1) * image + (1 - t.view(-1, 1, 1, 1)) * noise
    error = (model(x_t, t, labels) - (image - noise)) ** 2
    if prediction == "x":  # the weight of the image error, 1/(1 − t)², ends at 400: from t = 0.95 on
        error = error * torch.tensor([1, (0.02 / 0.05) ** 2]).view(-1, 1, 1, 1)
    losses = flow.loss(model, image, labels, noise, t)
    torch.testing.assert_close(losses.mean, error.mean())
    torch.testing.assert_close(losses.per_image, error.mean(dim=(1, 2, 3)))
    assert losses.mean.requires_grad
    assert not losses.per_image.requires_grad


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_a_perfect_network_has_no_loss(prediction):
    image, noise = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64).unbind()
    t = torch.tensor([0.1, 0.7, 0.99], dtype=torch.float64)

    class Perfect(torch.nn.Module):
        config = dataclasses.replace(TINY, prediction=prediction)

        def forward(self, x_t, t, labels, base_resolution):
            return image - noise if prediction == "v" else velocity_from_image(image, x_t, t)

    losses = flow.loss(Perfect(), image, torch.zeros(3, dtype=torch.long), noise, t)
    assert losses.mean < 1e-8


def test_loss_at_a_base_resolution_with_the_tokens_of_a_block():
    """What it hands on to the other losses: the image where the estimate leads, and the tapped block's tokens."""
    model = randomised(PixNerd(TINY, 5)).double()
    image, noise = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64).unbind()
    t, labels = torch.tensor([0.3, 0.9], dtype=torch.float64), torch.tensor([1, 5])
    x_t = t.view(-1, 1, 1, 1) * image + (1 - t.view(-1, 1, 1, 1)) * noise
    v, tokens = model(x_t, t, labels, (8, 8), 1)
    losses = flow.loss(model, image, labels, noise, t, (8, 8), lambda error: error.abs().amax((1, 2, 3)), tap=1)
    torch.testing.assert_close(losses.per_image, (v - image + noise).abs().amax((1, 2, 3)).detach())
    torch.testing.assert_close(losses.clean, x_t + (1 - t).view(-1, 1, 1, 1) * v)
    assert tokens.shape == (2, 4, TINY.width)
    assert losses.tokens.equal(tokens)
    plain = flow.loss(model, image, labels, noise, t, (8, 8))
    assert plain.tokens is None
    assert plain.clean.equal(losses.clean)
