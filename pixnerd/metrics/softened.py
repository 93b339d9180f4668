"""Measures that single wrong pixels do not fool: softened images, their sharpness, and a vote on their class.

Features of a network that never saw speckle overrate it: they can prefer a blurred image to a crisp one with a few
speckles. The same features of images that were softened a little, samples and real ones alike, see what eyes see.

Dimension letters: N images of H × W pixels, F features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError

BINOMIAL = (0.25, 0.5, 0.25)


def soften(images: Tensor) -> Tensor:
    """Images smoothed by the 3 × 3 binomial filter, edges repeated: uint8 [N, C, H, W], rounded."""
    channels = images.shape[1]
    row = torch.tensor(BINOMIAL, device=images.device)
    kernel = torch.outer(row, row).expand(channels, 1, 3, 3)
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel, groups=channels).round().to(torch.uint8)


def sharpness(images: Tensor) -> float:
    """Mean squared difference between images and their softened selves, uint8 [N, C, H, W]; in grey levels squared.

    Only its ratio to that of real images means something: below 1 is blurred, above 1 is speckled.
    """
    return float((images.float() - soften(images).float()).square().mean())


class ClassVote:
    """A logistic regression from a network's features to classes, fitted to real images, as they are and softened.

    Args:
        clean: features of real images [N, F].
        softened: features of the same images, softened, [N, F].
        labels: their classes [N].

    Raises:
        InputError: scikit-learn is missing, or there are fewer than two classes.
    """

    def __init__(self, clean: Tensor, softened: Tensor, labels: Tensor):
        if len(labels.unique()) < 2:
            raise InputError(f"all {len(labels)} real images are of one class; a vote needs at least 2")
        self._model = _classifier().fit(torch.cat([clean, softened]).numpy(), labels.repeat(2).numpy())

    def agreement(self, features: Tensor, labels: Tensor) -> float:
        """The share of images, by their features [N, F], that the vote assigns to their own class of `labels` [N]."""
        return float((self._model.predict(features.numpy()) == labels.numpy()).mean())


def _classifier() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise InputError("voting on classes needs scikit-learn: pip install 'pixnerd[digits]'") from error
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
