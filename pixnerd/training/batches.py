"""What a step sees: which images in which order, at which size, with which noise, times and dropout.

Everything random in step n derives from (seed, n, position in the global batch), see `randomness.py`, so a resumed run
is identical to an uninterrupted one. Dimension letters: B images, C channels, H × W pixels, S pixels along a side.
"""

import contextlib
import functools
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import data, flow
from ..conditions import Conditions, ImageTokens
from ..config import TrainConfig
from ..data import ImageDataset
from ..data.loading import SHARED_MEMORY, fetched
from ..distributed import World
from ..errors import InputError
from ..randomness import Purpose, derived_seed, generator, normal, permuted, random_bits, uniform
from ..signals import STOP_SIGNALS

LISTED = 2**22  # images; the order of a larger data set is computed image by image, a list would fill every worker
CACHED = 2**17  # numbers that a CPU draws at once: few enough that they and their intermediate values fit in its cache
PREFETCH = 2  # batches that each process loads ahead
# the intervals of a path that shortcut distillation trains: those of 1, 2, 4 and 8 steps, the whole path twice
SHORTCUTS = ((0, 1), *((k / n, (k + 1) / n) for n in (1, 2, 4, 8) for k in range(n)))

# --- random draws ----------------------------------------------------------------------------------------------------


class StepDraws(NamedTuple):
    """Everything random in a step, for the images at some positions in its global batch."""

    noise: Tensor  # [B, C, H, W] standard normal
    t: Tensor  # [B] in (0, 1)
    dropped: Tensor  # [B] bool: show without label
    flipped: Tensor  # [B] bool: show mirrored
    caption: Tensor  # [B] in [0, 1): which of an image's captions to show
    r: Tensor  # [B] in [t, 1]: where a student's interval ends; t itself for a velocity network


def draw_step(
    config: TrainConfig, step: int, positions: range, shape: tuple[int, int, int], device: torch.device
) -> StepDraws:
    """The random draws of `step` for the images at `positions` of the global batch, each of shape [C, H, W]."""
    numbers = _philox_numbers if config.noise == "philox" else _torch_numbers
    noise, normals, uniforms = numbers(config.seed, step, positions, shape, device)
    drop, flip, caption, share = uniforms.unbind(1)
    t, r = student_interval(config.distil, flow.logit_normal_time(normals, config.time_shift).float(), share, positions)
    flipped = flip < 0.5 if config.horizontal_flip else torch.zeros_like(flip, dtype=torch.bool)
    return StepDraws(noise, t, drop < config.label_dropout, flipped, caption, r)


def student_interval(distil: str, t: Tensor, share: Tensor, positions: range) -> tuple[Tensor, Tensor]:
    """Starts and ends of the intervals that a step trains, [B] each; for a velocity network they are empty, at t.

    t [B] are training times and share [B] uniform numbers in [0, 1).
    """
    if distil == "fd":
        return torch.zeros_like(t), torch.ones_like(t)
    if distil == "meanflow":
        return t, t + (1 - t) * share
    if distil == "shortcut":
        return shortcut_intervals(positions, t.device)
    return t, t


def shortcut_intervals(positions: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """Starts and ends [B] of the intervals at some positions of a global batch: those of SHORTCUTS in turn."""
    place = torch.arange(positions.start, positions.stop, device=device) % len(SHORTCUTS)
    return _shortcut_times(device)[place].unbind(1)


@functools.lru_cache(maxsize=4)
def _shortcut_times(device: torch.device) -> Tensor:
    """SHORTCUTS [intervals, 2] on a device, to which they are copied once."""
    with torch.inference_mode(False):  # it outlives the caller, who may be in inference mode
        return torch.tensor(SHORTCUTS, device=device)


def _torch_numbers(
    seed: int, step: int, positions: range, shape: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal [B, C, H, W] and [B], uniform [B, 4], from torch's generators, which differ between devices."""
    noise, normals, uniforms = (torch.empty(len(positions), *one, device=device) for one in (shape, (), (4,)))
    of_images = zip(positions, noise, normals, uniforms[:, :2], uniforms[:, 2:3], uniforms[:, 3:], strict=True)
    for position, one_noise, one_normal, two, third, fourth in of_images:
        g = generator(device, seed, Purpose.TRAINING_STEP, step, position)
        one_normal.normal_(generator=g)  # each call is one draw, so none may be joined or change its place
        two.uniform_(generator=g)
        one_noise.normal_(generator=g)
        third.uniform_(generator=g)
        fourth.uniform_(generator=g)
    return noise, normals, uniforms


def _philox_numbers(
    seed: int, step: int, positions: range, shape: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from Philox, equal on every device. The [B] are in float64: so is the sigmoid that gives the times."""
    images = torch.arange(
        positions.start, positions.stop, positions.step, device=device
    )  # not copied: a GPU would wait
    bits = functools.partial(random_bits, seed, Purpose.TRAINING_STEP, step)
    few = bits(0, images, 5)  # [B, 5]
    together = max(1, CACHED // math.prod(shape)) if device.type == "cpu" else len(images)
    pieces = images.split(together)
    noise = torch.cat([normal(bits(1, piece, math.prod(shape))) for piece in pieces])
    return noise.view(-1, *shape), normal(few[:, 0]).double(), uniform(few[:, 1:])


@functools.lru_cache(maxsize=2)  # a batch can span two epochs
def shuffled(size: int, seed: int, epoch: int) -> Tensor:
    """The order [size] in which an epoch visits the images of a data set of up to LISTED images."""
    return torch.randperm(size, generator=generator(torch.device("cpu"), seed, Purpose.DATA_ORDER, epoch))


def step_indices(size: int, config: TrainConfig, step: int, positions: range) -> list[int]:
    """Data set indices of the images at `positions` in a step's global batch: one shuffle after another."""
    numbers = (step * config.batch_size + position for position in positions)  # of images since the first step
    return [image_at(size, config.seed, number) for number in numbers]


def image_at(size: int, seed: int, number: int) -> int:
    """The index in a data set of `size` images of the one that a run shows as its number 0, 1, …"""
    epoch, place = divmod(number, size)
    if size <= LISTED:
        return int(shuffled(size, seed, epoch)[place])
    return permuted(place, size, derived_seed(seed, Purpose.DATA_ORDER, epoch))


def step_size(config: TrainConfig, step: int) -> int:
    """The side of a step's images, in pixels."""
    if not config.decode_sizes:
        return config.model.image_size
    g = generator(torch.device("cpu"), config.seed, Purpose.DECODE_SIZE, step)
    return config.decode_sizes[int(torch.randint(len(config.decode_sizes), (), generator=g))]


# --- batches ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the model sees in a step, or in a part of one, on the training device.

    Intervals of kept paths lead from `noise`, at t, to `image`, at r, and `indices` are the numbers of their paths.
    """

    image: Tensor  # [B, C, H, W] in [−1, 1], mirrored where `flipped`
    condition: Tensor  # [B] labels, or [B, L, F] text features; "none" where they were dropped
    noise: Tensor  # [B, C, H, W]
    t: Tensor  # [B]
    indices: Tensor  # [B], in the data set
    flipped: Tensor  # [B] bool
    r: Tensor  # [B], ends of a student's intervals, or t

    def parts(self, count: int) -> Iterator["Batch"]:
        """Split into `count` consecutive batches."""
        return (Batch(*tensors) for tensors in zip(*(tensor.chunk(count) for tensor in self), strict=True))


class LoadedImages(NamedTuple):
    """A step's images as the data set stores them."""

    pixels: Tensor  # [B, C, S, S] uint8
    labels: Tensor  # [B]
    indices: Tensor  # [B]
    tokens: ImageTokens | None  # of their captions, for a text model


class StepImages(Dataset):
    """The images of each step, indexed by step; `datasets` holds the data set at every decoded size.

    If an image cannot be read, the InputError that names it is returned as a value: a worker process would wrap a
    raised error in a traceback of its own.
    """

    def __init__(
        self,
        datasets: dict[int, ImageDataset],
        config: TrainConfig,
        positions: range,
        tokenizer: Callable[[Sequence[int]], ImageTokens] | None,
    ):
        self.datasets, self.config, self.positions, self.tokenizer = datasets, config, positions, tokenizer

    def __getitem__(self, step: int) -> LoadedImages | InputError:
        dataset = self.datasets[step_size(self.config, step)]
        indices = step_indices(len(dataset), self.config, step, self.positions)
        try:
            tokens = self.tokenizer(indices) if self.tokenizer else None
            return LoadedImages(*dataset.batch(indices), torch.tensor(indices), tokens)
        except InputError as error:
            return error


def load_datasets(config: TrainConfig, world: World) -> dict[int, ImageDataset]:
    """The training data at every image size of the run. The leading process opens it first, and it alone
    looks at every file.

    Raises InputError when the data cannot be opened.
    """

    def load() -> dict[int, ImageDataset]:
        first, *others = config.image_sizes
        opened = (data.load if world.leads else data.open_data_set)(config.data, first)
        return {first: opened, **{size: data.open_data_set(config.data, size) for size in others}}

    return world.leader_first(load)


def check_split(config: TrainConfig, processes: int, called: str = "processes") -> None:
    """Raise InputError unless so many processes, or GPUs, can share a step, each of them in `accumulate` parts."""
    parts = processes * config.accumulate
    if config.batch_size % parts:
        raise InputError(
            f"batch_size {config.batch_size} cannot be shared evenly by {processes} {called} in {config.accumulate} "
            "parts each"
        )
    if config.distil == "shortcut" and config.batch_size % (parts * len(SHORTCUTS)):
        raise InputError(
            f"batch_size is {config.batch_size}; distil=shortcut needs a multiple of {len(SHORTCUTS)}, the intervals "
            f"of a path, in each of {processes} {called} and {config.accumulate} parts"
        )


def check_shared_memory(config: TrainConfig, world: World) -> None:
    """Raise InputError unless the batches that the loading processes hold ready fit in shared memory."""
    if not config.workers or not SHARED_MEMORY.is_dir():
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of the run on this machine
    images = config.batch_size // world.size * (config.workers * PREFETCH + 1) * here
    each = 4 if config.paths else 1  # bytes of a number: two ends of an interval in float16, or an image in uint8
    needed = images * config.model.channels * max(config.image_sizes) ** 2 * each
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise InputError(
            f"workers is {config.workers}, for which {SHARED_MEMORY} needs {needed / 2**20:.0f} MiB, but it has "
            f"{free / 2**20:.0f} MiB free: start the container with --shm-size={-(-2 * needed // 2**30)}g, "
            "or train with --workers 0"
        )


@contextlib.contextmanager
def out_of_reach_of_signals(workers: int) -> Iterator[None]:
    """Processes started in the block never see what asks the program to stop: it needs their batches until it has.

    Nor does the death of one interrupt this process anywhere, even in the middle of a save, as torch would have it: the
    loader notices it when the next batch is due.
    """
    if not workers or not hasattr(signal, "pthread_sigmask"):  # not on Windows
        yield
        return
    on_death, blocked = signal.getsignal(signal.SIGCHLD), signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not on_death:
            signal.signal(signal.SIGCHLD, on_death)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def load_ahead(steps: Dataset, config: TrainConfig, first: int, world: World) -> Iterator[Any]:
    """What `steps` has for each step from `first` on, loaded by the run's workers. Raises the InputErrors among it."""
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, config.steps),
        num_workers=config.workers,
        prefetch_factor=PREFETCH if config.workers else None,
        pin_memory=world.device.type == "cuda",
    )
    with out_of_reach_of_signals(config.workers):
        batches = fetched(iter(loader)) if config.workers else iter(loader)
    try:
        for loaded in batches:
            if isinstance(loaded, InputError):
                raise loaded
            yield loaded
    finally:
        del batches  # an error keeps this frame, which would keep the workers: at its end the program waits for them


def step_batches(
    config: TrainConfig, datasets: dict[int, ImageDataset], conditions: Conditions, first: int, world: World
) -> Iterator[Batch]:
    """This process's batch for each step from `first` on. Raises InputError when an image cannot be read."""
    positions = world.positions(config.batch_size)
    steps = StepImages(datasets, config, positions, conditions.tokenizer)
    for step, loaded in enumerate(load_ahead(steps, config, first, world), start=first):
        if loaded.tokens is not None and world.leads:
            conditions.warn_of_cut(loaded.indices, loaded.tokens)
        pixels, labels, indices = (tensor.to(world.device, non_blocking=True) for tensor in loaded[:3])
        draws = draw_step(config, step, positions, tuple(pixels.shape[1:]), world.device)
        image = data.to_float(pixels)
        image = torch.where(draws.flipped[:, None, None, None], image.flip(-1), image)
        condition = conditions.of_images(labels, indices, draws.dropped, draws.caption, loaded.tokens)
        yield Batch(image, condition, draws.noise, draws.t, indices, draws.flipped, draws.r)
