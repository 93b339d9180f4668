"""The interface of every data set: uint8 pixels by index, labels, class names; and pixels to [−1, 1] and back."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from .synsets import words_of


def cache_folder() -> Path:
    """Where downloaded and computed data is kept: $PIXNERD_DATA, else the project's data/, else ./data."""
    project = Path(__file__).parents[2]
    default = project / "data" if (project / "pyproject.toml").is_file() else Path("data")
    return Path(os.environ.get("PIXNERD_DATA", default)).absolute()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0 … 255 → float32 −1 … 1, any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float −1 … 1 → uint8: (x + 1)·127.5 + 0.5, clipped and floored; any shape. Undoes `to_float` exactly."""
    return ((images.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


class ImageDataset(Dataset, ABC):
    """Images of one size, each with a class.

    `dataset[i]` is (image [C, S, S] in [−1, 1], label); `batch` gives the same as uint8, a quarter of the bytes.
    """

    def __init__(self, image_size: int, channels: int, labels: Sequence[int], classes: Sequence[str]):
        if image_size < 1:
            raise InputError(f"image size is {image_size}; it has to be at least 1")
        self.image_size, self.channels = image_size, channels
        self.labels = torch.as_tensor(labels, dtype=torch.long)  # [len(self)]
        self.classes = list(classes)  # the name of every label
        self.captions: Sequence[tuple[str, ...]] = []  # each image's captions, the plainest first

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def words(self) -> list[str]:
        """What people call each class: "tench" for ImageNet's n01440764, elsewhere the class itself."""
        return words_of(self.classes)

    @abstractmethod
    def pixels(self, index: int) -> Tensor:
        """Image `index` as uint8 [C, S, S]."""

    def check(self) -> None:
        """Look for bad files before any work begins, as far as opening has not done so. Raises InputError."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_float(self.pixels(index)), int(self.labels[index])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """uint8 images [B, C, S, S] and labels [B]."""
        return torch.stack([self.pixels(i) for i in indices]), self.labels[list(indices)]
