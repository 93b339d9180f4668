"""Training: one loop, as a generator of typed records, for the notebook, the command line and the tests alike.

Everything random in step n derives from (seed, n, position in the global batch), see `randomness.py`, so a run that
was stopped and resumed equals one that was not.
"""

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler

from . import data, flow
from .checkpoints import load_training_state, newest_checkpoint, save_checkpoint
from .data import ImageDataset, to_float
from .encoders import CachedEncoder, load_encoder
from .errors import InputError
from .fields import NeuralFieldHead
from .model import SIZES, ModelConfig, PixNerd, Recompute
from .randomness import Purpose, derived_seed, generator
from .runs import Run
from .sampling import SamplingConfig
from .text import TextModelConfig, TextPixNerd


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the defaults are the published recipe for ImageNet 256 (arXiv 2507.23268).

    Raises InputError when a value is outside its range.
    """

    out: str = "runs/train"
    """the run's folder"""
    data: str = "folder:data/imagenet/train"
    """digits, emoji, synthetic or folder:PATH"""
    model: ModelConfig = SIZES["L/16"]
    """the network; its channels are set to the data's"""
    steps: int = 800_000
    """optimiser steps of the whole run"""
    batch_size: int = 256
    """images a step, over all devices"""
    learning_rate: float = 1e-4
    """AdamW's, after warm-up"""
    warmup_steps: int = 0
    """linear rise of the learning rate from 0"""
    decay: Literal["constant", "linear"] = "constant"
    """the learning rate after warm-up: as it is, or in a line to 0 at the last step"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's"""
    weight_decay: float = 0.0
    """AdamW's, on all weights"""
    clip: float | None = None
    """largest norm of the gradient; None does not clip"""
    ema_decay: float = 0.9999
    """of the moving average of the weights, which sampling uses"""
    label_dropout: float = 0.1
    """how often an image is shown without its label or caption, which is what guidance needs"""
    text_encoder: str = "Qwen/Qwen3-1.7B"
    """what reads the captions for a text model: minilm, a local folder, or a hub id"""
    time_shift: float = 1.0
    """of the training times; above 1 means more noise"""
    horizontal_flip: bool = False
    """mirror every second image"""
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 is autocast, the weights stay float32; auto: bfloat16 on a GPU, float32 on a CPU"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of every block and of the field; auto: on a GPU only, it takes half a minute on a CPU"""
    recompute: Recompute = "head"
    """what the backward pass computes again instead of keeping it"""
    workers: int = 0
    """processes that load images; 0 loads in this one"""
    log_every: int = 50
    """steps between lines of log.jsonl"""
    checkpoint_every: int = 5_000
    """steps between checkpoints; there is always one at the end"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """how this run's model is sampled unless said otherwise"""

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it has to be at least 1")
        for name in ("learning_rate", "time_shift"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it has to be greater than 0")
        for name in ("warmup_steps", "weight_decay", "workers", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it cannot be negative")
        for name in ("ema_decay", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it has to lie between 0 and 1")
        if self.clip is not None and self.clip <= 0:
            raise InputError(f"clip is {self.clip}; it has to be greater than 0, or None")

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "TrainConfig":
        """Back from config.json."""
        sampling = dict(entries["sampling"])
        sampling["interval"] = sampling["interval"] and tuple(sampling["interval"])
        kind = TextModelConfig if "text_length" in entries["model"] else ModelConfig
        nested = {"model": kind(**entries["model"]), "sampling": SamplingConfig(**sampling)}
        return cls(**{**entries, **nested, "betas": tuple(entries["betas"])})


class StepRecord(NamedTuple):
    """What `train` yields after every step."""

    step: int  # steps done, 1 … config.steps
    loss: Tensor  # 0-dim, on the training device: float(loss) waits for a GPU
    learning_rate: float
    model: PixNerd | TextPixNerd  # the moving average so far; it changes with the next step


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or not a number; the message names the step and the last good checkpoint."""


def default_device() -> torch.device:
    """A GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_can_compile() -> bool:
    """Whether torch.compile has the C++ compiler that it needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; in software they are slower than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step 0 … steps − 1."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warm * (1 - step / config.steps if config.decay == "linear" else 1.0)


class StepDraws(NamedTuple):
    """All that is random in a step, for the images at some positions of its global batch."""

    noise: Tensor  # [B, C, H, W] standard normal
    t: Tensor  # [B] in (0, 1)
    dropped: Tensor  # [B] bool: show without label
    flipped: Tensor  # [B] bool: show mirrored
    caption: Tensor  # [B] in [0, 1): which of an image's captions to show


def draw_step(
    config: TrainConfig, step: int, positions: range, shape: tuple[int, int, int], device: torch.device
) -> StepDraws:
    """The draws of `step` for the images at `positions` of the global batch, each of shape [C, H, W]."""
    noise, normal, uniform, caption = [], [], [], []
    for position in positions:
        g = generator(device, config.seed, Purpose.TRAINING_STEP, step, position)
        normal.append(torch.randn((), generator=g, device=device))
        uniform.append(torch.rand(2, generator=g, device=device))
        noise.append(torch.randn(shape, generator=g, device=device))
        caption.append(torch.rand((), generator=g, device=device))
    drop, flip = torch.stack(uniform).unbind(1)
    t = flow.logit_normal_time(torch.stack(normal), config.time_shift)
    flipped = flip < 0.5 if config.horizontal_flip else torch.zeros_like(flip, dtype=torch.bool)
    return StepDraws(torch.stack(noise), t, drop < config.label_dropout, flipped, torch.stack(caption))


class DataOrder(Sampler[list[int]]):
    """The data set's indices for each step from `first` on: one shuffle after the other, each from (seed, epoch)."""

    def __init__(self, size: int, config: TrainConfig, first: int):
        self.size, self.config, self.first = size, config, first

    def __len__(self) -> int:
        return self.config.steps - self.first

    def __iter__(self) -> Iterator[list[int]]:
        cpu, epoch, shuffled = torch.device("cpu"), -1, []
        for step in range(self.first, self.config.steps):
            indices = []
            for place in range(step * self.config.batch_size, (step + 1) * self.config.batch_size):
                if place // self.size != epoch:
                    epoch = place // self.size
                    g = generator(cpu, self.config.seed, Purpose.DATA_ORDER, epoch)
                    shuffled = torch.randperm(self.size, generator=g).tolist()
                indices.append(shuffled[place % self.size])
            yield indices


def read_batch(dataset: ImageDataset, indices: list[int]) -> tuple[Tensor, Tensor, Tensor] | InputError:
    """uint8 images, labels and indices; where an image cannot be read, the InputError that names it, as a value.

    A worker process would wrap a raised error in a traceback of its own; handing it over keeps the sentence.
    """
    try:
        return *dataset.batch(indices), torch.tensor(indices)
    except InputError as error:
        return error


class LossWindow:
    """The losses since the last line of the log: their mean, and the mean for each tenth of t in [0, 1]."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []  # 0-dim each
        self.per_image: list[Tensor] = []  # [B] each
        self.times: list[Tensor] = []  # [B] each

    def add(self, losses: flow.FlowLoss, t: Tensor) -> None:
        self.losses.append(losses.mean.detach())
        self.per_image.append(losses.per_image)
        self.times.append(t)

    def first_bad(self) -> int | None:
        """How many steps ago (1 = the last one) the loss first was not finite; None when all were."""
        finite = torch.stack(self.losses).isfinite().tolist()
        return None if all(finite) else len(finite) - finite.index(False)

    def summary(self) -> dict[str, Any]:
        """loss, and loss_by_t: ten means, None for a tenth without images."""
        per_image, t = torch.cat(self.per_image).cpu(), torch.cat(self.times).cpu()
        tenth = (10 * t).long().clamp(max=9)
        count = torch.bincount(tenth, minlength=10)
        total = torch.bincount(tenth, per_image.double(), minlength=10)
        by_t = [round(float(a / n), 6) if n else None for a, n in zip(total, count, strict=True)]
        return {"loss": float(torch.stack(self.losses).mean()), "loss_by_t": by_t}


def train(config: TrainConfig, device: torch.device | None = None) -> Iterator[StepRecord]:
    """Train, or go on with the run in `config.out`; one StepRecord for each step that is still to do.

    Whoever iterates may stop at any step: the state is then saved, and the same call goes on from there.

    Raises:
        InputError: at the call, before any work: data, sizes or folder that cannot work.
        NonFiniteLoss: while iterating; the checkpoints written before stay.
    """
    device = device or default_device()
    dataset = data.load(config.data, config.model.image_size)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, channels=dataset.channels))
    conditions = Captions(config, dataset, device) if isinstance(config.model, TextModelConfig) else Labels(dataset)
    run = Run(config.out)
    run.begin(config.to_dict())
    checkpoint = newest_checkpoint(run.checkpoints)
    return _train(config, dataset, conditions, run, checkpoint, device)


class Labels:
    """What a class-conditional model is told about an image: its label, or num_classes where that is dropped."""

    def __init__(self, dataset: ImageDataset):
        self.num_classes = dataset.num_classes

    def model(self, config: TrainConfig) -> PixNerd:
        return PixNerd(config.model, self.num_classes, config.recompute)

    def __call__(self, labels: Tensor, indices: Tensor, draws: StepDraws) -> Tensor:
        """[B]"""
        return labels.masked_fill(draws.dropped, self.num_classes)


class Captions:
    """What a text model is told about an image: one of its captions, or the empty one where that is dropped."""

    def __init__(self, config: TrainConfig, dataset: ImageDataset, device: torch.device):
        if not dataset.captions:
            raise InputError(f"data set {config.data!r} has no captions; a text model needs them")
        self.captions = dataset.captions
        self.encode = caption_encoder(config, device)

    def model(self, config: TrainConfig) -> TextPixNerd:
        return TextPixNerd(config.model, config.recompute)

    def __call__(self, labels: Tensor, indices: Tensor, draws: StepDraws) -> Tensor:
        """[B, L, F]"""
        chosen = []
        for index, choice, dropped in zip(
            indices.tolist(), draws.caption.tolist(), draws.dropped.tolist(), strict=True
        ):
            ways = self.captions[index]
            chosen.append("" if dropped else ways[int(choice * len(ways))])
        return self.encode(chosen).to(draws.noise.device)


def caption_encoder(config: TrainConfig, device: torch.device) -> CachedEncoder:
    """The frozen encoder of a text run, with its features cached under data/text.

    Raises:
        InputError: it is not there, or has another width than the model reads.
    """
    encoder = load_encoder(config.text_encoder, config.model.text_length, device)
    if encoder.features != config.model.text_features:
        raise InputError(
            f"text encoder {config.text_encoder} gives {encoder.features} features a token; "
            f"the model reads {config.model.text_features} (model.text_features)"
        )
    return CachedEncoder(encoder, data.cache_folder() / "text")


def _train(
    config: TrainConfig,
    dataset: ImageDataset,
    conditions: Labels | Captions,
    run: Run,
    checkpoint: Path | None,
    device: torch.device,
) -> Iterator[StepRecord]:
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(config.seed, Purpose.INITIAL_WEIGHTS))
        model = conditions.model(config).to(device).train()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    ema.module.eval()
    optimizer = torch.optim.AdamW(model.parameters(), betas=config.betas, weight_decay=config.weight_decay, fused=True)
    saved = 0
    if checkpoint is not None:
        saved = load_training_state(checkpoint, model, ema.module, optimizer)
        ema.n_averaged.fill_(saved)
        run.cut_log(saved)
    if config.compile == "on" or (config.compile == "auto" and on_gpu):
        compile_regions(model)
    bf16 = config.precision == "bfloat16" or (config.precision == "auto" and on_gpu)

    loader = DataLoader(
        range(len(dataset)),
        batch_sampler=DataOrder(len(dataset), config, saved),
        collate_fn=functools.partial(read_batch, dataset),
        num_workers=config.workers,
        pin_memory=on_gpu,
    )
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    window, since = LossWindow(), time.perf_counter()
    step = saved  # steps whose result is in the weights; only between updates are these whole
    whole = True

    def save() -> None:
        nonlocal saved
        if step > saved:
            save_checkpoint(run.checkpoints, step, model, ema.module, optimizer, config.keep_checkpoints)
            saved = step

    try:
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            pixels, labels, indices = (tensor.to(device, non_blocking=True) for tensor in batch)
            draws = draw_step(config, step, range(config.batch_size), shape, device)
            image = to_float(pixels)
            image = torch.where(draws.flipped[:, None, None, None], image.flip(-1), image)
            condition = conditions(labels, indices, draws)

            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                losses = flow.loss(model, image, condition, draws.noise, draws.t)
            optimizer.zero_grad()
            losses.mean.backward()
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            window.add(losses, draws.t)
            logs = (step + 1) % config.log_every == 0 or step + 1 == config.steps
            saves = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
            if (logs or saves or not on_gpu) and (ago := window.first_bad()) is not None:
                kept = f"step {saved} is kept in {run.checkpoints}" if saved else "there was no checkpoint yet"
                whole = False
                raise NonFiniteLoss(f"the loss of step {step + 2 - ago} is not finite; {kept}")

            whole = False
            optimizer.step()
            ema.update_parameters(model)
            step, whole = step + 1, True
            if logs:
                now = time.perf_counter()
                speed = len(window.losses) * config.batch_size / (now - since)
                entry = {"step": step, **window.summary(), "learning_rate": rate, "images_per_second": round(speed, 2)}
                run.log(entry)
                window, since = LossWindow(), now
            if saves:
                save()
            yield StepRecord(step, losses.mean.detach(), rate, ema.module)
    except BaseException:  # whatever stops the loop, closing the generator included, the steps done are kept
        if whole and not (window.losses and window.first_bad()):
            save()
        raise


def compile_regions(model: PixNerd | TextPixNerd) -> None:
    """torch.compile each repeated part on its own: as fast as the whole at once, and every block compiles only once."""
    for block in model.blocks:
        block.compile()
    if isinstance(model.head, NeuralFieldHead):
        model.head.decode = torch.compile(model.head.decode)
