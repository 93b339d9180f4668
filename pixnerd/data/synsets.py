"""The classes of ImageNet: 1,000 WordNet ids in the order of their labels, and a word for each."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError

LIST = Path(__file__).with_name("imagenet_synsets.txt")
SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"  # of the ids, joined by line breaks


def synsets() -> list[str]:
    """The 1,000 WordNet ids, in the order of their labels. Raises InputError when the list's sha256 differs."""
    ids = LIST.read_text().split()
    if hashlib.sha256("\n".join(ids).encode()).hexdigest() != SHA256:
        raise InputError(f"{LIST} is not the list of ImageNet's classes (its sha256 differs): reinstall pixnerd")
    return ids


def words_of(classes: Sequence[str]) -> list[str]:
    """What people call each class: torchvision's word for an id of ImageNet's, any other name as it is.

    n02099601 becomes "golden retriever".
    """
    ids = synsets()
    if not set(ids).intersection(classes):
        return list(classes)
    from torchvision.models import ResNet18_Weights  # it takes a second; all weights for ImageNet list the same words

    words = dict(zip(ids, ResNet18_Weights.IMAGENET1K_V1.meta["categories"], strict=True))
    return [words.get(name, name) for name in classes]
