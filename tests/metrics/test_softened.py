import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixnerd import InputError
from pixnerd.metrics.softened import ClassVote, sharpness, soften


def plain_soften(image):
    """One channel [H, W] of grey levels, pixel by pixel."""
    weights = [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    height, width = len(image), len(image[0])
    out = [[0.0] * width for _ in range(height)]
    for y in range(height):
        for x in range(width):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    near_y, near_x = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
                    out[y][x] += weights[dy + 1][dx + 1] * image[near_y][near_x] / 16
    return out


def test_softening_is_the_binomial_filter():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    softened = soften(images)
    assert softened.dtype == torch.uint8
    for image, found in zip(images.flatten(0, 1), softened.flatten(0, 1), strict=True):
        expected = torch.tensor(plain_soften(image.tolist()), dtype=torch.float64)
        assert (found.double() - expected).abs().max() <= 0.5


@given(st.integers(0, 255))
def test_plain_images_stay_and_are_not_sharp(grey):
    plain = torch.full((1, 3, 6, 7), grey, dtype=torch.uint8)
    assert soften(plain).equal(plain)
    assert sharpness(plain) == 0


def test_sharpness_of_a_checkerboard_is_known():
    """Inside a checkerboard of 0 and 160 the filter gives 80 everywhere, so each pixel is 80 off."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    board = ((rows + columns) % 2 * 160).to(torch.uint8).expand(1, 1, -1, -1)
    inside = board.float() - soften(board).float()
    assert inside[..., 1:-1, 1:-1].abs().eq(80).all()
    assert sharpness(board) == pytest.approx(80**2, rel=0.07)  # less along the edges


def test_blur_lowers_and_speckle_raises_sharpness():
    draw = torch.Generator().manual_seed(0)
    smooth = torch.linspace(0, 200, 32).view(1, 1, 1, 32) + torch.linspace(0, 50, 32).view(1, 1, 32, 1)
    edges = smooth.round().clone()
    edges[..., 8:20, 10:22] = 255
    edges = edges.to(torch.uint8)
    speckled = torch.where(torch.rand(edges.shape, generator=draw) < 0.02, 255 - edges, edges)
    assert sharpness(soften(edges)) < 0.5 * sharpness(edges)
    assert sharpness(speckled) > 1.5 * sharpness(edges)


def features_of_classes(count, spread, seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.eye(3, 8)[labels] * 4 + spread * torch.randn(count, 8, generator=draw), labels


def test_the_vote_recognises_classes_it_was_fitted_to():
    clean, labels = features_of_classes(300, 1.0, 0)
    softened, _ = features_of_classes(300, 1.2, 1)
    vote = ClassVote(clean, softened, labels)
    new, asked = features_of_classes(300, 1.0, 2)
    assert vote.agreement(new, asked) > 0.95
    assert vote.agreement(new, (asked + 1) % 3) < 0.05  # wrong classes do not agree
    assert vote.agreement(torch.randn(3000, 8), torch.arange(3000) % 3) == pytest.approx(1 / 3, abs=0.04)


def test_one_class_is_refused():
    with pytest.raises(InputError, match="of one class"):
        ClassVote(torch.randn(5, 3), torch.randn(5, 3), torch.zeros(5))
