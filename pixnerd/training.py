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
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter

from . import data, flow
from .alignment import CachedTeacher, Projector, alignment_loss, load_teacher
from .checkpoints import load, load_training_state, newest_checkpoint, save_checkpoint
from .data import ImageDataset, to_float
from .distributed import World, exchange_gradients, join, replicate, shard
from .distributed import default_device as default_device
from .encoders import CachedEncoder, TextEncoder, load_encoder
from .errors import InputError
from .fields import NeuralFieldHead
from .losses import PerceptualLoss, frequency_weighted, load_features, quantisation_tables
from .model import SIZES, ModelConfig, PixNerd, Recompute, check_resolution
from .randomness import Purpose, derived_seed, generator
from .runs import Run
from .sampling import SamplingConfig
from .text import TextModelConfig, TextPixNerd
from .throughput import forward_flops, matmul_rate


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the defaults are the published recipe for ImageNet 256 (arXiv 2507.23268).

    Raises InputError when a value is outside its range.
    """

    out: str = "runs/train"
    """the run's folder"""
    data: str = "folder:data/imagenet/train"
    """digits, emoji, emoji:WORDS, synthetic, shapes, shapes:held-out, folder:PATH, imagenet:PATH, prepared:PATH,
    captions:PATH or shards:PATH"""
    model: ModelConfig = SIZES["L/16"]
    """the network; its channels are set to the data's"""
    start_from: str = ""
    """a trained model to start from (what pixnerd.load takes); its moving average is taken. Empty: random weights"""
    decode_sizes: tuple[int, ...] = ()
    """pixels a side, one drawn for each step, that the fields decode while the transformer sees model.image_size;
    empty: that size alone"""
    steps: int = 800_000
    """optimiser steps of the whole run"""
    batch_size: int = 256
    """images a step, over all devices"""
    accumulate: int = 1
    """parts that a device computes its images of a step in, one after the other; saves memory, changes only rounding"""
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
    extra_ema_decays: tuple[float, ...] = ()
    """of further averages, kept beside it to choose from after the training (Karras et al. 2312.02696, section 3)"""
    label_dropout: float = 0.1
    """how often an image is shown without its label or caption, which is what guidance needs"""
    text_encoder: str = "Qwen/Qwen3-1.7B"
    """what reads the captions for a text model: minilm, a local folder, or a hub id"""
    cache_text: bool = True
    """keep every caption's features in memory and under data/text; with millions of captions they are too large"""
    align: str = ""
    """REPA: whose features a block's tokens are aligned with: facebook/dinov2-base, a folder, efficientnet; or none"""
    align_block: int = 8
    """the block, counted from 1; published: 8, and 6 for text"""
    align_weight: float = 0.5
    """of the alignment in the loss"""
    align_until: int | None = None
    """the step after which nothing is aligned any more; None: to the end"""
    cache_teacher: bool = False
    """keep the teacher's features of every image in memory; for small data sets"""
    frequency_quality: int | None = None
    """weigh the velocity error by frequency as JPEG of this quality does, 1 … 100 (DeCo, 2511.19365); None: alike"""
    perceptual: str = ""
    """add the distance of x̂ to the clean image in this network's features, from t = 0.3 on (PixelGen, 2602.02493):
    efficientnet, or a file of torch.export.save; empty: no such loss"""
    perceptual_weight: float = 0.1
    """of the perceptual loss in the loss"""
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
    shard: bool = False
    """keep only a part of weights, gradients and optimiser on every device (FSDP2) instead of all (DDP)"""
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
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it has to be at least 1")
        for name in ("learning_rate", "time_shift"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it has to be greater than 0")
        for name in ("warmup_steps", "weight_decay", "workers", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it cannot be negative")
        for name in ("ema_decay", "label_dropout", "extra_ema_decays"):
            value = getattr(self, name)
            if not all(0 <= share <= 1 for share in (value if isinstance(value, tuple) else (value,))):
                raise InputError(f"{name} is {value}; it has to lie between 0 and 1")
        if self.clip is not None and self.clip <= 0:
            raise InputError(f"clip is {self.clip}; it has to be greater than 0, or None")
        if self.align and not 1 <= self.align_block <= self.model.blocks:
            raise InputError(f"align_block is {self.align_block}; the model has blocks 1 … {self.model.blocks}")
        for name in ("align_weight", "perceptual_weight"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if self.frequency_quality is not None:
            quantisation_tables(self.frequency_quality)
        for size in self.decode_sizes:
            check_resolution(self.model, (size, size), (self.model.image_size,) * 2)

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "TrainConfig":
        """Back from config.json; what an older version did not write yet has its default."""
        sampling = dict(entries["sampling"])
        sampling["interval"] = sampling["interval"] and tuple(sampling["interval"])
        kind = TextModelConfig if "text_length" in entries["model"] else ModelConfig
        nested = {"model": kind(**entries["model"]), "sampling": SamplingConfig(**sampling)}
        tuples = {
            name: tuple(entries[name]) for name in ("betas", "decode_sizes", "extra_ema_decays") if name in entries
        }
        return cls(**{**entries, **nested, **tuples})


class StepRecord(NamedTuple):
    """What `train` yields after every step."""

    step: int  # steps done, 1 … config.steps
    loss: Tensor  # 0-dim, on the training device: float(loss) waits for a GPU
    learning_rate: float
    model: PixNerd | TextPixNerd  # the moving average so far; it changes with the next step


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or not a number; the message names the step and the last good checkpoint."""


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


@functools.lru_cache(maxsize=2)  # the batch at the end of an epoch needs two
def shuffled(size: int, seed: int, epoch: int) -> Tensor:
    """The order [size] in which an epoch goes through the data set."""
    return torch.randperm(size, generator=generator(torch.device("cpu"), seed, Purpose.DATA_ORDER, epoch))


def step_indices(size: int, config: TrainConfig, step: int, positions: range) -> list[int]:
    """The data set's indices for the images at `positions` of a step's global batch: one shuffle after the other."""
    places = (step * config.batch_size + position for position in positions)
    return [int(shuffled(size, config.seed, place // size)[place % size]) for place in places]


def step_size(config: TrainConfig, step: int) -> int:
    """The side, in pixels, of the images of a step."""
    if not config.decode_sizes:
        return config.model.image_size
    g = generator(torch.device("cpu"), config.seed, Purpose.DECODE_SIZE, step)
    return config.decode_sizes[int(torch.randint(len(config.decode_sizes), (), generator=g))]


class StepBatch(NamedTuple):
    """What the data set gives for a step."""

    pixels: Tensor  # [B, C, S, S] uint8
    labels: Tensor  # [B]
    indices: Tensor  # [B]


class StepBatches(Dataset):
    """The batch of every step, by step; the data set is there once for each size that is decoded.

    Where an image cannot be read, the InputError that names it is handed over as a value: a worker process would wrap a
    raised error in a traceback of its own.
    """

    def __init__(self, datasets: dict[int, ImageDataset], config: TrainConfig, positions: range):
        self.datasets, self.config, self.positions = datasets, config, positions

    def __getitem__(self, step: int) -> StepBatch | InputError:
        dataset = self.datasets[step_size(self.config, step)]
        indices = step_indices(len(dataset), self.config, step, self.positions)
        try:
            return StepBatch(*dataset.batch(indices), torch.tensor(indices))
        except InputError as error:
            return error


class LossWindow:
    """The losses since the last line of the log: their mean, and the mean for each tenth of t in [0, 1]."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []  # 0-dim each, the means of all processes
        self.alignments: list[Tensor] = []  # 0-dim each, of this process; empty when nothing is aligned
        self.perceptual: list[Tensor] = []  # 0-dim each, of this process; empty without a perceptual loss
        self.norms: list[Tensor] = []  # 0-dim each, of the whole gradient before it is clipped
        self.per_image: list[Tensor] = []  # [B] each, of this process
        self.times: list[Tensor] = []  # [B] each, of this process

    def first_bad(self) -> int | None:
        """How many steps ago (1 = the last one) the loss first was not finite; None when all were."""
        finite = torch.stack(self.losses).isfinite().tolist()
        return None if all(finite) else len(finite) - finite.index(False)

    def summary(self, world: World) -> dict[str, Any]:
        """loss, gradient_norm, and loss_by_t: ten means, None for a tenth without images. Every process calls it."""
        per_image, t = (world.gather(torch.cat(values)).cpu() for values in (self.per_image, self.times))
        tenth = (10 * t).long().clamp(max=9)
        count = torch.bincount(tenth, minlength=10)
        total = torch.bincount(tenth, per_image.double(), minlength=10)
        by_t = [round(float(a / n), 6) if n else None for a, n in zip(total, count, strict=True)]
        means = {"loss": self.losses, "gradient_norm": self.norms}
        for name, losses in {"alignment": self.alignments, "perceptual": self.perceptual}.items():
            if losses:
                means[name] = [world.mean(torch.stack(losses).mean())]
        return {**{name: float(torch.stack(values).mean()) for name, values in means.items()}, "loss_by_t": by_t}


def train(config: TrainConfig, device: torch.device | None = None) -> Iterator[StepRecord]:
    """Train, or go on with the run in `config.out`; one StepRecord for each step that is still to do.

    Whoever iterates may stop at any step: the state is then saved, and the same call goes on from there.

    Under torchrun every process calls this, and each computes its part of every batch; `device` is by default its GPU.

    Raises:
        InputError: at the call, before any work: data, sizes or folder that cannot work.
        NonFiniteLoss: while iterating; the checkpoints written before stay.
    """
    world = join(device)
    sizes = config.decode_sizes or (config.model.image_size,)
    datasets = {size: data.load(config.data, size) for size in sizes}
    dataset = datasets[sizes[0]]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, channels=dataset.channels))
    if config.batch_size % (world.size * config.accumulate):
        raise InputError(
            f"batch_size {config.batch_size} cannot be shared evenly by {world.size} processes "
            f"in {config.accumulate} parts each"
        )
    is_text = isinstance(config.model, TextModelConfig)
    conditions = Captions(config, dataset, world.device) if is_text else Labels(dataset)
    run = Run(config.out)
    trained = newest_checkpoint(run.checkpoints)
    if trained is None and config.start_from:
        check_start(config, conditions)
    alignment = Alignment(config, world) if config.align else None
    perceptual = PerceptualLoss(load_features(config.perceptual, world.device)) if config.perceptual else None
    if world.leads:
        run.begin(config.to_dict())
    world.wait()
    return _train(config, datasets, conditions, alignment, perceptual, run, trained, world)


class Meter:
    """How fast a training goes, and how much of what the devices can do it uses.

    A step's arithmetic is counted as three forward passes, the usual estimate of forward and backward; what is computed
    again to save memory does not count. The best possible is what a large matrix product reaches on this device.
    """

    def __init__(self, config: TrainConfig, conditions: "Labels | Captions", dtype: torch.dtype, world: World):
        with torch.device("meta"):
            model = conditions.model(config).eval()
        sizes = config.decode_sizes or (config.model.image_size,)
        self.flops = 3 * sum(forward_flops(model, size) for size in sizes) / len(sizes)  # per image
        self.best = matmul_rate(world.device, dtype) * world.size
        self.device, self.since = world.device, time.perf_counter()

    def read(self, images: int) -> dict[str, float]:
        """The speed since the last reading, in which so many images went through all devices together."""
        now = time.perf_counter()
        speed, self.since = images / (now - self.since), now
        entry = {
            "images_per_second": round(speed, 2),
            "tflops": round(speed * self.flops / 1e12, 4),
            "utilisation": round(speed * self.flops / self.best, 4),
        }
        if self.device.type == "cuda":
            entry["memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        return entry


class Board:
    """TensorBoard's copy of log.jsonl."""

    def __init__(self, run: Run, step: int):
        self.writer = SummaryWriter(run.folder / "tensorboard", purge_step=step + 1)

    def add(self, entry: dict[str, Any]) -> None:
        tenths = {f"loss_by_t/{i / 10:.1f}": loss for i, loss in enumerate(entry["loss_by_t"]) if loss is not None}
        for name, value in {**entry, **tenths}.items():
            if isinstance(value, float):
                self.writer.add_scalar(name, value, entry["step"])


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


def caption_encoder(config: TrainConfig, device: torch.device) -> TextEncoder:
    """The frozen encoder of a text run, with its features cached under data/text if the run caches them.

    Raises:
        InputError: it is not there, or has another width than the model reads.
    """
    encoder = load_encoder(config.text_encoder, config.model.text_length, device)
    if encoder.features != config.model.text_features:
        raise InputError(
            f"text encoder {config.text_encoder} gives {encoder.features} features a token; "
            f"the model reads {config.model.text_features} (model.text_features)"
        )
    return CachedEncoder(encoder, data.cache_folder() / "text") if config.cache_text else encoder


def check_start(config: TrainConfig, conditions: Labels | Captions) -> None:
    """Raise InputError unless the weights of `config.start_from` are those of a network like the configured one."""
    source = load(config.start_from)
    with torch.device("meta"):
        model = conditions.model(config)
    kinds = [type(network).__name__ for network in (source, model)]
    if kinds[0] != kinds[1]:
        raise InputError(f"start_from {config.start_from} is a {kinds[0]}; this run trains a {kinds[1]}")
    ours = {"num_classes": getattr(model, "num_classes", None), **dataclasses.asdict(config.model)}
    theirs = {"num_classes": getattr(source, "num_classes", None), **dataclasses.asdict(source.config)}
    differ = [f"{name} {theirs[name]} → {ours[name]}" for name in ours if theirs[name] != ours[name]]
    differ = [words for words in differ if not words.startswith("image_size")]  # the weights fit every size
    if differ:
        raise InputError(f"start_from {config.start_from} is another network: {', '.join(differ)}")


def build_models(
    config: TrainConfig, conditions: Labels | Captions, world: World, fresh: bool
) -> dict[str, PixNerd | TextPixNerd]:
    """The model to train, "model", and its moving averages, "ema" and one for each extra decay, all equal so far."""
    models = {}
    for name in ("model", *ema_decays(config)):
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(config.seed, Purpose.INITIAL_WEIGHTS))
            models[name] = conditions.model(config).to(world.device)
    if fresh and config.start_from:
        weights = load(config.start_from, device=world.device).state_dict()
        for model in models.values():
            model.load_state_dict(weights)
    for name, model in models.items():
        if config.shard:
            shard(model, world)
        if name != "model":
            model.eval().requires_grad_(False)
    return models


class Alignment:
    """REPA (Yu et al. 2410.06940): a block's tokens, through a trained projector, should resemble a teacher's features.

    The teacher sees the clean image, mirrored where the model's is.
    """

    def __init__(self, config: TrainConfig, world: World):
        teacher = load_teacher(config.align, world.device)
        self.teacher = CachedTeacher(teacher) if config.cache_teacher else teacher
        self.config = config
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(config.seed, Purpose.PROJECTOR_WEIGHTS))
            self.projector = Projector(config.model.width, teacher.features).to(world.device)
        if config.shard:
            shard(self.projector, world)
        self.spread = replicate(self.projector, world)

    def loss(self, tokens: Tensor, image: Tensor, indices: Tensor, flipped: Tensor) -> Tensor:
        """0-dim. Tokens [B, N, D]; clean images [B, C, H, W], their indices [B], and whether each is mirrored [B]."""
        side = self.config.model.image_size // self.config.model.patch_size
        if isinstance(self.teacher, CachedTeacher):
            keys = list(zip(indices.tolist(), flipped.tolist(), [image.shape[-1]] * len(image), strict=True))
            target = self.teacher(image, (side, side), keys)
        else:
            target = self.teacher(image, (side, side))
        return alignment_loss(self.spread(tokens), target).mean()


def ema_decays(config: TrainConfig) -> dict[str, float]:
    """A checkpoint's name for every moving average → its decay."""
    return {"ema": config.ema_decay, **{f"ema-{decay:g}": decay for decay in config.extra_ema_decays}}


@torch.no_grad()
def update_averages(models: dict[str, PixNerd | TextPixNerd], config: TrainConfig, step: int) -> None:
    """Move every average towards the weights after `step` steps; after the first it is the weights."""
    for name, decay in ema_decays(config).items():
        average, weights = (
            [p.to_local() if isinstance(p, DTensor) else p for p in models[which].parameters()]
            for which in (name, "model")
        )
        if step == 1:
            torch._foreach_copy_(average, weights)
        else:
            get_ema_multi_avg_fn(decay)(average, weights, step)


def _train(
    config: TrainConfig,
    datasets: dict[int, ImageDataset],
    conditions: Labels | Captions,
    alignment: Alignment | None,
    perceptual: PerceptualLoss | None,
    run: Run,
    checkpoint: Path | None,
    world: World,
) -> Iterator[StepRecord]:
    device = world.device
    on_gpu = device.type == "cuda"
    models = build_models(config, conditions, world, fresh=checkpoint is None)
    model = models["model"].train()
    trained = list(model.parameters())
    if alignment is not None:
        models["projector"] = alignment.projector
        trained += alignment.projector.parameters()
    optimizer = torch.optim.AdamW(trained, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    saved = 0
    if checkpoint is not None:
        saved = load_training_state(checkpoint, models, optimizer)
        if world.leads:
            run.cut_log(saved)
    if config.compile == "on" or (config.compile == "auto" and on_gpu):
        compile_regions(model)
    bf16 = config.precision == "bfloat16" or (config.precision == "auto" and on_gpu)
    spread = replicate(model, world)

    positions = world.positions(config.batch_size)
    loader = DataLoader(
        StepBatches(datasets, config, positions),
        batch_size=None,
        sampler=range(saved, config.steps),
        num_workers=config.workers,
        pin_memory=on_gpu,
    )
    base_resolution = (config.model.image_size,) * 2 if config.decode_sizes else None
    measure = flow.mean_square
    if config.frequency_quality is not None:
        measure = functools.partial(frequency_weighted, quality=config.frequency_quality)
    board = Board(run, saved) if world.leads else None
    meter = Meter(config, conditions, torch.bfloat16 if bf16 else torch.float32, world)
    window = LossWindow()
    step = saved  # steps whose result is in the weights; only between updates are these whole
    whole = True

    def save() -> None:
        nonlocal saved
        if step > saved:
            save_checkpoint(run.checkpoints, step, models, optimizer, config.keep_checkpoints, world)
            saved = step

    try:
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            pixels, labels, indices = (tensor.to(device, non_blocking=True) for tensor in batch)
            draws = draw_step(config, step, positions, tuple(pixels.shape[1:]), device)
            image = to_float(pixels)
            image = torch.where(draws.flipped[:, None, None, None], image.flip(-1), image)
            condition = conditions(labels, indices, draws)

            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            means = []
            tensors = (image, condition, draws.noise, draws.t, indices, draws.flipped)
            aligns = alignment is not None and (config.align_until is None or step < config.align_until)
            model.tap = config.align_block if aligns else None
            parts = zip(*(tensor.chunk(config.accumulate) for tensor in tensors), strict=True)
            for part, (x, y, noise, t, index, flipped) in enumerate(parts, start=1):
                exchange_gradients(spread, part == config.accumulate)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    losses = flow.loss(spread, x, y, noise, t, base_resolution, measure)
                    total = losses.mean
                    if aligns:
                        exchange_gradients(alignment.spread, part == config.accumulate)
                        aligned = alignment.loss(model.tapped, x, index, flipped)
                        total = total + config.align_weight * aligned
                        window.alignments.append(aligned.detach())
                    if perceptual is not None:
                        perceived = perceptual(losses.clean, x, t).mean()
                        total = total + config.perceptual_weight * perceived
                        window.perceptual.append(perceived.detach())
                (total / config.accumulate).backward()
                means.append(losses.mean.detach())
                window.per_image.append(losses.per_image)
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            if config.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(trained, config.clip, norm)
            loss = world.mean(torch.stack(means).mean())
            window.losses.append(loss)
            window.norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            window.times.append(draws.t)
            logs = (step + 1) % config.log_every == 0 or step + 1 == config.steps
            saves = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
            if (logs or saves or not on_gpu) and (ago := window.first_bad()) is not None:
                kept = f"step {saved} is kept in {run.checkpoints}" if saved else "there was no checkpoint yet"
                whole = False
                raise NonFiniteLoss(f"the loss of step {step + 2 - ago} is not finite; {kept}")

            whole = False
            optimizer.step()
            update_averages(models, config, step + 1)
            step, whole = step + 1, True
            if logs:
                entry = {"step": step, **window.summary(world), "learning_rate": rate}
                entry |= meter.read(len(window.losses) * config.batch_size)
                if board is not None:
                    run.log(entry)
                    board.add(entry)
                window = LossWindow()
            if saves:
                save()
            yield StepRecord(step, loss, rate, models["ema"])
    except BaseException as reason:  # whatever stops the loop, closing the generator included, the steps done are kept
        together = world.size == 1 or isinstance(reason, GeneratorExit)  # one process alone cannot save for all
        if whole and together and not (window.losses and window.first_bad()):
            save()
        raise
    finally:
        if board is not None:
            board.writer.close()


def compile_regions(model: PixNerd | TextPixNerd) -> None:
    """torch.compile each repeated part on its own: as fast as the whole at once, and every block compiles only once."""
    for block in model.blocks:
        block.compile()
    if isinstance(model.head, NeuralFieldHead):
        model.head.decode = torch.compile(model.head.decode, dynamic=False)  # once for each size that it decodes
