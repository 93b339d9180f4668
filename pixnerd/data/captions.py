"""Images with captions or labels beside them: a folder of files with captions, or any number of webdataset shards.

Both are read by index, in any order, because the order of training is a function of (seed, step, position).
"""

import contextlib
import hashlib
import io
import itertools
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import make_folder, read_arrays, replacing
from .dataset import ImageDataset, cache_folder
from .pictures import (
    SUFFIXES,
    PictureFiles,
    check_header,
    check_headers,
    entries_of,
    find_pictures,
    in_threads,
    is_visible,
    read_pixels,
)

BLOCK = 512  # bytes; everything in a tar file starts at a multiple of it
MOST_CLASSES = 100_000  # that .cls files can tell apart; ImageNet-21k has 21,841


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
    """The pictures in a folder and its sub-folders, in alphabetical order, as class 0; see `pictures.find_pictures`.

    The captions of `cat.jpg` are the lines of `cat.txt` beside it, in upper or lower case. Every caption is read at the
    start, so that a bad file is found before training begins.
    """

    def __init__(self, root: str | Path, image_size: int):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"folder {root} does not exist; 'captions:PATH' needs images with a .txt file beside each")
        self.paths = PictureFiles(root, find_pictures(root))
        super().__init__(image_size, 3, *_one_class(len(self.paths)))
        texts = _texts_beside(self.paths)
        self.captions = list(in_threads(_read_captions, texts, "reading captions", "file"))
        without = [path for path, captions in zip(self.paths, self.captions, strict=True) if not captions]
        if without:
            raise InputError(
                f"{len(without)} of {len(self.paths)} images in {root} have no caption (a .txt file beside them "
                f"that is not empty), the first is {without[0]}"
            )

    def check(self) -> None:
        """Raise InputError if a file's header is not that of a picture."""
        check_headers(self.paths)

    def pixels(self, index: int) -> Tensor:
        return read_pixels(self.paths[index], self.paths[index], self.image_size)


def _texts_beside(images: Sequence[Path]) -> list[Path | None]:
    """Each image's .txt file, of the same name but for upper and lower case; None if it has none."""
    found: dict[tuple[Path, str], list[str]] = {}
    for folder in {image.parent for image in images}:
        for entry in entries_of(folder):
            if entry.name.lower().endswith(".txt") and entry.is_file():
                found.setdefault((folder, entry.name.lower()), []).append(entry.name)
    texts: list[Path | None] = []
    for image in images:
        exact = image.with_suffix(".txt").name
        names = found.get((image.parent, exact.lower()), [])
        # on a disk that keeps Cat.txt and cat.txt apart, the one that is most like the image's name
        nearest = sorted(names, key=lambda name: (name != exact, os.path.splitext(name)[0] != image.stem, name))
        texts.append(image.with_name(nearest[0]) if nearest else None)
    return texts


def _read_captions(path: Path | None) -> tuple[str, ...]:
    """The captions in a .txt file; empty if there is none. Raises InputError if it cannot be read."""
    if path is None:
        return ()
    try:
        return split_captions(path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


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
    """Where the image and the text of every sample lie in the shards, and its label; 40 bytes per sample.

    A shard is scanned once; its index is kept under data/shards until the shard's size or modification time changes.
    """

    def __init__(self, shards: Sequence[Path]):
        self.shards = shards
        found = list(in_threads(_index, shards, "indexing", "shard"))  # for each shard [samples, 5]
        self._ends = np.cumsum([len(rows) for rows in found])  # [shards]
        self._rows = np.concatenate(found)  # [len(self), 5]

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Member:
        return self._member(index, 0)

    def text(self, index: int) -> Member:
        return self._member(index, 2)

    @property
    def labels(self) -> np.ndarray | None:
        """[len(self)], or None if no sample has a label. Raises InputError if only some have."""
        labels = self._rows[:, 4]
        return labels if self._all_have(labels >= 0, ".cls") else None

    @property
    def have_captions(self) -> bool:
        """Whether the samples have captions. Raises InputError if only some have."""
        return self._all_have(self._rows[:, 3] > 0, ".txt")

    def _all_have(self, has: np.ndarray, suffix: str) -> bool:
        if has.any() and not has.all():
            without = int(np.argmin(has))
            raise InputError(
                f"{len(has) - has.sum()} of {len(has)} samples have no {suffix}, the first is {self.image(without)}; "
                f"all need a {suffix}, or none"
            )
        return bool(has.any())

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
    """The samples of a folder's .tar files, shards in alphabetical order, with captions, with labels or with both.

    A sample is defined as in webdataset: consecutive members with the same key, which is everything before the first
    dot of the base name. One of them is an image; a .txt has a caption on each line; a .cls has the label, a whole
    number, without which the class is 0. Others, like .json, are ignored. Every caption, every label and every image's
    header is checked when a shard is first opened.
    """

    def __init__(self, root: str | Path, image_size: int):
        root = Path(root)
        entries = entries_of(root) if root.is_dir() else []
        shards = [root / entry.name for entry in entries if entry.name.lower().endswith(".tar")]
        if not shards:
            raise InputError(f"{root} is not a folder with .tar files, which 'shards:PATH' needs")
        self._samples = Samples(shards)
        if not len(self._samples):
            raise InputError(f"the .tar files in {root} hold no samples (an image and a .txt or .cls of the same name)")
        labels = self._samples.labels
        if labels is None:
            super().__init__(image_size, 3, *_one_class(len(self._samples)))
        else:
            super().__init__(image_size, 3, labels, [str(label) for label in range(labels.max() + 1)])
        if self._samples.have_captions:
            self.captions = ShardCaptions(self._samples)

    def pixels(self, index: int) -> Tensor:
        image = self._samples.image(index)
        return read_pixels(io.BytesIO(image.read()), image, self.image_size)


def _index(shard: Path) -> np.ndarray:
    """int64 [samples, 5]: offset and size of the image, offset and size of the text or zeros, label or −1."""
    try:
        state = shard.stat()
    except OSError as error:
        raise InputError(f"{shard} cannot be read: {error}") from error
    stamp = np.array([state.st_size, state.st_mtime_ns])
    kept = cache_folder() / "shards" / f"{hashlib.sha256(os.fsencode(shard.resolve())).hexdigest()[:16]}.npz"
    with contextlib.suppress(InputError):  # there is none, or it is damaged
        found = read_arrays(kept, ("stamp", "samples"))  # an earlier version, which did not read labels, had others
        if np.array_equal(found.get("stamp"), stamp) and _is_index(found.get("samples")):
            return found["samples"]
    rows = _scan(shard)
    make_folder(kept.parent)
    with replacing(kept) as partial:
        np.savez(partial, stamp=stamp, samples=rows)
    return rows


def _is_index(samples: np.ndarray | None) -> bool:
    return samples is not None and samples.dtype == np.int64 and samples.ndim == 2 and samples.shape[1] == 5


def _scan(shard: Path) -> np.ndarray:
    """int64 [samples, 5], found by scanning the shard. Raises InputError if a sample is incomplete or unreadable."""
    try:
        with tarfile.open(shard, "r:") as tar:
            files = [(*found.groups(), member) for member in tar if (found := _file_of_sample(member))]
            # tarfile takes a broken or missing header for the end; a complete file ends with a block of zeros
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")
            rows = [
                _row(shard, tar, key, [(f".{extension.lower()}", member) for _, extension, member in group])
                for key, group in itertools.groupby(files, key=lambda file: file[0])
            ]
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{shard} cannot be read as an uncompressed tar file: {error}") from error
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def _row(
    shard: Path, tar: tarfile.TarFile, key: str, members: Sequence[tuple[str, tarfile.TarInfo]]
) -> tuple[int, int, int, int, int]:
    """A sample's row of the index, from its members by suffix. Raises InputError if it is incomplete or unreadable."""
    images = [member for suffix, member in members if suffix in SUFFIXES]
    texts, labels = ([member for suffix, member in members if suffix == kind] for kind in (".txt", ".cls"))
    if len(images) != 1 or max(len(texts), len(labels)) != 1:
        raise InputError(
            f"{shard}: sample {key} has {len(images)} images ({', '.join(SUFFIXES)}) and "
            f"{len(texts)} .txt; it needs one image with a .txt, a .cls (it has {len(labels)}) or one of each"
        )
    (image,) = images
    check_header(tar.extractfile(image), f"{shard}: {image.name}")
    where, label = (0, 0), -1
    for text in texts:
        if not split_captions(tar.extractfile(text).read(), f"{shard}: {text.name}"):
            raise InputError(f"{shard}: {text.name} is empty; it needs at least one caption")
        where = text.offset_data, text.size
    for member in labels:
        word = tar.extractfile(member).read(80).strip()
        if not re.fullmatch(rb"\d{1,9}", word) or int(word) >= MOST_CLASSES:
            found = word.decode(errors="replace")
            raise InputError(f"{shard}: {member.name} is {found!r}; a label is a whole number below {MOST_CLASSES:,}")
        label = int(word)
    return image.offset_data, image.size, *where, label


def _file_of_sample(member: tarfile.TarInfo) -> re.Match[str] | None:
    """Key and extension as webdataset splits a name; None for folders and for hidden files and those without either."""
    *folders, _ = member.name.split("/")
    if not member.isfile() or not all(is_visible(folder) for folder in folders if folder != "."):
        return None
    return re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name)
