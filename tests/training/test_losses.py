"""The auxiliary losses against plain float64 computations; JPEG's tables against those that Pillow writes."""

import io
from unittest.mock import MagicMock

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixnerd import InputError, flow
from pixnerd.frozen.efficientnet import MAPS, EfficientNet
from pixnerd.training.losses import (
    PerceptualLoss,
    colour_matrix,
    frequency_weighted,
    frequency_weights,
    quantisation_tables,
)

from ..conftest import randomised


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_tables_are_those_that_libjpeg_writes():
    for quality in range(1, 101):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
        written = Image.open(file).quantization
        assert quantisation_tables(quality).flatten(1).tolist() == [written[0], written[1]], quality


def test_weights_fall_with_frequency_and_have_mean_one():
    weights = frequency_weights(75)
    torch.testing.assert_close(weights.mean((1, 2)), torch.ones(2, dtype=torch.float64))
    assert (weights[:, 0, 0] > 3 * weights[:, 7, 7]).all()
    assert (frequency_weights(100) == 1).all()


def test_colours_are_orthonormal_and_only_the_first_has_luminance():
    colours = colour_matrix()
    torch.testing.assert_close(colours @ colours.T, torch.eye(3, dtype=torch.float64))
    luminance = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    torch.testing.assert_close(colours @ luminance, torch.stack([luminance.norm(), *torch.zeros(2).double()]))


def plain_frequency_loss(error, quality):
    """Luminance is the component of an error along Y, chrominance everything else."""
    tables = quantisation_tables(quality).numpy()
    weights = [(1 / table) / (1 / table).mean() for table in tables]
    direction = np.array([0.299, 0.587, 0.114]) if error.shape[0] == 3 else np.ones(1)
    direction /= np.linalg.norm(direction)
    total = 0.0
    for y in range(0, error.shape[1], 8):
        for x in range(0, error.shape[2], 8):
            block = [scipy.fft.dctn(channel[y : y + 8, x : x + 8], norm="ortho") for channel in error]
            along = sum(d * coefficients for d, coefficients in zip(direction, block, strict=True))
            rest = sum(coefficients**2 for coefficients in block) - along**2
            total += (weights[0] * along**2 + weights[1] * rest).sum()
    return total / error.size


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 100), st.sampled_from([1, 3]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_frequency_loss_is_the_plain_one(quality, channels, rows, columns, seed):
    error = random(2, channels, 8 * rows, 8 * columns, seed=seed)
    expected = [plain_frequency_loss(image.numpy(), quality) for image in error]
    torch.testing.assert_close(frequency_weighted(error, quality), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_weights_give_the_mean_squared_error(channels):
    error = random(3, channels, 16, 24)
    torch.testing.assert_close(frequency_weighted(error, 100), error.square().mean((1, 2, 3)))
    assert not torch.allclose(frequency_weighted(error, 90), error.square().mean((1, 2, 3)), rtol=1e-3)


def test_coarse_errors_cost_more_than_fine_ones():
    coarse = torch.ones(1, 1, 8, 8)
    fine = coarse * torch.tensor([1.0, -1.0]).repeat(4)
    assert frequency_weighted(coarse, 75) > 2 * frequency_weighted(fine, 75)


def test_frequency_loss_keeps_float32_under_autocast_and_after_inference_mode():
    error = random(2, 3, 8, 8).float()
    with torch.inference_mode():
        frequency_weighted(error, 61)  # this quality's constants are created here
    error.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = frequency_weighted(error, 61)
        halved = frequency_weighted(error.bfloat16(), 61)
    assert loss.dtype == halved.dtype == torch.float32
    torch.testing.assert_close(loss.double(), frequency_weighted(error.double(), 61), rtol=1e-5, atol=0)
    loss.sum().backward()
    assert error.grad.abs().min() > 0


def test_gradient_of_the_frequency_loss():
    torch.autograd.gradcheck(lambda error: frequency_weighted(error, 40), random(1, 3, 8, 8).requires_grad_())


@pytest.mark.parametrize(
    ("shape", "quality", "words"),
    [
        ((1, 4, 8, 8), 75, "images have 4 channels"),
        ((1, 3, 8, 12), 75, "image size 8x12 does not fit"),
        ((1, 3, 8, 8), 0, "JPEG quality is 0"),
        ((1, 3, 8, 8), 101, "JPEG quality is 101"),
        ((1, 3, 8, 8), 7.5, "JPEG quality is 7.5"),
    ],
)
def test_what_the_frequency_loss_refuses(shape, quality, words):
    with pytest.raises(InputError, match=words):
        frequency_weighted(torch.zeros(shape), quality)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_the_right_velocity_leads_to_the_clean_image(first, second):
    image, noise = random(2, 2, 3, 4, 4)
    t = torch.tensor([first, second], dtype=torch.float64)
    x_t = flow.interpolate(image, noise, t)
    torch.testing.assert_close(flow.clean_image(x_t, flow.velocity(image, noise), t), image)
    knows_all = MagicMock(return_value=flow.velocity(image, noise))
    knows_all.config.prediction = "v"
    right = flow.loss(knows_all, image, None, noise, t)
    torch.testing.assert_close(right.clean, image)
    assert right.mean < 1e-20


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_in, self.fine, self.coarse = (
            torch.nn.BatchNorm2d(3),
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.Conv2d(4, 5, 2, 2),
        )

    def maps(self, images):
        assert images.shape[1] == 3
        fine = self.fine(self.norm_in(images))
        return [fine, self.coarse(fine.relu())]


@pytest.fixture
def network():
    return randomised(TwoLayers()).double()


def test_perceptual_loss_is_the_plain_one(network):
    image, estimate = random(2, 3, 3, 8, 8)
    t = torch.tensor([0.3, 0.5, 1.0])
    loss = PerceptualLoss(network)(estimate, image, t)
    expected = []
    for ours, theirs in zip(estimate, image, strict=True):
        layers = []
        for a, b in zip(network.maps(ours[None]), network.maps(theirs[None]), strict=True):
            a, b = (features[0].flatten(1).T.detach().numpy() for features in (a, b))  # [positions, F]
            cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
            layers.append(np.mean(2 - 2 * np.array(cosines)))
        expected.append(np.mean(layers))
    torch.testing.assert_close(loss.numpy(), np.array(expected))
    assert PerceptualLoss(network)(image, image, t).tolist() == [0, 0, 0]


def test_noisy_times_do_not_count(network):
    image, estimate = random(2, 4, 3, 8, 8)
    t = torch.tensor([0.0, 0.29, 0.3, 0.9])
    estimate.requires_grad_()
    loss = PerceptualLoss(network)(estimate, image, t)
    assert (loss > 0).tolist() == [False, False, True, True]
    assert (loss == 0).tolist() == [True, True, False, False]
    loss.sum().backward()
    assert estimate.grad.abs().amax((1, 2, 3)).gt(0).tolist() == [False, False, True, True]


def test_gradients_of_the_perceptual_loss_reach_only_the_estimate(network):
    network.train()
    image, estimate = random(2, 2, 3, 8, 8).unbind()
    image.requires_grad_()
    estimate.requires_grad_()
    PerceptualLoss(network)(estimate, image, torch.ones(2)).sum().backward()
    assert estimate.grad.abs().sum() > 0
    assert image.grad is None
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.training
    assert network.norm_in.num_batches_tracked == 0


def test_grey_images_are_seen_in_three_channels(network):
    image, estimate = random(2, 2, 1, 8, 8)
    loss = PerceptualLoss(network)
    t = torch.ones(2)
    torch.testing.assert_close(loss(estimate, image, t), loss(estimate.repeat(1, 3, 1, 1), image.repeat(1, 3, 1, 1), t))


def test_perceptual_loss_refuses_other_shapes(network):
    with pytest.raises(InputError, match=r"shapes \(1, 3, 8, 8\) and \(1, 3, 16, 16\)"):
        PerceptualLoss(network)(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 16, 16), torch.ones(1))
    with pytest.raises(InputError, match=r"1 or 3, H, W"):
        PerceptualLoss(network)(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8), torch.ones(1))


def test_efficientnet_features_are_the_outputs_of_its_blocks():
    pytest.importorskip("efficientnet_lite_pytorch")
    features = EfficientNet()
    images = random(1, 3, 224, 224).float().clamp(-1, 1)
    seen = {}
    for index in MAPS:
        features.network._blocks[index].register_forward_hook(
            lambda block, inputs, output, index=index: seen.update({index: output})
        )
    features.network.extract_features(images)  # the package's own pass through all blocks
    expected = list(seen.values())
    outputs = features.maps(images)
    shapes = [(1, 16, 112, 112), (1, 24, 56, 56), (1, 40, 28, 28), (1, 112, 14, 14)]
    assert [tuple(output.shape) for output in outputs] == shapes
    torch.testing.assert_close(outputs, expected)


def test_more_noise_is_further_away_in_efficientnet_features():
    pytest.importorskip("efficientnet_lite_pytorch")
    loss = PerceptualLoss(EfficientNet())
    image = torch.linspace(-1, 1, 32).expand(1, 1, 32, 32)
    noise = random(1, 1, 32, 32).float()
    near, far = (loss(image + scale * noise, image, torch.ones(1)) for scale in (0.05, 0.5))
    assert 0 < 2 * near < far
