"""Data sets by name: `digits`, `emoji`, `synthetic`, `folder:PATH`, `imagenet:PATH`, `prepared:PATH`,
`captions:PATH`, `shards:PATH`, `shapes`, `shapes:held-out`.

All give images in [−1, 1] and labels.
"""

from ..errors import InputError
from .captions import CaptionFolder, CaptionShards
from .dataset import ImageDataset, cache_folder, to_float, to_uint8
from .digits import Digits
from .emoji import Emoji, emoji_called
from .folder import ImageFolder
from .imagenet import ImageNet
from .prepared import Prepared, prepare, read_speeds
from .shapes import Shapes, shapes_called
from .synthetic import Synthetic

__all__ = [
    "CaptionFolder",
    "CaptionShards",
    "Digits",
    "Emoji",
    "ImageDataset",
    "ImageFolder",
    "ImageNet",
    "Prepared",
    "Shapes",
    "Synthetic",
    "cache_folder",
    "load",
    "prepare",
    "read_speeds",
    "to_float",
    "to_uint8",
]


def load(name: str, image_size: int) -> ImageDataset:
    """The data set called `name`, with images of image_size × image_size. Raises InputError for an unknown name."""
    kind, _, path = name.partition(":")
    match kind, bool(path):
        case "digits", False:
            return Digits(image_size)
        case "emoji", _:
            return emoji_called(path, image_size)
        case "synthetic", False:
            return Synthetic(image_size)
        case "folder", True:
            return ImageFolder(path, image_size)
        case "imagenet", True:
            return ImageNet(path, image_size)
        case "prepared", True:
            return Prepared(path, image_size)
        case "captions", True:
            return CaptionFolder(path, image_size)
        case "shards", True:
            return CaptionShards(path, image_size)
        case "shapes", _:
            return shapes_called(path, image_size)
    raise InputError(
        f"data set {name!r} is unknown; known: digits, emoji, emoji:WORDS, synthetic, folder:PATH, "
        "imagenet:PATH, prepared:PATH, captions:PATH, shards:PATH, shapes, shapes:held-out"
    )
