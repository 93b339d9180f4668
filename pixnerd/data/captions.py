"""Images with captions, for text-to-image training: a folder of files, or any number of webdataset shards.

Both are read by index, in any order, because the order of training is a function of (seed, step, position).
"""

import hashlib
import io
import itertools
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..files import replacing
from .dataset import ImageDataset, cache_folder
from .folder import SUFFIXES, check_header, read_pixels

BLOCK = 512  # bytes; everything in a tar file starts at a multiple of it


def _one_class(images: int) -> tuple[Tensor, list[str]]:
    """Label 0 for every image, stored only once, and the class names."""
    return torch.zeros(1, dtype=torch.long).expand(images), ["image"]


def split_captions(text: bytes, name: object) -> tuple[str, ...]:
    """The captions in a .txt file: its non-empty lines, the plainest first.

    Raises:
        InputError: `name` is not UTF-8.
    """
    try:
        lines = text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not text in UTF-8: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


# --- a folder ------------------------------------------------------------------------------------------------------


class CaptionFolder(ImageDataset):
    """The .bmp, .jpeg, .jpg, .png and .webp files in a folder and its sub-folders, in alphabetical order, as class 0.

    The captions of `cat.jpg` are the lines of `cat.txt` beside it. Every caption is read and every image's header
    checked at the start, so that a bad file is found before training begins.
    """

    def __init__(self, root: str | Path, image_size: int):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"folder {root} does not exist; 'captions:PATH' needs images with a .txt file beside each")
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise InputError(f"folder {root} holds no images ({', '.join(sorted(SUFFIXES))})")
        super().__init__(image_size, 3, *_one_class(len(self.paths)))
        with ThreadPoolExecutor() as pool:
            self.captions = list(pool.map(_captions_beside, self.paths))
            without = [path for path, captions in zip(self.paths, self.captions, strict=True) if not captions]
            if without:
                raise InputError(
                    f"{len(without)} of {len(self.paths)} images in {root} have no caption (a .txt file beside them "
                    f"that is not empty), the first is {without[0]}"
                )
            list(pool.map(check_header, self.paths, self.paths))

    def pixels(self, index: int) -> Tensor:
        return read_pixels(self.paths[index], self.paths[index], self.image_size)


def _captions_beside(image: Path) -> tuple[str, ...]:
    """The captions of an image; empty if the .txt file is missing."""
    path = image.with_suffix(".txt")
    return split_captions(path.read_bytes(), path) if path.is_file() else ()


# --- webdataset shards ---------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A file inside a shard; str() gives its name, `shard.tar: member`."""

    shard: Path
    offset: int  # of its first byte in the shard
    size: int  # bytes

    def read(self) -> bytes:
        """All bytes; the shard is opened anew each time, so that processes share no file position and none stays open.

        Raises:
            InputError: the shard cannot be read, or has become shorter.
        """
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise InputError(f"{self.shard} cannot be read: {error}") from error
        if len(content) < self.size:
            raise InputError(f"{self.shard} has become shorter since it was indexed")
        return content

    def __str__(self) -> str:
        try:
            with tarfile.open(self.shard, "r:") as tar:
                name = next((member.name for member in tar if member.offset_data == self.offset), None)
        except (OSError, tarfile.TarError):
            name = None
        return f"{self.shard}: {name or f'the file at byte {self.offset}'}"


class Samples:
    """Where the image and the text of every sample lie in the shards; 32 bytes per sample.

    A shard is scanned once; its index is kept under data/shards until the shard's size or modification time changes.
    """

    def __init__(self, shards: Sequence[Path]):
        self.shards = shards
        with ThreadPoolExecutor() as pool:
            indexed = pool.map(_index, shards)
            # for each shard [samples, 4]
            found = list(tqdm(indexed, desc="indexing", total=len(shards), unit="shard", leave=False, delay=2))
        self._ends = np.cumsum([len(rows) for rows in found])  # [shards]
        self._rows = np.concatenate(found)  # [len(self), 4]

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Member:
        return self._member(index, 0)

    def text(self, index: int) -> Member:
        return self._member(index, 2)

    def _member(self, index: int, column: int) -> Member:
        index = range(len(self))[index]
        offset, size = self._rows[index, column : column + 2].tolist()
        return Member(self.shards[np.searchsorted(self._ends, index, side="right")], offset, size)


class ShardCaptions(Sequence[tuple[str, ...]]):
    """The captions of every sample, read on demand."""

    def __init__(self, samples: Samples):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[str, ...]:
        text = self._samples.text(index)
        return split_captions(text.read(), text)


class CaptionShards(ImageDataset):
    """The samples of a folder's .tar files, shards in alphabetical order, as class 0.

    A sample is defined as in webdataset: consecutive members with the same key, which is everything before the first
    dot of the base name. One of them is an image (.bmp, .jpeg, .jpg, .png, .webp), one a .txt with a caption on each
    line; others, like .json, are ignored. Every caption and every image's header is checked when a shard is first
    opened.
    """

    def __init__(self, root: str | Path, image_size: int):
        root = Path(root)
        shards = sorted(root.glob("*.tar")) if root.is_dir() else []
        if not shards:
            raise InputError(f"{root} is not a folder with .tar files, which 'shards:PATH' needs")
        self._samples = Samples(shards)
        if not len(self._samples):
            raise InputError(f"the .tar files in {root} hold no samples (an image and a .txt of the same name)")
        super().__init__(image_size, 3, *_one_class(len(self._samples)))
        self.captions = ShardCaptions(self._samples)

    def pixels(self, index: int) -> Tensor:
        image = self._samples.image(index)
        return read_pixels(io.BytesIO(image.read()), image, self.image_size)


def _index(shard: Path) -> np.ndarray:
    """int64 [samples, 4]: offset and size of the image, offset and size of the text."""
    try:
        state = shard.stat()
    except OSError as error:
        raise InputError(f"{shard} cannot be read: {error}") from error
    stamp = np.array([state.st_size, state.st_mtime_ns])
    kept = cache_folder() / "shards" / f"{hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:16]}.npz"
    if kept.is_file():
        with np.load(kept) as file:
            if np.array_equal(file["stamp"], stamp):
                return file["rows"]
    rows = _scan(shard)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replacing(kept) as partial:
        np.savez(partial, stamp=stamp, rows=rows)
    return rows


def _scan(shard: Path) -> np.ndarray:
    """int64 [samples, 4], found by scanning the shard. Raises InputError if a sample is incomplete or unreadable."""
    rows = []
    try:
        with tarfile.open(shard, "r:") as tar:
            files = [(*found.groups(), member) for member in tar if (found := _file_of_sample(member))]
            # tarfile takes a broken or missing header for the end; a complete file ends with a block of zeros
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")
            for key, group in itertools.groupby(files, key=lambda file: file[0]):
                members = [(f".{extension.lower()}", member) for _, extension, member in group]
                images = [member for suffix, member in members if suffix in SUFFIXES]
                texts = [member for suffix, member in members if suffix == ".txt"]
                if (len(images), len(texts)) != (1, 1):
                    raise InputError(
                        f"{shard}: sample {key} has {len(images)} images ({', '.join(sorted(SUFFIXES))}) and "
                        f"{len(texts)} .txt; it needs one of each"
                    )
                (image,), (text,) = images, texts
                check_header(tar.extractfile(image), f"{shard}: {image.name}")
                if not split_captions(tar.extractfile(text).read(), f"{shard}: {text.name}"):
                    raise InputError(f"{shard}: {text.name} is empty; it needs at least one caption")
                rows.append((image.offset_data, image.size, text.offset_data, text.size))
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{shard} cannot be read as an uncompressed tar file: {error}") from error
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _file_of_sample(member: tarfile.TarInfo) -> re.Match[str] | None:
    """Key and extension as webdataset splits a name; None for folders and for names without either, like `.hidden`."""
    return re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name) if member.isfile() else None
