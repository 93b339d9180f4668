"""Picture files: which files count as pictures, and the one way in which their pixels are read.

Every data set made of files, and evaluation on folders of pictures, come through here.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp", ".gif", ".jfif", ".tif", ".tiff")  # in any case
# the contents decide, since ImageNet has a PNG named .JPEG; of Pillow's other formats some start other programs
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
NARROWEST = 32  # sides; of a longer and narrower picture only the middle is read
AT_ONCE = 4096  # tasks that wait in a pool of threads; each takes over a kilobyte

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # a photo of 100 megapixels is none


# --- files ---------------------------------------------------------------------------------------------------------


class PictureFiles(Sequence[Path]):
    """The pictures in a folder and its sub-folders, sorted by path.

    Names are kept in one array, which worker processes share; a million Python strings would be copied into each.
    """

    def __init__(self, root: Path, names: Sequence[str]):
        self.root, self._names = root, np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.root / os.fsdecode(self._names[index])


def is_visible(name: str) -> bool:
    """Whether a file or folder is the user's own: not hidden (.DS_Store, ._cat.jpg), not __MACOSX."""
    return not name.startswith(".") and name != "__MACOSX"


def is_picture(name: str) -> bool:
    """Whether a file's name says that it is a picture."""
    return is_visible(os.path.basename(name)) and os.path.splitext(name)[1].lower() in SUFFIXES


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """The visible files and folders in a folder, sorted by name. Raises InputError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if is_visible(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be read: {error.strerror}") from error


def subfolders(folder: Path) -> list[str]:
    """The names of the visible folders in a folder, sorted. Raises InputError if it cannot be read."""
    return [entry.name for entry in entries_of(folder) if entry.is_dir()]


def find_pictures(folder: Path, recursive: bool = True) -> list[str]:
    """The paths of the pictures in a folder, relative to it, sorted by their parts; links to folders are not followed.

    Raises:
        InputError: there are none, one is a link to nothing, or a folder cannot be read.
    """
    found, left = [], [""]
    while left:
        below = left.pop()
        for entry in entries_of(folder / below):
            name = os.path.join(below, entry.name)
            if entry.is_dir():
                if recursive and not entry.is_symlink():
                    left.append(name)
            elif is_picture(name):
                if entry.is_file():
                    found.append(name)
                elif entry.is_symlink():
                    raise InputError(f"{folder / name} is a link to a file that does not exist")
    if not found:
        raise InputError(f"folder {folder} holds no images ({', '.join(SUFFIXES)})")
    return sorted(found, key=lambda name: name.split(os.sep))


def in_threads(work: Callable[[Any], Any], items: Sequence[Any], what: str, unit: str) -> Iterator[Any]:
    """work(item) for every item, in order, computed by threads, with a bar once it takes two seconds."""
    with (
        ThreadPoolExecutor() as pool,
        tqdm(desc=what, total=len(items), unit=unit, leave=False, delay=2) as bar,
    ):
        for start in range(0, len(items), AT_ONCE):
            for result in pool.map(work, (items[i] for i in range(start, min(start + AT_ONCE, len(items))))):
                yield result
                bar.update()


# --- pixels --------------------------------------------------------------------------------------------------------


def open_picture(source: Path | BinaryIO, name: object) -> Image.Image:
    """The picture, its pixels not read yet. Raises InputError unless the first bytes are those of a picture."""
    try:
        return Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image, despite its name") from error
    except Exception as error:
        raise _refusal(name, "cannot be opened", error) from error


def _refusal(name: object, what: str, error: Exception) -> InputError:
    """The sentence for a picture that Pillow refuses; a damaged one makes it raise almost anything."""
    if isinstance(error, InputError):
        return InputError(f"{name} {error}")
    if isinstance(error, Image.DecompressionBombError):
        return InputError(f"{name} {what}: it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which is the limit")
    return InputError(f"{name} {what}: {str(error) or type(error).__name__}")


def check_header(source: Path | BinaryIO, name: object) -> None:
    """Raise an InputError that mentions `name` unless the first bytes are those of an image."""
    open_picture(source, name).close()


def check_headers(paths: PictureFiles) -> None:
    """Raise an InputError that names the first file whose header is not that of a picture."""
    for _ in in_threads(lambda path: check_header(path, path), paths, "checking", "image"):
        pass


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, after the rotation that EXIF asks for. Raises InputError if they cannot be read."""
    with open_picture(path, path) as image:
        try:
            if image.format == "TIFF":  # Pillow turns it when it reads the pixels
                image.load()
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except Exception as error:
            raise _refusal(path, "cannot be read as an image", error) from error
        return image.size[::-1] if turned else image.size


def read_pixels(source: Path | BinaryIO, name: object, size: int | None = None) -> Tensor:
    """A picture, or the first of several in its file, as uint8 [3, size, size], or [3, H, W] without a size.

    It is turned upright by its EXIF tag, converted to RGB by `to_rgb` and cropped by `center_crop`.

    Raises:
        InputError: `name` cannot be decoded, or is larger than Pillow's limit.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if size is None:
                pixels = to_rgb(image)
            else:
                pixels = center_crop(to_rgb(_middle(image)), size)
            return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    except Exception as error:
        raise _refusal(name, "cannot be read as an image", error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit values divided by 257, floats of 0 … 1 multiplied by 255, transparent pixels put on white.

    Raises:
        InputError: the values are integers or floats of unknown range.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":  # I;16 and its byte orders, I, F; Pillow's own conversion would clip them to 255
        image = _to_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A grey picture of mode I;16, I or F as L, or as LA if one of its values stands for transparent."""
    values = np.array(image)
    highest = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= highest):  # this form is true for NaN, too
        raise InputError(
            f"has grey values from {values.min()} to {values.max()}; as {image.mode} they have to lie in 0 … {highest}"
        )
    grey = Image.fromarray(np.rint(values * (255 / highest)).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _middle(image: Image.Image) -> Image.Image:
    """The picture, or the middle of its long side if that is over NARROWEST short ones: enlarging takes memory."""
    longest = NARROWEST * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


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
