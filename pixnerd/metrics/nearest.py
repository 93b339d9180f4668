"""Do sampled digits show what was asked for? A plain nearest-neighbour vote among real digits answers this."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.digits import SIDE, Digits
from ..errors import InputError

NEIGHBOURS = 3


def _fit() -> tuple[Any, np.ndarray]:
    """A classifier of 28 × 28 pixels in [0, 1], fitted to all 5,000 real digits, and their labels."""
    try:
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise InputError("reading digits back needs scikit-learn: pip install 'pixnerd[digits]'") from error
    real = Digits(SIDE)
    pixels, labels = real.batch(range(len(real)))
    return KNeighborsClassifier(NEIGHBOURS).fit(pixels.flatten(1).numpy() / 255, labels.numpy()), labels.numpy()


def digit_agreement(images: Tensor, labels: Tensor) -> float:
    """The share of sampled digits that a k-NN (k = 3, Euclidean, all 5,000 real digits) classifies as their label.

    Args:
        images: uint8 [B, C, H, W] of at least 28 × 28; the central 28 × 28 of the first channel is compared.
        labels: [B] requested digits 0 … 9.

    Raises:
        InputError: the images are smaller than 28 × 28, or their number differs from that of the labels.
    """
    height, width = images.shape[2:]
    if min(height, width) < SIDE:
        raise InputError(f"images have {height}x{width} pixels; a digit has {SIDE}x{SIDE}")
    if len(images) != len(labels):
        raise InputError(f"there are {len(images)} images and {len(labels)} labels; the numbers have to match")
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    middle = images[:, 0, top : top + SIDE, left : left + SIDE].flatten(1).cpu().numpy() / 255
    classifier, _ = _fit()
    return float((classifier.predict(middle) == labels.cpu().numpy()).mean())


def real_digit_agreement() -> float:
    """The same share for the 5,000 real digits, each classified by the others: the baseline."""
    classifier, labels = _fit()
    votes = labels[classifier.kneighbors(return_distance=False)]  # [5000, 3], a digit is not its own neighbour
    winners = torch.from_numpy(votes).mode(dim=1).values.numpy()  # the smallest label where all three differ
    return float((winners == labels).mean())
