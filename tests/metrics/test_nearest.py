import sys

import pytest
import torch

from pixnerd import InputError, data
from pixnerd.data.digits import Digits
from pixnerd.metrics.nearest import digit_agreement, real_digit_agreement


def test_real_digits_agree_with_themselves_wherever_the_frame_ends():
    digits = Digits(32)
    pixels, labels = digits.batch(range(0, 5000, 50))
    # a digit is its own nearest neighbour, but two others may outvote it
    assert digit_agreement(pixels, labels) >= 0.95
    assert digit_agreement(pixels, (labels + 1) % 10) <= 0.05
    framed = torch.full_like(pixels, 255)
    framed[..., 2:30, 2:30] = pixels[..., 2:30, 2:30]  # only the centre counts
    assert digit_agreement(framed, labels) == digit_agreement(pixels, labels)


def test_left_out_real_digits_are_read_by_the_others():
    """An independent computation with distances in torch: k = 3, ties to the smallest label."""
    pixels, labels = Digits(28).batch(range(5000))
    flat = pixels.flatten(1).double() / 255
    distances = torch.cdist(flat, flat).fill_diagonal_(torch.inf)
    votes = labels[distances.topk(3, largest=False).indices]
    expected = (votes.mode(dim=1).values == labels).double().mean()
    assert real_digit_agreement() == pytest.approx(float(expected), abs=1e-3)


def test_a_missing_package_is_named_when_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.neighbors", None)
    with pytest.raises(InputError, match=r"needs scikit-learn: pip install 'pixnerd\[digits\]'"):
        real_digit_agreement()


def test_wrong_shapes_are_refused():
    labels = torch.tensor([1])
    with pytest.raises(InputError, match="16x16 pixels"):
        digit_agreement(torch.zeros(1, 1, 16, 16, dtype=torch.uint8), labels)
    with pytest.raises(InputError, match="2 images and 1 labels"):
        digit_agreement(data.to_uint8(torch.zeros(2, 1, 28, 28)), labels)
