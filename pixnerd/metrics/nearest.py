"""Do drawn digits show what was asked for? A plain nearest-neighbour vote among real digits answers."""

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from ..data.digits import SIDE, Digits
from ..errors import InputError


def digit_agreement(images: np.ndarray, labels: np.ndarray) -> float:
    """The share of drawn digits that a k-NN (k = 3, Euclidean, all 5,000 real digits) takes for their label.

    Args:
        images: uint8 [B, H, W, 3] grey images of at least 28 × 28; the middle 28 × 28 scaled to [0, 1] is compared.
        labels: [B] requested digits 0 … 9.

    Raises:
        InputError: images smaller than 28 × 28.
    """
    height, width = images.shape[1:3]
    if min(height, width) < SIDE:
        raise InputError(f"images have {height}x{width} pixels; a digit has {SIDE}x{SIDE}")
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    middle = images[:, top : top + SIDE, left : left + SIDE, 0].reshape(len(images), -1)
    real = Digits(SIDE)
    pixels, classes = real.batch(range(len(real)))
    classifier = KNeighborsClassifier(n_neighbors=3).fit(pixels.flatten(1).numpy() / 255, classes.numpy())
    return float((classifier.predict(middle / 255) == labels).mean())
