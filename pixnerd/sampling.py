"""Sampling: noise, a guided velocity, a solver, and an image at the end.

t = 0 is noise and t = 1 is data. Dimension letters: B images, C channels, H × W pixels.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError
from .model import PixNerd, check_image_size, check_labels
from .randomness import Purpose, generator
from .solvers import SOLVERS, time_grid


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample; the defaults are the published ones for class-conditional images (arXiv 2507.23268).

    Raises InputError when a value is outside its range.
    """

    steps: int = 100
    """solver steps"""
    solver: str = "euler"
    """one of pixnerd.solvers.SOLVERS"""
    guidance: float = 3.5
    """w of v_u + w·(v_c − v_u); 1 is no guidance"""
    interval: tuple[float, float] | None = (0.1, 1.0)
    """guide only the steps that start strictly inside; None guides every step"""
    shift: float = 1.0
    """moves the time grid, see solvers.time_grid"""

    def __post_init__(self):
        time_grid(self.steps, self.shift)
        if self.solver not in SOLVERS:
            raise InputError(f"solver {self.solver!r} is unknown; known solvers: {', '.join(SOLVERS)}")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] <= 1:
            low, high = self.interval
            raise InputError(f"guidance interval ({low}, {high}) is not a range; it needs 0 ≤ low < high ≤ 1")

    def guides(self, t: float) -> bool:
        """Whether a step that starts at t is guided."""
        return self.guidance != 1 and (self.interval is None or self.interval[0] < t < self.interval[1])


@dataclass(frozen=True)
class State:
    """Where a trajectory stands after a step."""

    step: int
    """steps done, 1 … n"""
    t: float
    """time reached; 1 after the last step"""
    x: Tensor
    """the images so far, x_t [B, C, H, W]"""
    image: Tensor
    """the clean images the step was heading for, x + (1 − t)·v at its start, [B, C, H, W]"""


def sample_noise(shape: tuple[int, int, int], indices: Sequence[int], seed: int = 0) -> Tensor:
    """Starting noise [len(indices), C, H, W]: image i gets the noise of (seed, i) whatever else is in the batch."""
    cpu = torch.device("cpu")  # drawn there on every machine, so a seed means the same image with or without a GPU
    return torch.stack([torch.randn(shape, generator=generator(cpu, seed, Purpose.SAMPLE_NOISE, i)) for i in indices])


def trajectory(
    model: PixNerd,
    labels: Tensor | Sequence[int],
    *,
    noise: Tensor | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    steps: int = 100,
    solver: str = "euler",
    guidance: float = 3.5,
    interval: tuple[float, float] | None = (0.1, 1.0),
    shift: float = 1.0,
) -> Iterator[State]:
    """Sample step by step; one State for each of the `steps`.

    Guidance is v_u + w·(v_c − v_u) (Ho & Salimans 2207.12598) while the step's start lies strictly inside `interval`
    (Kynkäänniemi et al. 2404.07724); outside it the unconditional half is not computed.

    Args:
        model: velocity network; its device and dtype are used, and the caller's autocast.
        labels: [B] classes, 0 … num_classes (num_classes is "no label").
        noise: the start [B, C, H, W]; by default `sample_noise` of (seed, 0 … B−1).
        size: (H, W) of that default; by default the size the model was trained at.
        seed: of the default noise.
        steps, solver, guidance, interval, shift: see SamplingConfig.

    Raises:
        InputError: at the call, before any computation.
    """
    config = SamplingConfig(steps, solver, guidance, interval, shift)
    labels = torch.as_tensor(labels, dtype=torch.long)
    if labels.ndim != 1 or len(labels) == 0:
        raise InputError(f"labels have shape {tuple(labels.shape)}; a list of at least one class is needed")
    check_labels(labels, model.num_classes)
    if noise is None:
        height, width = size or (model.config.image_size,) * 2
        check_image_size(model.config, height, width)
        noise = sample_noise((model.config.channels, height, width), range(len(labels)), seed)
    elif len(noise) != len(labels):
        raise InputError(f"noise is for {len(noise)} images and labels are for {len(labels)}; they have to be as many")
    elif size is not None and tuple(noise.shape[2:]) != tuple(size):
        raise InputError(f"size {size} and noise of {tuple(noise.shape[2:])} pixels disagree; give one of them")
    weight = model.patch_embed.weight
    return _follow(model, labels.to(weight.device), noise.to(weight.device, weight.dtype), config)


@torch.no_grad()
def _follow(model: PixNerd, labels: Tensor, noise: Tensor, config: SamplingConfig) -> Iterator[State]:
    no_label = torch.full_like(labels, model.num_classes)
    image = noise  # the clean image last estimated

    def velocity(x: Tensor, t: float) -> Tensor:
        nonlocal image
        times = torch.full_like(labels, t, dtype=x.dtype)  # [B]
        if config.guides(t):
            both = model(torch.cat((x, x)), torch.cat((times, times)), torch.cat((labels, no_label)))
            conditional, unconditional = both.chunk(2)
            v = unconditional + config.guidance * (conditional - unconditional)
        else:
            v = model(x, times, labels)
        image = x + (1 - t) * v
        return v

    times = time_grid(config.steps, config.shift)
    for step, x in enumerate(SOLVERS[config.solver](velocity, noise, times), start=1):
        yield State(step, times[step], x, image)


def sample_batches(
    model: PixNerd, labels: Tensor, config: SamplingConfig, *, seed: int = 0, batch_size: int = 64
) -> Iterator[Tensor]:
    """Many images of the model's own size, batch by batch [≤ batch_size, C, H, W]; image i starts at noise (seed, i).

    Args: see `trajectory`. Raises InputError before the first batch.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it has to be at least 1")
    check_labels(labels, model.num_classes)
    shape = (model.config.channels, model.config.image_size, model.config.image_size)
    for indices in torch.arange(len(labels)).split(batch_size):
        noise = sample_noise(shape, indices.tolist(), seed)
        yield sample(model, labels[indices], noise=noise, **dataclasses.asdict(config))


def sample(model: PixNerd, labels: Tensor | Sequence[int], **options) -> Tensor:
    """The images [B, C, H, W], about [−1, 1], at the end of `trajectory(model, labels, **options)`."""
    return deque(trajectory(model, labels, **options), maxlen=1).pop().x
