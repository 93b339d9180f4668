"""CIFAR-10: 60,000 photographs of ten classes, 32 × 32 pixels (Krizhevsky 2009), fetched and checked by torchvision."""

import contextlib
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10

from ..errors import InputError
from ..files import make_folder, writing
from .dataset import ImageDataset, cache_folder
from .pictures import center_crop

SIDE = 32


def fetch(folder: Path, train: bool) -> CIFAR10:
    """One of the two splits, downloaded (170 MB) into `folder` if it is not there; every file's checksum is compared.

    Raises:
        InputError: the download fails, or a file is damaged.
        WriteError: the folder cannot be written.
    """
    with contextlib.suppress(RuntimeError):  # a whole copy needs no lock: its folder may be one that only can be read
        return CIFAR10(folder, train=train)
    make_folder(folder)
    with writing(folder):
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire()  # another run of a sweep may be fetching it
    try:
        return CIFAR10(folder, train=train, download=True)
    except (OSError, RuntimeError, EOFError) as error:  # no network, a wrong checksum, a cut archive
        raise InputError(
            f"CIFAR-10 could not be fetched from {CIFAR10.url} ({error}): put {CIFAR10.filename} into {folder}, or run "
            "this again with a network"
        ) from error
    finally:
        lock.release()


class Cifar10(ImageDataset):
    """CIFAR-10's 50,000 training images, or with the word "test" its 10,000 test images; 10 classes.

    At another image size than 32 they are scaled as every picture is (ADM's crop).

    Raises:
        InputError: any other word, or the images can neither be found nor downloaded.
    """

    def __init__(self, split: str, image_size: int):
        if split not in ("", "test"):
            raise InputError(f"CIFAR-10 has no split {split!r}: name cifar10 or cifar10:test")
        source = fetch(cache_folder() / "cifar10", train=not split)
        super().__init__(image_size, 3, source.targets, source.classes)
        self._images = torch.from_numpy(source.data).permute(0, 3, 1, 2)  # [N, 3, 32, 32]

    def pixels(self, index: int) -> Tensor:
        image = self._images[index]
        if self.image_size == SIDE:
            return image
        scaled = center_crop(Image.fromarray(image.permute(1, 2, 0).numpy()), self.image_size)
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
