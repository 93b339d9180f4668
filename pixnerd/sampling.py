"""Sampling: noise, a guided velocity, a solver, and an image at the end.

t = 0 is noise and t = 1 is data. Dimension letters: B images, C channels, H × W pixels.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from .errors import InputError
from .model import PixNerd, check_labels, check_resolution
from .randomness import Purpose, generator
from .solvers import SOLVERS, time_grid
from .text import TextPixNerd, check_text


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
    """the clean images that the step's last velocity was heading for, x + (1 − t)·v, [B, C, H, W]"""


def sample_noise(shape: tuple[int, int, int], indices: Sequence[int], seed: int = 0, step: int = 0) -> Tensor:
    """Noise [len(indices), C, H, W]: image i gets that of (seed, i, step) whatever else is in the batch.

    Step 0 is where sampling starts; the stochastic solver draws again at its steps 1, 2, ….
    """
    cpu = torch.device("cpu")  # drawn there on every machine, so a seed means the same image with or without a GPU
    keyed = (generator(cpu, seed, Purpose.SAMPLE_NOISE, index, step) for index in indices)
    return torch.stack([torch.randn(shape, generator=g) for g in keyed])


def trajectory(
    model: PixNerd | TextPixNerd,
    labels: Tensor | Sequence[int],
    *,
    unconditional: Tensor | None = None,
    noise: Tensor | None = None,
    size: tuple[int, int] | None = None,
    base_resolution: tuple[int, int] | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
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
        labels: [B] classes, 0 … num_classes (num_classes is "no label"); for a text model, text features [B, L, F].
        unconditional: for a text model with guidance, the features [L, F] of the empty caption.
        noise: the start [B, C, H, W]; by default `sample_noise` of the indices.
        size: (H, W) of that default; by default the size the model was trained at.
        base_resolution: (h, w) that the transformer sees, while the head decodes H × W; by default the same.
        seed: of all noise.
        indices: the numbers of these images, which with the seed decide their noise; by default 0 … B−1.
        steps, solver, guidance, interval, shift: see SamplingConfig.

    Raises:
        InputError: at the call, before any computation.
    """
    config = SamplingConfig(steps, solver, guidance, interval, shift)
    condition, unconditional = _conditions(model, labels, unconditional, config)
    indices = range(len(condition)) if indices is None else indices
    if noise is not None and size is not None and tuple(noise.shape[2:]) != tuple(size):
        raise InputError(f"size {size} and noise of {tuple(noise.shape[2:])} pixels disagree; give one of them")
    height, width = noise.shape[2:] if noise is not None else size or (model.config.image_size,) * 2
    check_resolution(model.config, (height, width), base_resolution)
    if noise is None:
        noise = sample_noise((model.config.channels, height, width), indices, seed)
    if not len(noise) == len(condition) == len(indices):
        counts = f"{len(noise)} images of noise, {len(condition)} conditions, {len(indices)} indices"
        raise InputError(f"there are {counts}; they have to be as many")

    weight = model.patch_embed.weight
    start = noise.to(weight.device, weight.dtype)
    condition, unconditional = condition.to(weight.device), unconditional.to(weight.device)

    def predict(x: Tensor, t: float, guided: bool) -> Tensor:
        times = torch.full((len(x),), t, dtype=x.dtype, device=x.device)  # [B]
        if not guided:
            return model(x, times, condition, base_resolution)
        both = model(
            torch.cat((x, x)), torch.cat((times, times)), torch.cat((condition, unconditional)), base_resolution
        )
        conditional_v, unconditional_v = both.chunk(2)
        return unconditional_v + config.guidance * (conditional_v - unconditional_v)

    def draw(step: int) -> Tensor:
        return sample_noise(tuple(start.shape[1:]), indices, seed, step).to(start)

    return _follow(predict, draw, start, config)


def _conditions(
    model: PixNerd | TextPixNerd,
    labels: Tensor | Sequence[int],
    unconditional: Tensor | None,
    config: SamplingConfig,
) -> tuple[Tensor, Tensor]:
    """Checked conditions, and as many unconditional ones: classes [B], or text features [B, L, F]."""
    if isinstance(model, TextPixNerd):
        text = torch.as_tensor(labels)
        check_text(model.config, text)
        if unconditional is None:
            if config.guidance != 1:
                raise InputError(
                    f"guidance {config.guidance} from text needs `unconditional`, the features of the empty caption"
                )
            unconditional = text[0]
        check_text(model.config, unconditional[None])
        return text, unconditional.to(text).expand_as(text)
    labels = torch.as_tensor(labels, dtype=torch.long)
    if labels.ndim != 1 or len(labels) == 0:
        raise InputError(f"labels have shape {tuple(labels.shape)}; a list of at least one class is needed")
    check_labels(labels, model.num_classes)
    return labels, torch.full_like(labels, model.num_classes)


@torch.no_grad()
def _follow(
    predict: Callable[[Tensor, float, bool], Tensor],
    draw: Callable[[int], Tensor],
    start: Tensor,
    config: SamplingConfig,
) -> Iterator[State]:
    image = start  # the clean image last estimated
    draws = count(1)

    def velocity(x: Tensor, t: float, step_start: float) -> Tensor:
        nonlocal image
        v = predict(x, t, config.guides(step_start))
        image = x + (1 - t) * v
        return v

    times = time_grid(config.steps, config.shift)
    states = SOLVERS[config.solver](velocity, start, times, lambda: draw(next(draws)))
    for step, x in enumerate(states, start=1):
        yield State(step, times[step], x, image)


def network_passes(config: SamplingConfig) -> int:
    """How many images the network sees for each that is drawn; a guided evaluation is two, with and without label."""
    passes = 0

    def predict(x: Tensor, t: float, guided: bool) -> Tensor:
        nonlocal passes
        passes += 2 if guided else 1
        return x

    start = torch.zeros(1)
    deque(_follow(predict, lambda step: start, start, config), maxlen=0)
    return passes


def sample(model: PixNerd | TextPixNerd, labels: Tensor | Sequence[int], **options) -> Tensor:
    """The images [B, C, H, W], about [−1, 1], at the end of `trajectory(model, labels, **options)`."""
    return deque(trajectory(model, labels, **options), maxlen=1).pop().x


def sample_batches(
    model: PixNerd | TextPixNerd,
    labels: Tensor,
    config: SamplingConfig,
    *,
    unconditional: Tensor | None = None,
    size: tuple[int, int] | None = None,
    base_resolution: tuple[int, int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[Tensor]:
    """Many images, batch by batch [≤ batch_size, C, H, W]; image i starts at noise (seed, i).

    Args: see `trajectory`. Raises InputError before the first batch.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it has to be at least 1")
    _conditions(model, labels, unconditional, config)
    check_resolution(model.config, size or (model.config.image_size,) * 2, base_resolution)
    where = {"size": size, "base_resolution": base_resolution}
    settings = {**dataclasses.asdict(config), **where, "unconditional": unconditional, "seed": seed}
    batches = torch.arange(len(labels)).split(batch_size)
    return (sample(model, labels[batch], indices=batch.tolist(), **settings) for batch in batches)
