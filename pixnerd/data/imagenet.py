"""ImageNet as unpacked from ILSVRC 2012: one folder for each of 1,000 synsets, named by its WordNet id.

A label is the index of the id in alphabetical order, n01440764 (tench) = 0 … n15075141 (toilet tissue) = 999. All
published class-conditional models use this order; an extra or missing folder would shift labels and is refused.
"""

from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from .dataset import ImageDataset
from .pictures import PictureFiles, find_pictures, read_pixels, subfolders
from .synsets import synsets


class ImageNet(ImageDataset):
    """The 1,000 class folders in `root` or in `root`/train, images cropped and scaled as in ADM; classes are the ids.

    Images are the pictures directly in a class folder. None is opened at the start, since opening a million would take
    minutes: an unreadable one raises an error when it is first needed.
    """

    def __init__(self, root: str | Path, image_size: int):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"folder {root} does not exist; 'imagenet:PATH' needs ImageNet's 1,000 class folders")
        self.root = root / "train" if (root / "train").is_dir() else root
        classes = synsets()
        _check_folders(self.root, classes)
        names: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(tqdm(classes, desc="listing", unit="class", leave=False, delay=2)):
            found = find_pictures(self.root / name, recursive=False)
            names += [f"{name}/{file}" for file in found]
            labels += [label] * len(found)
        self.paths = PictureFiles(self.root, names)
        super().__init__(image_size, 3, labels, classes)

    def pixels(self, index: int) -> Tensor:
        return read_pixels(self.paths[index], self.paths[index], self.image_size)


def _check_folders(root: Path, expected: list[str]) -> None:
    found = set(subfolders(root))
    missing, surplus = sorted(set(expected) - found), sorted(found - set(expected))
    if missing or surplus:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("surplus", surplus))
            if names
        ]
        raise InputError(f"folder {root} does not hold the 1,000 class folders of ImageNet: {' and '.join(parts)}")
