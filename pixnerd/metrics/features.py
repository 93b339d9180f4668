"""From images to the table of scores: features of sampled and real images, batch by batch, on all processes.

Dimension letters: N images, B of a batch, F features.
"""

import contextlib
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..distributed import World
from ..errors import InputError
from ..files import check_output_file, read_arrays, replacing, save_tensors, writing
from .images import Images, content_of, open_images
from .statistics import Moments, frechet_distance, inception_score, kernel_distance, precision_recall

REFERENCES = 10_000  # real images for precision, recall and KID, as in ADM's suite

Pooled = Callable[[Tensor], dict[str, Tensor]]  # uint8 images [B, 3, H, W] → features by name, [B, F] each


@dataclass
class Features:
    """What is kept of a set of images: a Gaussian of each feature, and the features of some images."""

    count: int
    gaussians: dict[str, tuple[Tensor, Tensor]]
    """by feature, "pool" and "spatial": mean [F] and covariance [F, F] over all images"""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """by feature, "pool" and "logits": [kept images, F], float32"""


def own_batches(images: Images, batch_size: int, world: World, workers: int = 0) -> Iterator[tuple[int, Tensor]]:
    """This process's share of the batches, each with the index of its first image; no other batch is read.

    `workers` processes read them, 0: this one.
    """
    numbers = range(world.rank, -(-images.count // batch_size), world.size)
    for number, batch in zip(numbers, images.batches(batch_size, numbers, workers), strict=True):
        yield number * batch_size, batch


def check_shared(count: int, batch_size: int, world: World) -> None:
    """Raise InputError unless every process gets a batch of so many images."""
    if -(-count // batch_size) < world.size:
        raise InputError(
            f"{count} images make too few batches of {batch_size} for {world.size} processes, each of which needs one: "
            "measure more images, or in smaller batches, or in fewer processes"
        )


@torch.no_grad()
def collect(
    pooled: Pooled, batches: Iterable[tuple[int, Tensor]], count: int, world: World, keep: int | None = None
) -> Features:
    """Features of batches (index of the first image, uint8 [B, 3, H, W]); every process calls it with its own batches.

    Memory grows only with the rows that are kept, 8 kB each, or 12 kB with logits. Features are computed in full
    float32, as those of the published figures, and their moments on the network's device.

    Args:
        pooled: a frozen network's features, see FrozenNetwork.pooled.
        batches: this process's batches, at least one, see `check_shared`.
        count: number of images in all processes.
        keep: number of images whose rows are kept, chosen at random but always the same; None: all.
    """
    chosen = torch.arange(count)
    if keep is not None and keep < count:
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:keep].sort().values
    moments: dict[str, Moments] = {}
    rows: dict[str, Tensor] = {}
    progress = tqdm(batches, desc="features", unit="batch", disable=not world.leads, mininterval=1)
    for start, images in progress:
        with full_float32():
            features = {name: x.float() for name, x in pooled(images.to(world.device)).items()}
        first, last = torch.searchsorted(chosen, torch.tensor([start, start + len(images)])).tolist()
        for name, values in features.items():
            if name != "logits":
                moments.setdefault(name, Moments(values.shape[1], values.device)).add(values)
            if name != "spatial":
                kept = rows.setdefault(name, torch.zeros(len(chosen), values.shape[1]))
                kept[first:last] = values.cpu()[chosen[first:last] - start]
    for found in moments.values():
        found.share(world)
    if found.count != count:
        raise InputError(f"{found.count} images were read, but {count} were expected")
    gaussians = {name: (found.mean.cpu(), found.covariance.cpu()) for name, found in moments.items()}
    return Features(count, gaussians, {name: world.sum(kept) for name, kept in rows.items()})


def reference_features(
    pooled: Pooled,
    name: str,
    source: str,
    image_size: int,
    batch_size: int,
    world: World,
    folder: Path | None = None,
    *,
    weights: str | None = None,
    workers: int = 0,
    content: str | None = None,
) -> Features:
    """Features of real images: a data set, pictures, or the ADM suite's reference .npz, whose own moments are used.

    That file has `mu`, `sigma` of the pooled and `mu_s`, `sigma_s` of the spatial features of all training images, and
    10,000 images in `arr_0`. `name` is the network's name, `image_size` the size at which a data set is read, in
    pixels. The features are cached in `folder`, since a sweep compares many sets of samples with the same real images;
    the cache holds for this content of the reference and for these `weights` of the network. `workers` read the images.
    `content` is the reference's if it is known already, see `content_of`: a folder of a million files takes minutes.
    """
    images = open_images(source, image_size)
    key = {"reference": source, "images": images.count, "image_size": image_size, "weights": weights}
    contents = world.from_leader([content or content_of(source), content_of(weights)] if world.leads else None)
    key |= {"reference_content": contents[0], "weights_content": contents[1]}
    path = folder and folder / f"reference-{name}.safetensors"
    kept = _read_features(path, key) if path else None
    if not world.any(kept is None):  # one process cannot compute alone what another has already read
        return kept
    check_shared(images.count, batch_size, world)
    found = collect(pooled, own_batches(images, batch_size, world, workers), images.count, world, REFERENCES)
    if source.endswith(".npz") and name == "inception":
        found.gaussians = _own_moments(Path(source), found.gaussians) or found.gaussians
    if path and world.leads:
        _write_features(path, key, found)
    return found


def _own_moments(path: Path, measured: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The Gaussians that a reference .npz brings along; None if it has not all of them.

    Raises InputError unless they fit the measured features and are finite.
    """
    names = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    arrays = read_arrays(path, [name for pair in names.values() for name in pair])
    if len(arrays) < 4:
        return None
    for feature, pair in names.items():
        for name, own in zip(pair, measured[feature], strict=True):
            array = arrays[name]
            if array.dtype.kind != "f" or array.shape != tuple(own.shape) or not np.isfinite(array).all():
                raise InputError(
                    f"{path}: {name} is {array.dtype} {array.shape}; finite numbers {tuple(own.shape)} are needed"
                )
    return {feature: tuple(torch.from_numpy(arrays[name]) for name in pair) for feature, pair in names.items()}


def _write_features(path: Path, key: dict[str, Any], features: Features) -> None:
    tensors = {f"rows.{name}": values for name, values in features.rows.items()}
    for name, (mean, covariance) in features.gaussians.items():
        tensors |= {f"mean.{name}": mean, f"covariance.{name}": covariance}
    with replacing(path) as partial:
        save_tensors({name: x.contiguous() for name, x in tensors.items()}, partial, {"key": json.dumps(key)})


def _read_features(path: Path, key: dict[str, Any]) -> Features | None:
    """The cached features; None if there is no readable file or it is about other images."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if json.loads((file.metadata() or {}).get("key", "null")) != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
        names = [name.removeprefix("mean.") for name in tensors if name.startswith("mean.")]
        gaussians = {name: (tensors[f"mean.{name}"], tensors[f"covariance.{name}"]) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError):  # damaged: it is computed again
        return None
    rows = {name.removeprefix("rows."): x for name, x in tensors.items() if name.startswith("rows.")}
    return Features(key["images"], gaussians, rows)


def compare(real: Features, sampled: Features, measure: str, device: torch.device | str = "cpu") -> dict[str, float]:
    """The scores by name: FID, sFID, IS, precision, recall and KID for Inception; FD-… and KID-… for other networks.

    `measure` is the network's, see FrozenNetwork; `device` computes precision and recall. Warns if there are too few
    images for a Fréchet distance: F + 1 are needed to span F features.
    """
    fewest, needed = min(real.count, sampled.count), len(real.gaussians["pool"][0]) + 1
    if fewest < needed:
        warnings.warn(
            f"{fewest} images are fewer than {needed}, which {needed - 1} features need: a Fréchet distance of so few "
            "is far too high and only comparable at the same number of images; prefer KID",
            stacklevel=2,
        )
    frechet, kernel = (f"FD-{measure}", f"KID-{measure}") if measure else ("FID", "KID")
    scores = {frechet: frechet_distance(*sampled.gaussians["pool"], *real.gaussians["pool"])}
    if "spatial" in sampled.gaussians:
        scores["sFID"] = frechet_distance(*sampled.gaussians["spatial"], *real.gaussians["spatial"])
    if "logits" in sampled.rows:
        scores["IS"] = inception_score(sampled.rows["logits"]).mean
    scores[kernel] = kernel_distance(sampled.rows["pool"], real.rows["pool"]).mean
    with full_float32():
        near = precision_recall(real.rows["pool"].to(device), sampled.rows["pool"].to(device))
    return scores | {"precision": near.precision, "recall": near.recall}


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Switch off TF32, with which a GPU rounds the factors of float32 products to 11 bits."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class SampleFile:
    """A .npz of samples that all processes write directly to disk, so that they are never all in memory.

    Every process writes its images at their own places in one file, with explicit offsets: memory maps of a shared disk
    write whole pages, and would overwrite what another machine wrote there. As a context manager it removes that file.

    Args:
        path: the .npz to write: `arr_0` uint8 [N, H, W, 3] and `labels` [N], as the ADM suite reads it.
        shape: (N, H, W, 3).

    Raises:
        WriteError: also from its methods: there is no room, or the file cannot be written.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int], world: World):
        self.path, self.world = path.absolute(), world
        self.pixels_path = self.path.with_name(f".{path.name}.arr_0.npy")
        self.image_bytes = math.prod(shape[1:])
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        self.offset = header.tell()
        with world.together(), writing(self.pixels_path):
            if world.leads:
                check_output_file(self.path)
                self.pixels_path.write_bytes(header.getvalue())
                os.truncate(self.pixels_path, self.offset + shape[0] * self.image_bytes)
        with writing(self.pixels_path):
            self.file = os.open(self.pixels_path, os.O_WRONLY)

    def __enter__(self) -> "SampleFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)
        if self.world.leads:
            self.pixels_path.unlink(missing_ok=True)

    def put(self, start: int, images: Tensor) -> None:
        """Write images uint8 [B, 3, H, W] at index `start` and following."""
        left = memoryview(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
        place = self.offset + start * self.image_bytes
        with writing(self.path):
            while left:
                written = os.pwrite(self.file, left, place)
                left, place = left[written:], place + written

    def finish(self, labels: Tensor) -> None:
        """Write the .npz, once every process has written its images; each of them has to call it."""
        with self.world.together(), writing(self.path):
            os.fsync(self.file)
        with self.world.together():
            if self.world.leads:
                pixels = np.load(self.pixels_path, mmap_mode="r")  # opened only now: a shared disk then shows all of it
                with replacing(self.path) as partial, partial.open("wb") as file:
                    np.savez(file, arr_0=pixels, labels=labels.numpy())
