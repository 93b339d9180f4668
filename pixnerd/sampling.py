"""Sampling: from noise, by a guided velocity and a solver, to an image.

t = 0 is noise and t = 1 is data. Dimension letters: B images, C channels, H × W pixels.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .config import STUDENT_SAMPLING, SamplingConfig
from .errors import InputError
from .model import PatchDenoiser
from .model_config import check_resolution
from .randomness import Purpose, generator
from .solvers import SOLVERS, STUDENT_SOLVER, time_grid


@dataclass(frozen=True)
class State:
    """The state of a trajectory after a step."""

    step: int
    """steps completed, 1 … n"""
    t: float
    """time reached; 1 after the last step"""
    x: Tensor
    """the images so far, x_t [B, C, H, W]"""
    image: Tensor
    """the estimate x̂ of the clean images by the step's last velocity, x + (1 − t)·v, [B, C, H, W]"""


# (x [B, …], t, whether it is guided, the end of a student's interval) → velocity [B, …]
Predict = Callable[[Tensor, float, bool, float | None], Tensor]


def sample_noise(shape: tuple[int, int, int], indices: Sequence[int], seed: int = 0, step: int = 0) -> Tensor:
    """Noise [len(indices), C, H, W]: image i gets that of (seed, i, step), regardless of the rest of the batch.

    Step 0 is the start of sampling; the stochastic solver requests more noise for its steps 1, 2, ….
    """
    cpu = torch.device("cpu")  # on every machine, so that a seed gives the same image with or without a GPU
    keyed = (generator(cpu, seed, Purpose.SAMPLE_NOISE, index, step) for index in indices)
    return torch.stack([torch.randn(shape, generator=g, device=cpu) for g in keyed])


def trajectory(
    model: PatchDenoiser,
    labels: Tensor | Sequence[int],
    config: SamplingConfig | None = None,
    *,
    unconditional: Tensor | None = None,
    weaker: PatchDenoiser | None = None,
    noise: Tensor | None = None,
    size: tuple[int, int] | None = None,
    base_resolution: tuple[int, int] | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[State]:
    """Sample step by step; yields one State per step.

    Guidance is v_u + w·(v_c − v_u) (Ho & Salimans 2207.12598) for steps that start strictly inside `interval`
    (Kynkäänniemi et al. 2404.07724); outside it the unconditional half is not computed. With a `weaker` model, its
    velocity for the same condition stands in for v_u (autoguidance, Karras et al. 2406.02507). A few-step student is
    followed by the solver "map", without guidance.

    Args:
        model: velocity network, or a student; its device and dtype are used, and the caller's autocast.
        labels: [B] classes, 0 … num_classes (num_classes is "no label"); for a text model, text features [B, L, F].
        config: how to sample; by default as published, or with four steps of a student.
        unconditional: for a text model with guidance, the features [L, F] of the empty caption.
        weaker: the model that `config.guide` names, or any other of the same data, on the same device.
        noise: the start [B, C, H, W]; by default `sample_noise` for the indices.
        size: (H, W) of that default noise; by default the size the model was trained at.
        base_resolution: (h, w) that the transformer sees while the head decodes H × W; by default the same.
        seed: seed of all noise.
        indices: indices of these images, which together with the seed decide their noise; by default 0 … B−1.
        options: fields of SamplingConfig that replace those of `config`: steps, solver, guidance, interval, shift.

    Raises:
        InputError: at the call, before any computation.
    """
    config = dataclasses.replace(config or (STUDENT_SAMPLING if model.config.student else SamplingConfig()), **options)
    condition = model.as_condition(labels)
    _check_models(model, condition, weaker, config)
    unconditional = _unconditional(model, condition, unconditional, config) if weaker is None else condition
    indices = range(len(condition)) if indices is None else indices
    if noise is not None and (noise.ndim != 4 or noise.shape[1] != model.config.channels):
        raise InputError(f"noise has shape {tuple(noise.shape)}; [B, {model.config.channels}, H, W] is needed")
    for name, sides in (("size", size), ("base_resolution", base_resolution)):
        if sides is not None and not (isinstance(sides, Sequence) and len(sides) == 2):
            raise InputError(f"{name} is {sides!r}; a height and a width in pixels are needed")
    if noise is not None and size is not None and tuple(noise.shape[2:]) != tuple(size):
        raise InputError(f"size {size} and noise of {tuple(noise.shape[2:])} pixels disagree; give one of them")
    height, width = noise.shape[2:] if noise is not None else size or (model.config.image_size,) * 2
    check_resolution(model.config, (height, width), base_resolution)
    if noise is None:
        noise = sample_noise((model.config.channels, height, width), indices, seed)
    if not len(noise) == len(condition) == len(indices):
        counts = f"{len(noise)} images of noise, {len(condition)} conditions, {len(indices)} indices"
        raise InputError(f"there are {counts}; the numbers have to match")

    weight = model.patch_embed.weight
    start = noise.to(weight.device, weight.dtype)
    condition, unconditional = condition.to(weight.device), unconditional.to(weight.device)

    def more_noise(step: int) -> Tensor:
        return sample_noise(tuple(start.shape[1:]), indices, seed, step).to(start)

    predict = _prediction(model, weaker, condition, unconditional, base_resolution, config.guidance)
    return _follow(predict, more_noise, start, config)


def _prediction(
    model: PatchDenoiser,
    weaker: PatchDenoiser | None,
    condition: Tensor,
    unconditional: Tensor,
    base_resolution: tuple[int, int] | None,
    guidance: float,
) -> Predict:
    """The function that a solver's velocities come from: guided or not, or a student's mean velocity."""

    def predict(x: Tensor, t: float, guided: bool, end: float | None = None) -> Tensor:
        times = x.new_full((len(x),), t)  # [B]
        if end is not None:
            return model(x, times, condition, base_resolution, r=torch.full_like(times, end))
        if not guided:
            return model(x, times, condition, base_resolution)
        if weaker is not None:
            conditional_v, other_v = (network(x, times, condition, base_resolution) for network in (model, weaker))
        else:
            both = torch.cat((condition, unconditional))
            conditional_v, other_v = model(x.repeat(2, 1, 1, 1), times.repeat(2), both, base_resolution).chunk(2)
        return other_v + guidance * (conditional_v - other_v)

    return predict


def _check_models(
    model: PatchDenoiser, condition: Tensor, weaker: PatchDenoiser | None, config: SamplingConfig
) -> None:
    """Raise InputError unless the solver can follow the model and the weaker one knows the condition [B, …] too."""
    follows = config.solver == STUDENT_SOLVER
    if model.config.student and not follows:
        raise InputError(
            f"solver is {config.solver!r}; this model is a few-step student, which only {STUDENT_SOLVER!r} can follow"
        )
    if follows and not model.config.student:
        raise InputError(
            f"solver {STUDENT_SOLVER!r} follows a few-step student and this model is none; take another solver, or "
            "make a student with pixnerd train --distil"
        )
    if weaker is None:
        if config.guide:
            raise InputError(f"guide is {config.guide}, whose model has to be given as well, as `weaker`")
        return
    same = weaker.num_classes == model.num_classes and weaker.config.channels == model.config.channels
    if weaker.config.student or not same:
        raise InputError(
            f"the guide is {_kind(weaker)}; {_kind(model)} is guided by a model of the same images that is no student"
        )
    weaker.as_condition(condition)


def _kind(model: PatchDenoiser) -> str:
    what = "a text model" if model.num_classes is None else f"a model of {model.num_classes} classes"
    return f"{what} with {model.config.channels} channels{' and a student' * model.config.student}"


def _unconditional(model: PatchDenoiser, condition: Tensor, given: Tensor | None, config: SamplingConfig) -> Tensor:
    """The unconditional counterpart of a condition [B, …], in the same shape; without guidance the condition itself."""
    if given is not None:
        return model.as_condition(given[None]).to(condition).expand_as(condition)
    found = condition if config.guidance == 1 else model.unconditional(condition)
    if found is None:
        raise InputError(
            f"guidance {config.guidance} from text needs `unconditional`, the features of the empty caption"
        )
    return found


@torch.no_grad()
def _follow(
    predict: Predict,
    more_noise: Callable[[int], Tensor],
    start: Tensor,
    config: SamplingConfig,
) -> Iterator[State]:
    image = start  # the latest estimate of the clean image
    numbers = count(1)

    def velocity(x: Tensor, t: float, step_start: float, end: float | None = None) -> Tensor:
        nonlocal image
        v = predict(x, t, config.guides(step_start), end)
        image = x + (1 - t) * v
        return v

    times = time_grid(config.steps, config.shift)
    states = SOLVERS[config.solver](velocity, start, times, lambda: more_noise(next(numbers)))
    for step, x in enumerate(states, start=1):
        yield State(step, times[step], x, image)


def network_passes(config: SamplingConfig) -> int:
    """Network passes per sample; a guided evaluation counts as two, of the model and of what guides it."""
    passes = 0

    def predict(x: Tensor, t: float, guided: bool, end: float | None) -> Tensor:
        nonlocal passes
        passes += 2 if guided else 1
        return x

    start = torch.zeros(1)
    deque(_follow(predict, lambda step: start, start, config), maxlen=0)
    return passes


def sample(
    model: PatchDenoiser, labels: Tensor | Sequence[int], config: SamplingConfig | None = None, **options: Any
) -> Tensor:
    """The images [B, C, H, W], about [−1, 1], at the end of `trajectory(model, labels, config, **options)`."""
    return deque(trajectory(model, labels, config, **options), maxlen=1).pop().x


def sample_batches(
    model: PatchDenoiser,
    labels: Tensor,
    config: SamplingConfig,
    *,
    unconditional: Tensor | None = None,
    weaker: PatchDenoiser | None = None,
    size: tuple[int, int] | None = None,
    base_resolution: tuple[int, int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[Tensor]:
    """Many samples, batch by batch [≤ batch_size, C, H, W]; image i starts from noise (seed, i).

    Args: see `trajectory`. Raises InputError before the first batch.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it has to be at least 1")
    condition = model.as_condition(labels)
    _check_models(model, condition, weaker, config)
    if weaker is None:
        _unconditional(model, condition, unconditional, config)
    check_resolution(model.config, size or (model.config.image_size,) * 2, base_resolution)
    options = {"unconditional": unconditional, "weaker": weaker, "size": size, "seed": seed}
    options["base_resolution"] = base_resolution
    batches = torch.arange(len(condition)).split(batch_size)
    return (sample(model, condition[batch], config, indices=batch.tolist(), **options) for batch in batches)
