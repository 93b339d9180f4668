"""A data set cropped once and kept as plain pixels, so that training neither decodes nor crops.

The images are stored in shards, `00000.npy`, `00001.npy`, …, each uint8 [images, C, S, S], uncompressed: about twice
the bytes of PNG, read in a thirtieth of the time. `00000.json` beside each has its sha256 and the skipped images;
`manifest.json`, written last, has what reading needs.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..differences import differences
from ..errors import InputError, WriteError
from ..files import (
    LOCK,
    hold,
    is_partial,
    make_folder,
    read_json,
    remove_partial_files,
    replacing,
    write_atomically,
)
from .dataset import ImageDataset
from .loading import fetched

SHARD_IMAGES = 1024  # at most, so that an interruption loses little
SHARD_BYTES = 2**28  # at most: each process holds one shard in memory while writing it
FEW = 16  # images of a short last shard that may all be bad; with more of them a disk has gone
MANIFEST, PLAN, SKIPPED = "manifest.json", "plan.json", "skipped.txt"


# --- reading -------------------------------------------------------------------------------------------------------


class Prepared(ImageDataset):
    """The images that `prepare` kept, in the source's order, with the source's labels and classes.

    Every shard's length is checked at the start; `verify` checks all bytes.
    """

    def __init__(self, root: str | Path, image_size: int):
        self.root = Path(root)
        manifest = _read_manifest(self.root)
        self.source, size = manifest["source"], manifest["image_size"]
        if image_size != size:
            raise InputError(
                f"{self.root} was prepared at {size}x{size}, not at {image_size}x{image_size}: ask for image size "
                f"{size}, or prepare {self.source} again in another folder"
            )
        super().__init__(size, manifest["channels"], manifest["labels"], manifest["classes"])
        self._shards = manifest["shards"]  # file, images, bytes, sha256 of each
        for shard in self._shards:
            path = self.root / shard["file"]
            if not path.is_file():
                raise InputError(f"{path} is missing; preparing {self.source} again restores it")
            if path.stat().st_size != shard["bytes"]:
                raise InputError(
                    f"{path} has {path.stat().st_size} bytes instead of {shard['bytes']}; preparing {self.source} "
                    "again replaces it"
                )
        self._ends = np.cumsum([shard["images"] for shard in self._shards])  # [shards]

    def pixels(self, index: int) -> Tensor:
        index = range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, side="right"))
        path = self.root / self._shards[number]["file"]
        shape = (self.channels, self.image_size, self.image_size)
        image_bytes = math.prod(shape)
        start = self._shards[number]["bytes"] - (int(self._ends[number]) - index) * image_bytes
        try:
            # not a memory map: a disk error would kill the process, and pickle would copy the entire map
            values = np.fromfile(path, np.uint8, count=image_bytes, offset=start)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if len(values) < image_bytes:
            raise InputError(f"{path} has become shorter since it was written")
        return torch.from_numpy(values).view(shape)

    def verify(self) -> None:
        """Read all shards. Raises InputError naming the first whose sha256 differs from the manifest's."""
        with ThreadPoolExecutor() as pool:
            digests = pool.map(_sha256, [self.root / shard["file"] for shard in self._shards])
            bar = tqdm(digests, desc="checking", total=len(self._shards), unit="shard", leave=False, delay=2)
            for shard, digest in zip(self._shards, bar, strict=True):
                if digest != shard["sha256"]:
                    raise InputError(
                        f"{self.root / shard['file']} is damaged (its sha256 differs): remove it and prepare "
                        f"{self.source} again, which restores it"
                    )


def _read_manifest(root: Path) -> dict[str, Any]:
    if not (root / MANIFEST).is_file():
        if (root / PLAN).is_file():
            raise InputError(f"{root} is not finished: the same `pixnerd prepare` command resumes it")
        raise InputError(f"{root} holds no {MANIFEST}; 'prepared:PATH' needs a folder that `pixnerd prepare` wrote")
    manifest = read_json(root / MANIFEST, "the manifest of a prepared copy")
    needed = {"source", "image_size", "channels", "classes", "labels", "shards"} - manifest.keys()
    if needed:
        raise InputError(f"{root / MANIFEST} is not one of `pixnerd prepare`: it lacks {', '.join(sorted(needed))}")
    try:
        _check_manifest(**{name: manifest[name] for name in ("image_size", "channels", "classes", "labels", "shards")})
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError(f"{root / MANIFEST} is not one of `pixnerd prepare`, or is damaged: {error}") from error
    return manifest


def _check_manifest(image_size: int, channels: int, classes: list[str], labels: list[int], shards: list[Any]) -> None:
    """Raise a ValueError, or what wrong types raise, unless the entries of a manifest fit each other."""
    numbers = [image_size, channels, *(shard[name] for shard in shards for name in ("images", "bytes"))]
    if not all(type(number) is int and number > 0 for number in numbers):  # JSON's true is an int to isinstance
        raise ValueError("a size or a number of images or bytes is no positive whole number")
    image_bytes = channels * image_size * image_size
    for shard in shards:
        if shard["bytes"] - shard["images"] * image_bytes < 0 or not isinstance(shard["sha256"], str):
            raise ValueError(f"{shard['file']} is too short for its images")
        if shard["file"] != Path(shard["file"]).name:
            raise ValueError(f"{shard['file']} is not the name of a file beside it")
    images = sum(shard["images"] for shard in shards)
    if channels not in (1, 3) or not shards or images != len(labels):
        raise ValueError(f"it has {len(labels)} labels for {images} images with {channels} channels")
    if not all(type(label) is int and 0 <= label < len(classes) for label in labels):
        raise ValueError(f"a label is not one of 0 … {len(classes) - 1}")
    if not all(isinstance(name, str) for name in classes):
        raise ValueError("a class is not a name")


# --- writing -------------------------------------------------------------------------------------------------------


class Shards(Dataset):
    """Indexing with i writes shard number i and returns how many source images it covers.

    An error that stops the work is returned as a value: a worker process would wrap a raised error in a traceback.
    """

    def __init__(self, source: ImageDataset, folder: Path):
        self.source, self.folder = source, folder
        self.image_shape = (source.channels, source.image_size, source.image_size)
        self.image_bytes = math.prod(self.image_shape)
        self.images = max(1, min(SHARD_IMAGES, SHARD_BYTES // self.image_bytes))  # source images per full shard

    def __len__(self) -> int:
        return -(-len(self.source) // self.images)

    def indices(self, number: int) -> range:
        """The source's images that belong in shard `number`."""
        return range(number * self.images, min((number + 1) * self.images, len(self.source)))

    def record(self, number: int) -> dict[str, Any] | None:
        """file, images, bytes, sha256, skipped ([index, sentence] each) of a finished shard; None if unfinished."""
        path = self._path(number)
        try:
            record = read_json(path.with_suffix(".json"), "the record of a shard")
            skipped = [(int(index), str(sentence)) for index, sentence in record["skipped"]]
            complete = record["images"] == len(self.indices(number)) - len(skipped) and record["file"] == path.name
            is_whole = complete and isinstance(record["sha256"], str) and path.stat().st_size == record["bytes"]
        except (OSError, KeyError, TypeError, ValueError):  # missing, damaged or half of one: it is written again
            return None
        return record if is_whole else None

    def __getitem__(self, number: int) -> int | InputError:
        indices, path = self.indices(number), self._path(number)
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        skipped: list[tuple[int, str]] = []
        for index in indices:
            try:
                images[index - indices.start - len(skipped)] = self.source.pixels(index).numpy()
            except InputError as error:
                skipped.append((index, str(error)))
        kept = len(indices) - len(skipped)
        if not kept and not (len(indices) <= FEW and len(indices) < min(self.images, len(self.source))):
            return InputError(f"none of the images {indices[0]} to {indices[-1]} can be read: {skipped[0][1]}")
        try:
            with replacing(path) as partial:
                np.save(partial, images[:kept])
            record = {"file": path.name, "images": kept, "bytes": path.stat().st_size, "sha256": _sha256(path)}
            write_atomically(path.with_suffix(".json"), json.dumps({**record, "skipped": skipped}) + "\n")
        except WriteError as error:
            return error
        return len(indices)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.npy"


class Copy(NamedTuple):
    """The result of `prepare`."""

    images: Prepared
    kept: Tensor  # [len(images)] the index of each image in the source
    skipped: list[str]  # a sentence for each image that could not be read


def prepare(source: ImageDataset, name: str, folder: Path, workers: int) -> Copy:
    """Write `source`, the data set called `name`, to `folder`, or resume what an earlier call began there.

    Finished shards stay as they are; for a finished copy the call checks every byte instead. Images that cannot be read
    are left out and listed in skipped.txt.

    Args:
        workers: processes that read and crop; 0 uses this one.

    Raises:
        InputError: `source` has captions, `folder` holds something else, is damaged or is being written by another
            process, the disk is too small or fails.
    """
    if source.captions:
        raise InputError(f"data set {name!r} has captions, which a prepared copy does not keep")
    if workers < 0:
        raise InputError(f"workers is {workers}; it cannot be negative")
    shards = Shards(source, folder)
    _check_folder(shards, name)
    make_folder(folder)
    lock = hold(folder, "is being prepared by another process: wait for its end, or choose another folder")
    try:
        _check_folder(shards, name)  # another process may have begun meanwhile
        return _write(shards, name, workers)
    finally:
        lock.release()


def _write(shards: Shards, name: str, workers: int) -> Copy:
    """Write the plan, the shards that are not finished, and the manifest."""
    source, folder = shards.source, shards.folder
    remove_partial_files(folder)
    write_atomically(folder / PLAN, json.dumps(_plan(shards, name), indent=2) + "\n")
    todo = [number for number in range(len(shards)) if shards.record(number) is None]
    left = sum(len(shards.indices(number)) for number in todo)
    needed, free = left * shards.image_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder} needs {needed / 1e9:.1f} GB more, and its disk has {free / 1e9:.1f} GB left")
    written = DataLoader(shards, batch_size=None, sampler=todo, num_workers=min(workers, len(todo)))
    with tqdm(desc="preparing", total=len(source), initial=len(source) - left, unit="image", mininterval=1) as bar:
        for done in fetched(written) if workers else written:
            if isinstance(done, InputError):
                raise done
            bar.update(done)
    copy = _finish(shards, name)
    if not todo:
        copy.images.verify()
    return copy


def _check_folder(shards: Shards, name: str) -> None:
    """Raise InputError unless the folder is free for the copy, or holds it."""
    folder, path = shards.folder, shards.folder / PLAN
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; the output has to be a folder")
    if path.is_file():
        found = differences(read_json(path, "the plan of a prepared copy"), _plan(shards, name))
        differ = [f"{d.name} {d.old} there, {d.new} asked for" for d in found]
        if differ:
            raise InputError(f"{folder} already holds another copy ({'; '.join(differ)}): choose another folder")
    elif folder.is_dir() and any(file.name != LOCK and not is_partial(file) for file in folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no prepared copy: choose another folder")


def _plan(shards: Shards, name: str) -> dict[str, Any]:
    """What tells a copy from others."""
    source = shards.source
    return {
        "source": name,
        "image size": source.image_size,
        "images": len(source),
        "images a shard": shards.images,
        "labels": hashlib.sha256(source.labels.numpy().tobytes()).hexdigest()[:16],
        "classes": hashlib.sha256(os.fsencode("\n".join(source.classes))).hexdigest()[:16],
    }


def _finish(shards: Shards, name: str) -> Copy:
    source, folder = shards.source, shards.folder
    records = [shards.record(number) for number in range(len(shards))]
    skipped = {index: sentence for record in records for index, sentence in record.pop("skipped")}
    kept = torch.tensor([index for index in range(len(source)) if index not in skipped])
    manifest = {
        "source": name,
        "image_size": source.image_size,
        "channels": source.channels,
        "images": len(kept),
        "skipped": len(skipped),
        "versions": {package: importlib.metadata.version(package) for package in ("pixnerd", "pillow", "numpy")},
        "shards": [record for record in records if record["images"]],
        "classes": source.classes,
        "labels": source.labels[kept].tolist(),
    }
    lines = "".join(f"{sentence}\n" for sentence in skipped.values())
    write_atomically(folder / SKIPPED, lines.encode(errors="backslashreplace").decode())  # names need not be UTF-8
    write_atomically(folder / MANIFEST, json.dumps(manifest) + "\n")
    return Copy(Prepared(folder, source.image_size), kept, list(skipped.values()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- measuring -----------------------------------------------------------------------------------------------------


class Speeds(NamedTuple):
    """Images read per second by one process."""

    images: int  # read from each
    source: float
    copy: float
    machine: str

    def __str__(self) -> str:
        return (
            f"reading {self.images} random images in one process on {self.machine}: source {self.source:.0f} images/s, "
            f"copy {self.copy:.0f} images/s, {self.copy / self.source:.1f} times as fast"
        )


def read_speeds(source: ImageDataset, copy: Copy, images: int = 200) -> Speeds:
    """How fast random images are read from source and copy, whatever the file cache happens to hold.

    Raises:
        InputError: an image of the copy differs from the source's, so the source has changed.
    """
    chosen = torch.randperm(len(copy.kept), generator=torch.Generator().manual_seed(0))[:images]
    seconds = np.zeros(2)
    for block in chosen.split(20):  # alternating, since a machine may become busier; in blocks, as a batch is read
        begin = time.perf_counter()
        originals = [source.pixels(index) for index in copy.kept[block].tolist()]
        between = time.perf_counter()
        kept = [copy.images.pixels(index) for index in block.tolist()]
        seconds += between - begin, time.perf_counter() - between
        for index, original, copied in zip(block.tolist(), originals, kept, strict=True):
            if not original.equal(copied):
                raise InputError(
                    f"image {index} of {copy.images.root} is no longer that of {copy.images.source}: "
                    "prepare the data set again in another folder"
                )
    speeds = len(chosen) / seconds
    return Speeds(len(chosen), float(speeds[0]), float(speeds[1]), machine())


def machine() -> str:
    """Cores and processor of this machine, as far as the system reports them."""
    about = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", about.read_text(), re.MULTILINE) if about.is_file() else None
    return f"{os.cpu_count()} cores of {named[1] if named else platform.machine()}"
