"""A teacher's paths, followed once, kept in files, and drawn from by shortcut distillation in every step.

A step of B intervals then shows B paths. Without kept paths, each new path contributes all 16 of its intervals, so that
a step of 64 covers only four paths.

Dimension letters: B intervals, P paths of a file, T times of a path, C channels, H × W pixels.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..compiling import compile_regions
from ..conditions import Conditions
from ..config import TrainConfig
from ..data import ImageDataset, cache_folder, path_in
from ..distributed import World
from ..errors import InputError
from ..files import make_folder, readable, replacing, save_tensors, write_atomically
from ..model_config import ModelConfig, TextModelConfig
from ..randomness import Purpose, normal, random_bits, uniform
from .batches import SHORTCUTS, Batch, image_at, load_ahead, shortcut_intervals
from .distillation import PATH_STEPS, Teacher

PER_FILE = 64  # paths, which the teacher follows at once
POINTS = 8  # a path's kept points are those at k / 8, since the shortest of SHORTCUTS are eighths
KEPT = torch.float16  # its rounding, unlike that of a network in bfloat16, is not what all paths have in common


def path_bytes(model: ModelConfig) -> int:
    """What a kept path of this model takes on the disk: the images, and the label or the features of the caption."""
    images = (POINTS + 1) * model.channels * model.image_size**2 * KEPT.itemsize
    return images + (4 * model.text_length * model.text_features if isinstance(model, TextModelConfig) else 8)


class KeptPaths:
    """The paths of a run, in files that every other student of the same teacher with the same settings finds again.

    Path p is that of image p in the run's order of images, told its label or one of its captions, from noise of its
    own. All draws are keyed by the seed and p, or the step and the place in its batch, so neither the number of
    processes nor an interruption changes what is trained.

    Args:
        config: `paths` says how many.
        world: the processes of the run, which share the work.
        dataset: the images, whose labels or captions are shown.
        conditions: what the model is told.
        teacher: whose paths are kept.

    Raises:
        InputError: the number is no multiple of PER_FILE, or the disk has no room for the files.
        WriteError: the folder cannot be written.
    """

    def __init__(
        self, config: TrainConfig, world: World, dataset: ImageDataset, conditions: Conditions, teacher: Teacher
    ):
        if config.paths % PER_FILE:
            raise InputError(
                f"paths is {config.paths}; {PER_FILE} are kept in a file, so it has to be a multiple of it"
            )
        self.config, self.world, self.dataset = config, world, dataset
        self.conditions = conditions
        self.teacher: Teacher | None = teacher  # until the paths are complete
        self.shape = dataset.channels, *(config.model.image_size,) * 2
        about = {
            "teacher": config.teacher_content,
            "guidance": [config.teacher_guidance, config.teacher_interval],
            "steps": [PATH_STEPS, teacher.last],
            "shape": self.shape,
            "data": str(Path(path).absolute()) if (path := path_in(config.data)) else config.data,
            "images": len(dataset),
            "shown": conditions.reader,
            "seed": config.seed,
        }
        text = json.dumps(about, indent=1)
        self.folder = cache_folder() / "paths" / hashlib.sha256(text.encode()).hexdigest()[:16]
        if world.leads:
            make_folder(self.folder)
            write_atomically(self.folder / "about.json", text)
            self._check_room()

    def file(self, number: int) -> Path:
        """That of the paths number · PER_FILE and on."""
        return self.folder / f"{number:05}.safetensors"

    def _missing(self) -> list[int]:
        """The files that are not there, or are of images with other labels or captions: the data may have changed."""
        return [number for number in range(self.config.paths // PER_FILE) if not self._is_kept(number)]

    def _is_kept(self, number: int) -> bool:
        try:
            with safe_open(self.file(number), "pt") as file:
                return file.metadata() == {"images": self._images(_paths_of(number))}
        except (SafetensorError, OSError):  # not there, or damaged
            return False

    def _images(self, numbers: range) -> str:
        """A hash of the images whose paths have these numbers, and of their labels or captions."""
        indices = [image_at(len(self.dataset), self.config.seed, number) for number in numbers]
        if self.conditions.subject == "prompt":
            shown = [list(self.dataset.captions[index]) for index in indices]
        else:
            shown = self.dataset.labels[indices].tolist()
        return hashlib.sha256(json.dumps([indices, shown]).encode()).hexdigest()[:16]

    def _check_room(self) -> None:
        needed = len(self._missing()) * PER_FILE * path_bytes(self.config.model)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"paths is {self.config.paths}, for which {self.folder} needs {needed / 2**30:.1f} GiB, but it has "
                f"{free / 2**30:.1f} GiB free: take fewer, or make room"
            )

    def complete(self, compiled: bool, stop_asked: Callable[[], bool] = lambda: False) -> bool:
        """Follow the paths whose files are missing, each process its share.

        Args:
            compiled: with torch.compile.
            stop_asked: whether to stop before the next file; those that were written are kept.

        Returns:
            whether all paths are there, false after a stop.

        Raises:
            WriteError: in every process, if a file cannot be written; those that were are kept.
        """
        missing = self.world.from_leader(self._missing() if self.world.leads else None)  # another student may write
        if missing and compiled:
            compile_regions(self.teacher.model)
        mine, stopped = missing[self.world.rank :: self.world.size], False
        with self.world.together():
            for number in tqdm(mine, desc="paths", unit_scale=PER_FILE, unit="path", disable=not self.world.leads):
                if stopped := stop_asked():
                    break
                with replacing(self.file(number)) as partial:
                    numbers = _paths_of(number)
                    save_tensors(self._follow(numbers), partial, {"images": self._images(numbers)})
        if self.world.any(stopped):
            return False
        self.teacher = None  # a GPU has other use for the room
        return True

    def _follow(self, numbers: range) -> dict[str, Tensor]:
        """The paths of these numbers: x [P, T, C, H, W], and what they were told."""
        device, seed = self.world.device, self.config.seed
        positions = torch.arange(numbers.start, numbers.stop)
        indices = [image_at(len(self.dataset), seed, number) for number in numbers]
        choice = uniform(random_bits(seed, Purpose.TEACHER_PATH, 0, 0, positions, 1))[:, 0]
        noise = normal(random_bits(seed, Purpose.TEACHER_PATH, 0, 1, positions, math.prod(self.shape)))
        tokens = self.conditions.tokenizer(indices) if self.conditions.tokenizer else None
        labels = self.dataset.labels[indices]
        shown = (labels, torch.tensor(indices), torch.zeros(len(numbers), dtype=torch.bool), choice)
        condition = self.conditions.of_images(*(tensor.to(device) for tensor in shown), tokens)
        path = self.teacher.path(noise.view(-1, *self.shape).to(device), condition, None)[:: PATH_STEPS // POINTS]
        return {"x": path.transpose(0, 1).to(KEPT).contiguous().cpu(), "condition": condition.contiguous().cpu()}

    def batches(self, first: int) -> Iterator[Batch]:
        """This process's intervals for each step from `first` on, from x_t, `noise`, to x_r, `image`."""
        positions = self.world.positions(self.config.batch_size)
        t, r = shortcut_intervals(positions, self.world.device)
        steps = StepIntervals(self, positions)
        for found in load_ahead(steps, self.config, first, self.world):
            start, end, condition, number = (tensor.to(self.world.device, non_blocking=True) for tensor in found)
            flipped = torch.zeros_like(number, dtype=torch.bool)
            yield Batch(end.float(), condition, start.float(), t, number, flipped, r)


def _paths_of(number: int) -> range:
    """The numbers of the paths in a file."""
    return range(number * PER_FILE, (number + 1) * PER_FILE)


class Intervals(NamedTuple):
    """A step's intervals, as the files have them."""

    start: Tensor  # x_t [B, C, H, W]
    end: Tensor  # x_r [B, C, H, W]
    condition: Tensor  # [B, …]
    path: Tensor  # [B], the number of each one's path


class StepIntervals(Dataset):
    """The intervals of each step, indexed by step: those of SHORTCUTS in turn, each of a path of its own.

    An InputError is returned as a value, as by StepImages.
    """

    def __init__(self, paths: KeptPaths, positions: range):
        self.files = [paths.file(number) for number in range(paths.config.paths // PER_FILE)]
        self.seed, self.count, self.positions = paths.config.seed, paths.config.paths, positions
        self.opened: dict[int, safe_open] = {}

    def __getitem__(self, step: int) -> Intervals | InputError:
        try:
            return self._intervals(step)
        except InputError as error:
            return error

    def _intervals(self, step: int) -> Intervals:
        positions = torch.arange(self.positions.start, self.positions.stop)
        bits = random_bits(self.seed, Purpose.PATH_CHOICE, step, 0, positions, 1)[:, 0]
        numbers = bits * self.count >> 32
        rows = []
        for position, number in zip(self.positions, numbers.tolist(), strict=True):
            file, row = divmod(number, PER_FILE)
            kept, (t, r) = self._file(file), SHORTCUTS[position % len(SHORTCUTS)]
            x = kept.get_slice("x")
            rows.append((x[row, round(t * POINTS)], x[row, round(r * POINTS)], kept.get_slice("condition")[row]))
        start, end, condition = (torch.stack(column) for column in zip(*rows, strict=True))
        return Intervals(start, end, condition, numbers)

    def _file(self, number: int) -> safe_open:
        if number not in self.opened:
            with readable(self.files[number], "is damaged, and the same command follows its paths again"):
                self.opened[number] = safe_open(self.files[number], "pt")
        return self.opened[number]
