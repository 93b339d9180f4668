"""Data sets by name: images in [−1, 1] with labels, some with captions.

A data set consists of a module and a line in DATA_SETS. Each module is imported only when it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

import lazy_loader

from ..errors import InputError
from ..files import reachable

if TYPE_CHECKING:
    from .dataset import ImageDataset


class Source(NamedTuple):
    """How a kind of data set is named and opened."""

    forms: tuple[str, ...]
    """the names it goes by; after a colon comes an argument"""
    opener: str
    """module and function, called with the argument, if any form takes one, and the image size"""


DATA_SETS = {
    "digits": Source(("digits",), "digits.Digits"),
    "cifar10": Source(("cifar10", "cifar10:test"), "cifar10.Cifar10"),
    "emoji": Source(("emoji", "emoji:WORDS"), "emoji.emoji_called"),
    "synthetic": Source(("synthetic",), "synthetic.Synthetic"),
    "folder": Source(("folder:PATH",), "folder.ImageFolder"),
    "imagenet": Source(("imagenet:PATH",), "imagenet.ImageNet"),
    "prepared": Source(("prepared:PATH",), "prepared.Prepared"),
    "captions": Source(("captions:PATH",), "captions.CaptionFolder"),
    "shards": Source(("shards:PATH",), "captions.CaptionShards"),
    "shapes": Source(("shapes", "shapes:held-out"), "shapes.shapes_called"),
}
NAMES = ", ".join(form for source in DATA_SETS.values() for form in source.forms)


def is_data_set(name: str) -> bool:
    """Whether a data set goes by this name, whatever its argument is."""
    kind, _, argument = name.partition(":")
    source = DATA_SETS.get(kind)
    return source is not None and any((":" in form) == bool(argument) for form in source.forms)


def path_in(name: str) -> str | None:
    """The path in a data set's name, such as PATH of folder:PATH; None if it has none."""
    kind, _, argument = name.partition(":")
    return argument if is_data_set(name) and f"{kind}:PATH" in DATA_SETS[kind].forms else None


def load(name: str, image_size: int) -> ImageDataset:
    """The data set called `name`, with images of image_size × image_size, after a look at the header of every file.

    Raises:
        InputError: the name is unknown, or the data cannot be used.
    """
    dataset = open_data_set(name, image_size)
    dataset.check()
    return dataset


def open_data_set(name: str, image_size: int) -> ImageDataset:
    """As `load`, but a bad file is named only when it is read."""
    kind, _, argument = name.partition(":")
    if not is_data_set(name):
        raise InputError(f"data set {name!r} is unknown; known: {NAMES}")
    source = DATA_SETS[kind]
    module, _, opener = source.opener.partition(".")
    opened_by = getattr(importlib.import_module(f".{module}", __name__), opener)
    if path := path_in(name):
        argument = str(reachable(path).absolute())  # images are read later, perhaps from another working directory
    takes_argument = any(":" in form for form in source.forms)
    return opened_by(argument, image_size) if takes_argument else opened_by(image_size)


__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["captions", "emoji", "folder", "imagenet", "pictures", "prepared", "shapes"],
    submod_attrs={
        "captions": ["CaptionFolder", "CaptionShards"],
        "cifar10": ["Cifar10"],
        "dataset": ["ImageDataset", "cache_folder", "to_float", "to_uint8"],
        "digits": ["Digits"],
        "emoji": ["Emoji"],
        "folder": ["ImageFolder"],
        "imagenet": ["ImageNet"],
        "prepared": ["Prepared", "prepare", "read_speeds"],
        "shapes": ["Shapes"],
        "synthetic": ["Synthetic"],
    },
)
