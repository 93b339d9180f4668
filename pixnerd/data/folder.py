"""A folder with one sub-folder per class, with images of any size: cropped and scaled as in ADM."""

from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from .dataset import ImageDataset
from .pictures import PictureFiles, check_headers, find_pictures, read_pixels, subfolders


class ImageFolder(ImageDataset):
    """Classes are the sub-folders in alphabetical order, images the pictures in them, see `pictures.find_pictures`."""

    def __init__(self, root: str | Path, image_size: int):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"folder {root} does not exist; 'folder:PATH' needs one sub-folder per class")
        classes = subfolders(root)
        if not classes:
            raise InputError(f"folder {root} has no sub-folders; 'folder:PATH' needs one sub-folder per class")
        names: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(tqdm(classes, desc="listing", unit="class", leave=False, delay=2)):
            found = find_pictures(root / name)
            names += [f"{name}/{path}" for path in found]
            labels += [label] * len(found)
        self.paths = PictureFiles(root, names)
        super().__init__(image_size, 3, labels, classes)

    def check(self) -> None:
        """Raise InputError if a file's header is not that of a picture; a million files take minutes."""
        check_headers(self.paths)

    def pixels(self, index: int) -> Tensor:
        return read_pixels(self.paths[index], self.paths[index], self.image_size)
