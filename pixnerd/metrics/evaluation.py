"""From images to the table of figures: features of drawn and real images, batch by batch, on all processes.

Dimension letters: N images, B of a batch, F features.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..distributed import World
from ..errors import InputError
from .images import Images, open_images
from .networks import SUFFIX, Network
from .statistics import Moments, frechet_distance, inception_score, kernel_distance, precision_recall

REFERENCES = 10_000  # real images that precision, recall and KID look at, as in ADM's suite
ENOUGH = 2049  # fewer images than this cannot span Inception's 2,048 features


@dataclass
class Features:
    """What is kept of a set of images: each feature's Gaussian, and some images' features themselves."""

    count: int
    gaussians: dict[str, tuple[Tensor, Tensor]]
    """by feature, "pool" and "spatial": mean [F] and covariance [F, F], of all images"""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """by feature, "pool" and "logits": [kept images, F], float32"""


def own_batches(images: Images, batch_size: int, world: World) -> Iterator[tuple[int, Tensor]]:
    """This process's batches of all, each with the place of its first image."""
    for number, batch in enumerate(images.batches(batch_size)):
        if number % world.size == world.rank:
            yield number * batch_size, batch


@torch.no_grad()
def collect(
    network: nn.Module, batches: Iterable[tuple[int, Tensor]], count: int, world: World, keep: int | None = None
) -> Features:
    """Features of images that come as (place of the first, uint8 [B, 3, H, W]); every process calls it with its own.

    Memory does not grow with the images but for the kept rows, 8 kB each, 12 kB with logits.

    Args:
        network: what `load_network` gives.
        batches: this process's.
        count: of the images of all processes.
        keep: how many images' rows to keep, drawn at random but always the same; None: all.
    """
    chosen = torch.arange(count)
    if keep is not None and keep < count:
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:keep].sort().values
    moments: dict[str, Moments] = {}
    rows: dict[str, Tensor] = {}
    progress = tqdm(batches, desc="features", unit="batch", disable=not world.leads, mininterval=1)
    for start, images in progress:
        features = {name: x.float().cpu() for name, x in network(images.to(world.device)).items()}
        first, last = torch.searchsorted(chosen, torch.tensor([start, start + len(images)])).tolist()
        for name, values in features.items():
            if name != "logits":
                moments.setdefault(name, Moments(values.shape[1])).add(values)
            if name != "spatial":
                kept = rows.setdefault(name, torch.zeros(len(chosen), values.shape[1]))
                kept[first:last] = values[chosen[first:last] - start]
    if world.any(not moments):
        raise InputError(f"{count} images are too few for {world.size} processes: each needs a batch")
    for found in moments.values():
        found.share(world)
    if found.count != count:
        raise InputError(f"{found.count} images were read where {count} were announced")
    gaussians = {name: (found.mean, found.covariance) for name, found in moments.items()}
    return Features(count, gaussians, {name: world.sum(kept) for name, kept in rows.items()})


def reference_features(
    network: nn.Module,
    name: Network,
    source: str,
    image_size: int,
    batch_size: int,
    world: World,
    folder: Path | None = None,
) -> Features:
    """Features of real images: a data set, pictures, or the ADM suite's reference .npz, whose own moments are used.

    That file has `mu`, `sigma` of the pooled and `mu_s`, `sigma_s` of the spatial features of all training images, and
    10,000 images in `arr_0`. Arguments as elsewhere; `image_size` is a data set's, in pixels. In `folder` the features
    are kept for the next time, since a sweep compares many sets of drawn images with the same real ones.
    """
    images = open_images(source, image_size)
    key = {"reference": source, "images": images.count, "image_size": image_size}
    path = folder and folder / f"reference-{name}.safetensors"
    if path and (kept := _read_features(path, key)):
        return kept
    found = collect(network, own_batches(images, batch_size, world), images.count, world, REFERENCES)
    if source.endswith(".npz") and name == "inception":
        with np.load(source) as file:
            if {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files):
                names = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
                found.gaussians = {
                    feature: (torch.from_numpy(file[mean]), torch.from_numpy(file[covariance]))
                    for feature, (mean, covariance) in names.items()
                }
    if path and world.leads:
        _write_features(path, key, found)
    return found


def _write_features(path: Path, key: dict[str, str | int], features: Features) -> None:
    tensors = {f"rows.{name}": values for name, values in features.rows.items()}
    for name, (mean, covariance) in features.gaussians.items():
        tensors |= {f"mean.{name}": mean, f"covariance.{name}": covariance}
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: x.contiguous() for name, x in tensors.items()}, partial, {"key": json.dumps(key)})
    partial.replace(path)


def _read_features(path: Path, key: dict[str, str | int]) -> Features | None:
    """None where there is no readable file, or one of other images."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if json.loads(file.metadata()["key"]) != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    except SafetensorError:
        return None
    names = [name.removeprefix("mean.") for name in tensors if name.startswith("mean.")]
    gaussians = {name: (tensors[f"mean.{name}"], tensors[f"covariance.{name}"]) for name in names}
    rows = {name.removeprefix("rows."): x for name, x in tensors.items() if name.startswith("rows.")}
    return Features(key["images"], gaussians, rows)


def compare(real: Features, drawn: Features, name: Network) -> dict[str, float]:
    """The figures by name: FID, sFID, IS, precision, recall and KID of Inception; FD-… and KID-… of another network.

    Warns, in words, where there are too few images for a Fréchet distance.
    """
    fewest = min(real.count, drawn.count)
    if fewest < ENOUGH:
        warnings.warn(
            f"{fewest} images are fewer than {ENOUGH}, which Inception's features need: a Fréchet distance of so few "
            "is far too high and only comparable at the same number; prefer KID",
            stacklevel=2,
        )
    suffix = SUFFIX[name]
    scores = {f"FD-{suffix}" if suffix else "FID": frechet_distance(*drawn.gaussians["pool"], *real.gaussians["pool"])}
    if "spatial" in drawn.gaussians:
        scores["sFID"] = frechet_distance(*drawn.gaussians["spatial"], *real.gaussians["spatial"])
    if "logits" in drawn.rows:
        scores["IS"] = inception_score(drawn.rows["logits"]).mean
    scores["KID" + (f"-{suffix}" if suffix else "")] = kernel_distance(drawn.rows["pool"], real.rows["pool"]).mean
    near = precision_recall(real.rows["pool"], drawn.rows["pool"])
    return scores | {"precision": near.precision, "recall": near.recall}


class SampleFile:
    """A .npz of drawn images that grows on the disk, written by all processes: never all in memory.

    Args:
        path: of the .npz: `arr_0` uint8 [N, H, W, 3] and `labels` [N], as the ADM suite reads it.
        shape: (N, H, W, 3).
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int], world: World):
        self.path, self.world = path, world
        self.pixels_path = path.with_name(f".{path.name}.arr_0.npy")
        if world.leads:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(self.pixels_path, "w+", np.uint8, shape).flush()
        world.wait()
        self.pixels = np.lib.format.open_memmap(self.pixels_path, "r+")

    def put(self, start: int, images: Tensor) -> None:
        """uint8 [B, 3, H, W] at the places from `start` on."""
        self.pixels[start : start + len(images)] = images.permute(0, 2, 3, 1).cpu().numpy()

    def close(self, labels: Tensor) -> None:
        """Write the .npz, its name last; every process calls it."""
        self.pixels.flush()
        self.world.wait()
        if self.world.leads:
            partial = self.path.with_name(f".{self.path.name}.partial.npz")
            np.savez(partial, arr_0=self.pixels, labels=labels.numpy())
            partial.replace(self.path)
            self.pixels_path.unlink()
