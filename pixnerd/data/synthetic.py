"""Computed images: for tests, benchmarks and dry runs of any size without a data set."""

import math

import torch
from torch import Tensor

from ..randomness import Purpose, generator
from .dataset import ImageDataset, to_uint8

CLASSES = 10
IMAGES = 1000


class Synthetic(ImageDataset):
    """Coloured gratings: class k has stripes at angle 18°·k; the index decides frequency, phase and colour.

    The captions are "stripes at 36 degrees" and "wide stripes at 36 degrees", or "narrow" from three waves per side.
    """

    def __init__(self, image_size: int = 32):
        labels = [index % CLASSES for index in range(IMAGES)]
        super().__init__(image_size, 3, labels, [f"{180 // CLASSES * k} degrees" for k in range(CLASSES)])
        self.captions = []
        for index, label in enumerate(labels):
            plain = f"stripes at {self.classes[label]}"
            self.captions.append((plain, f"{'wide' if _cycles(_draw(index)) < 3 else 'narrow'} {plain}"))

    def pixels(self, index: int) -> Tensor:
        draw = _draw(index)
        angle = math.pi / CLASSES * int(self.labels[index])
        side = torch.linspace(0, 1, self.image_size)
        distance = math.cos(angle) * side + math.sin(angle) * side[:, None]  # [S, S], along the wave vector
        wave = torch.sin(2 * math.pi * (_cycles(draw) * distance + draw[1]))
        return to_uint8(wave * (2 * draw[2:, None, None] - 1))  # [3, S, S]


def _draw(index: int) -> Tensor:
    """Five numbers in [0, 1): frequency, phase, and the amplitude of each colour."""
    return torch.rand(5, generator=generator(torch.device("cpu"), 0, Purpose.SYNTHETIC_IMAGE, index))


def _cycles(draw: Tensor) -> Tensor:
    """Waves per image side, 2 … 4; 0-dim."""
    return 2 + 2 * draw[0]
