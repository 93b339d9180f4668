"""Images to measure, batch by batch: from sample files, folders of pictures, runs or data sets.

Dimension letters: N images of H × W pixels, B of a batch.
"""

import contextlib
import functools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import data
from ..data.loading import fetched
from ..data.pictures import PictureFiles, find_pictures, in_threads, read_pixels, upright_size
from ..errors import InputError
from ..files import content_hash, folder_hash, reachable


@dataclass(frozen=True)
class Images:
    """A number of images that can be read in order, any number of times."""

    count: int
    read: Callable[[int, Sequence[int]], Iterator[Tensor]]
    """(batch size, numbers of batches in ascending order) → these batches, and no others are read"""
    in_memory: bool = True
    """False: decoding takes time, which worker processes can share"""

    def batches(self, batch_size: int, numbers: Sequence[int] | None = None, workers: int = 0) -> Iterator[Tensor]:
        """Consecutive batches uint8 [B, 3, H, W], at the images' own size; of `numbers`, only these batches."""
        numbers = range(-(-self.count // batch_size)) if numbers is None else numbers
        if self.in_memory or not workers:
            return self.read(batch_size, numbers)
        reader = BatchReader(self, batch_size)
        return map(_unless_error, fetched(DataLoader(reader, None, sampler=numbers, num_workers=workers)))


@dataclass(frozen=True)
class BatchReader(Dataset):
    """Batches by number, for worker processes; an InputError is returned, since a worker would add its traceback."""

    images: Images
    batch_size: int

    def __getitem__(self, number: int) -> Tensor | InputError:
        try:
            return next(self.images.read(self.batch_size, [number]))
        except InputError as error:
            return error


def _unless_error(batch: Tensor | InputError) -> Tensor:
    if isinstance(batch, InputError):
        raise batch
    return batch


def open_images(source: str | Path, image_size: int | None = None) -> Images:
    """The images of a .npz (`arr_0` uint8 [N, H, W, 3]), a run's folder, a folder of pictures, or a data set.

    Args:
        source: a path, or with `image_size` the name of a data set as in `data.load`, which comes first: of a folder
            that happens to have such a name, ./NAME is a path.
        image_size: side in pixels to which a data set's images and the pictures of a folder are cropped, as in ADM;
            without it a folder's pictures keep their size.

    Raises:
        InputError: the source has no images, or pictures of different sizes that are not cropped.
    """
    if image_size is not None and data.is_data_set(str(source)):
        dataset = data.open_data_set(str(source), image_size)  # a bad file is named when it is read
        return Images(len(dataset), functools.partial(_dataset_batches, dataset), in_memory=False)
    path = reachable(source)
    if path.suffix == ".npz":
        with _array(path) as (_, shape):
            return Images(shape[0], functools.partial(_npz_batches, path))
    if (path / "config.json").is_file() or (path / "samples.npz").is_file():
        if not (path / "samples.npz").is_file():
            raise InputError(f"{path} has no samples.npz: run `pixnerd sample {path}` first")
        return open_images(path / "samples.npz")
    if path.is_dir():
        files = PictureFiles(path, find_pictures(path))
        if image_size is None:
            _check_sizes(files)
        return Images(len(files), functools.partial(_file_batches, files, image_size), in_memory=False)
    raise InputError(f"{source} does not exist; images come from a .npz, a run, a folder of pictures or a data set")


def content_of(source: str | None) -> str | None:
    """What identifies the files behind images or weights, as 16 digits; None for what has no files here.

    Of a file this is its sha256; of a folder, a hash of every file's name, size and time of change.

    Args:
        source: a path, the name of a data set with its path, such as folder:PATH, or any other name.
    """
    name = source or ""
    path = reachable((data.path_in(name) or "") if data.is_data_set(name) else name)
    if not path.name or not path.exists():
        return None
    if (path / "config.json").is_file() and (path / "samples.npz").is_file():
        path = path / "samples.npz"  # of a run, whose other files change without being images
    return content_hash(path) if path.is_file() else folder_hash(path)


@contextlib.contextmanager
def _array(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int, int, int]]]:
    """A file at the first pixel of `arr_0`, and the shape [N, H, W, 3]."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, by_column, dtype = read_header(file)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or by_column:
                raise InputError(f"{path}: arr_0 is {dtype} of shape {shape}; it has to be uint8 [N, H, W, 3]")
            yield file, shape
    except InputError:  # a ValueError too, but already with a sentence
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise InputError(f"{path} is not a file of images: it has no readable arr_0") from error


def _npz_batches(path: Path, batch_size: int, numbers: Sequence[int]) -> Iterator[Tensor]:
    """Read as a stream: only one batch in memory, regardless of the file's size."""
    with _array(path) as (file, shape):
        count, *one = shape
        first, bytes_each = file.tell(), int(np.prod(one))
        for start in (number * batch_size for number in numbers):
            size = min(batch_size, count - start)
            file.seek(first + start * bytes_each)
            content = bytearray(file.read(size * bytes_each))
            if len(content) < size * bytes_each:
                raise InputError(f"{path} ends before its image {count}")
            yield torch.frombuffer(content, dtype=torch.uint8).view(size, *one).permute(0, 3, 1, 2)


def _check_sizes(files: PictureFiles) -> None:
    """Raise InputError unless all pictures have the size of the first, as their headers say."""
    width, height = upright_size(files[0])
    for file, size in zip(files, in_threads(upright_size, files, "checking", "image"), strict=True):
        _check_size(file, size[::-1], (height, width))


def _check_size(file: Path, size: Sequence[int], first: Sequence[int]) -> None:
    if tuple(size) != tuple(first):
        raise InputError(
            f"{file} has {tuple(size)} pixels, those before it {tuple(first)}; images to measure need one size. "
            "Photographs of any size can be the --reference, which is cropped to the size of the samples"
        )


def _file_batches(
    files: PictureFiles, image_size: int | None, batch_size: int, numbers: Sequence[int]
) -> Iterator[Tensor]:
    shape = None
    for start in (number * batch_size for number in numbers):
        pixels = []
        for file in files[start : start + batch_size]:
            pixels.append(read_pixels(file, file, image_size))
            shape = shape or pixels[0].shape
            _check_size(file, pixels[-1].shape[1:], shape[1:])
        yield torch.stack(pixels)


def _dataset_batches(dataset: data.ImageDataset, batch_size: int, numbers: Sequence[int]) -> Iterator[Tensor]:
    for start in (number * batch_size for number in numbers):
        pixels, _ = dataset.batch(range(start, min(start + batch_size, len(dataset))))
        yield pixels.expand(-1, 3, -1, -1)
