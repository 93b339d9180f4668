"""Data sets by name: `digits`, `emoji`, `synthetic`, `folder:PATH`. All give images in [−1, 1] and labels."""

from ..errors import InputError
from .dataset import ImageDataset, cache_folder, to_float, to_uint8
from .digits import Digits
from .emoji import Emoji
from .folder import ImageFolder
from .synthetic import Synthetic

__all__ = [
    "Digits",
    "Emoji",
    "ImageDataset",
    "ImageFolder",
    "Synthetic",
    "cache_folder",
    "load",
    "to_float",
    "to_uint8",
]


def load(name: str, image_size: int) -> ImageDataset:
    """The data set called `name`, with images of image_size × image_size. Raises InputError for an unknown name."""
    kind, _, path = name.partition(":")
    match kind, bool(path):
        case "digits", False:
            return Digits(image_size)
        case "emoji", False:
            return Emoji(image_size)
        case "emoji", True if path in ("held-out", "all"):
            return Emoji(image_size, path)
        case "synthetic", False:
            return Synthetic(image_size)
        case "folder", True:
            return ImageFolder(path, image_size)
    raise InputError(
        f"data set {name!r} is unknown; known: digits, emoji, emoji:held-out, emoji:all, synthetic, folder:PATH"
    )
