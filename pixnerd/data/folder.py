"""A folder with one sub-folder per class, holding images of any size: cropped and scaled as in ADM."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import InputError
from .dataset import ImageDataset

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to size × size: halve with BOX while the short side is ≥ 2·size, then BICUBIC, then crop.

    Source: Dhariwal & Nichol 2105.05233, released code; every ImageNet result is reported on images cropped like this.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_rgb(path: Path) -> Image.Image:
    """The image as RGB, turned upright by its EXIF tag. Raises InputError naming the file when it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def check_header(path: Path) -> None:
    """Raise InputError naming the file unless its first bytes are those of an image."""
    try:
        Image.open(path).close()
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image, whatever its name says") from error
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error}") from error


class ImageFolder(ImageDataset):
    """Classes are the sub-folders in alphabetical order, images the .bmp, .jpeg, .jpg, .png and .webp files below them.

    Every file's header is checked at the start, so that a wrong file stops a training before it begins.
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
        for label, name in enumerate(classes):
            found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
            if not found:
                raise InputError(f"folder {root / name} holds no images ({', '.join(sorted(SUFFIXES))})")
            self.paths += found
            labels += [label] * len(found)
        super().__init__(image_size, 3, labels, classes)
        with ThreadPoolExecutor() as pool:
            list(pool.map(check_header, self.paths))

    def pixels(self, index: int) -> Tensor:
        image = center_crop(read_rgb(self.paths[index]), self.image_size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, S, S]
