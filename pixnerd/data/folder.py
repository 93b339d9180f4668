"""A folder with one sub-folder per class, with images of any size: cropped and scaled as in ADM."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from .dataset import ImageDataset

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to size × size: halve with BOX while the short side is ≥ 2·size, then BICUBIC, then crop.

    Source: Dhariwal & Nichol 2105.05233, released code; published ImageNet results use images cropped like this.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_pixels(source: Path | BinaryIO, name: object, size: int) -> Tensor:
    """The image as uint8 [3, size, size]: rotated upright by its EXIF tag, as RGB, cropped by `center_crop`.

    Raises:
        InputError: `name` cannot be decoded.
    """
    try:
        with Image.open(source) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # a damaged file makes Pillow raise almost anything: struct.error, TypeError, …
        raise InputError(f"{name} cannot be read as an image: {error}") from error
    return torch.from_numpy(np.array(center_crop(upright, size))).permute(2, 0, 1)


def check_header(source: Path | BinaryIO, name: object) -> None:
    """Raise an InputError that mentions `name` unless the first bytes are those of an image."""
    try:
        Image.open(source).close()
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image, despite its name") from error
    except Exception as error:
        raise InputError(f"{name} cannot be opened: {error}") from error


class ImageFolder(ImageDataset):
    """Classes are the sub-folders in alphabetical order, images the .bmp, .jpeg, .jpg, .png and .webp files in them.

    Every file's header is checked at the start, so that a bad file is found before training begins.
    """

    def __init__(self, root: str | Path, image_size: int):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"folder {root} does not exist; 'folder:PATH' needs one sub-folder per class")
        classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not classes:
            raise InputError(f"folder {root} has no sub-folders; 'folder:PATH' needs one sub-folder per class")
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(tqdm(classes, desc="listing", unit="class", leave=False, delay=2)):
            found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
            if not found:
                raise InputError(f"folder {root / name} holds no images ({', '.join(sorted(SUFFIXES))})")
            self.paths += found
            labels += [label] * len(found)
        super().__init__(image_size, 3, labels, classes)
        with ThreadPoolExecutor() as pool:
            checked = pool.map(check_header, self.paths, self.paths)
            list(tqdm(checked, desc="checking", total=len(self.paths), unit="image", leave=False, delay=2))

    def pixels(self, index: int) -> Tensor:
        return read_pixels(self.paths[index], self.paths[index], self.image_size)
