"""How a network is trained, sampled and measured: every setting with its meaning, default and allowed values.

The defaults are the published ones (arXiv 2507.23268). Nothing here needs torch.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from typing_extensions import Doc  # the help of a field whose choices are named elsewhere

from . import averages, frozen
from .checks import Count, Decay, Index, NotNegative, Percent, Positive, Share, check_fields
from .data import NAMES as DATA_SET_NAMES
from .errors import InputError
from .model_config import (
    SIZES,
    FieldKernel,
    ModelConfig,
    Recompute,
    TextModelConfig,
    can_fuse,
    check_fused,
    check_resolution,
    model_config,
)
from .solvers import SOLVERS, STUDENT_SOLVER


class Released(NamedTuple):
    """A repository with the authors' weights on the Hugging Face hub."""

    file: str
    """the checkpoint that the published figures were measured with"""
    text: bool
    """whether the model is text-conditional"""


RELEASED = {
    "MCG-NJU/PixNerd-XL-P16-C2I": Released("epoch=319-step=1600000_emainit.ckpt", text=False),
    "MCG-NJU/PixNerd-XXL-P16-T2I": Released("model.ckpt", text=True),
}
Compile = Literal["auto", "on", "off"]
JPEG_BLOCK = 8  # pixels along a side
ALIGNED = "efficientnet, dinov2 (the large one), a DINOv2's folder or hub id (published: facebook/dinov2-base)"


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample; the defaults are the published ones for class-conditional images (arXiv 2507.23268).

    Raises InputError when a value is outside its range.
    """

    steps: Count = 100
    """solver steps"""
    solver: Annotated[str, Doc(f"one of {', '.join(SOLVERS)}")] = "euler"
    guidance: float = 3.5
    """w in v_u + w·(v_c − v_u); 1 means no guidance"""
    interval: tuple[float, float] | None = (0.1, 1.0)
    """guide only steps that start strictly inside; None guides every step"""
    shift: Positive = 1.0
    """shift of the time grid, see solvers.time_grid"""
    guide: str = ""
    """autoguidance (2406.02507): a weaker trained model that stands in for the one without a condition, such as an
    earlier checkpoint, RUN@STEP; empty: the model itself without a condition"""

    def __post_init__(self):
        check_fields(self)
        if self.solver not in SOLVERS:
            raise InputError(f"solver {self.solver!r} is unknown; known solvers: {', '.join(SOLVERS)}")
        _check_interval("interval", self.interval)
        if self.solver == STUDENT_SOLVER and self.guidance != 1:
            raise InputError(
                f"guidance is {self.guidance}; it has to be 1 with solver {STUDENT_SOLVER}: a student has learned the "
                "guided velocity of its teacher"
            )
        if self.guide and self.guidance == 1:
            raise InputError(f"guide is {self.guide}, but guidance 1 guides nothing: give another --guidance")

    def guides(self, t: float) -> bool:
        """Whether a step that starts at t is guided."""
        return self.guidance != 1 and (self.interval is None or self.interval[0] < t < self.interval[1])


def _check_interval(name: str, interval: tuple[float, float] | None) -> None:
    """Raise InputError unless a range of times is one."""
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise InputError(f"{name} is {interval}; it needs 0 ≤ low < high ≤ 1")


STUDENT_SAMPLING = SamplingConfig(steps=4, solver=STUDENT_SOLVER, guidance=1.0, interval=None)


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the defaults are the published recipe for ImageNet 256 (arXiv 2507.23268).

    Raises InputError when a value is outside its range.
    """

    out: str = "runs/train"
    """the run's folder"""

    # --- data ---
    data: Annotated[str, Doc(f"one of {DATA_SET_NAMES}")] = "folder:data/imagenet/train"
    decode_sizes: tuple[int, ...] = ()
    """image sides in pixels, one chosen at random for each step: what the fields decode while the transformer sees
    model.image_size; empty: that size alone"""
    horizontal_flip: bool = False
    """mirror each image with probability 1/2"""
    label_dropout: Share = 0.1
    """how often an image is shown without its label or caption, which guidance needs"""
    text_encoder: str = "Qwen/Qwen3-1.7B"
    """what reads the captions for a text model: minilm, a local folder, or a hub id"""
    cache_text: bool = True
    """keep every caption's features in memory and under data/text; too large for millions of captions"""
    workers: Index = 0
    """processes that load images; 0 loads them in this one"""
    seed: Index = 0
    """seed of the initial weights, data order, noise, times and dropout"""
    noise: Literal["torch", "philox"] = "torch"
    """where noise, times and dropout come from: torch's generators, whose numbers depend on the kind of device, or a
    counter-based one that gives the same numbers on a CPU and on every GPU"""

    # --- network ---
    model: ModelConfig = SIZES["L/16"]
    """the network; its channels are set to those of the data"""
    start_from: str = ""
    """trained model to start from (RUN, RUN@STEP, a .safetensors file, released weights), by its moving average. Empty:
    random weights"""

    # --- distillation: a few-step student of a trained model ---
    distil: Literal["", "shortcut", "meanflow", "fd"] = ""
    """train a student that samples in one to eight evaluations: shortcut, two half steps are one step (2410.12557);
    meanflow, the mean velocity's own equation (2505.13447); fd, the Fréchet distance of its images' features
    (2604.28190), for one step alone. Empty: train a velocity network"""
    teacher: str = ""
    """the trained model whose moving average is distilled, and which the student starts from unless start_from names
    another: RUN, RUN@STEP, a .safetensors file, released weights"""
    teacher_content: str = ""
    """the first digits of the sha256 of the teacher's weights, which the run records; other weights are refused"""
    teacher_guidance: float = 1.0
    """w of the teacher's velocity v_u + w·(v_c − v_u), which the student learns: it samples without guidance"""
    teacher_interval: tuple[float, float] | None = None
    """guide the teacher only at times strictly inside; None: at every time"""
    teacher_last: Share = 1.0
    """where the last step of distil=shortcut's teacher begins, which leads straight to the image predicted there: the
    nearest of the sixteen even times of its steps; 1: the last of them"""
    paths: Index = 0
    """paths that distil=shortcut's teacher follows once and keeps under data/paths, in float16; a step shows as many of
    them as it has images. 0: each step follows new ones, one for every sixteen images; for paths too large to keep"""
    fd_networks: tuple[str, ...] = ("efficientnet",)
    """whose features distil=fd and fd_weight compare, by names or files as `perceptual`; several distances are added"""
    fd_decay: Share = 0.999
    """decay of the moving averages of the features' moments"""
    fd_weight: NotNegative = 0.0
    """add this many times that distance to distil=shortcut, of the images in which its intervals end; 0: none"""

    # --- optimiser ---
    steps: Count = 800_000
    """optimiser steps of the complete run; one whose learning rate decays cannot be resumed with another number"""
    batch_size: Count = 256
    """images per step, over all devices"""
    learning_rate: Positive = 1e-4
    """AdamW's learning rate after warm-up"""
    warmup_steps: Index = 0
    """steps of linear warm-up of the learning rate from 0"""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """the learning rate after warm-up: constant, or decaying to 0 at the last step, along a line or half a cosine"""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's betas"""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay, on all weights"""
    clip: Positive | None = None
    """maximum gradient norm; None does not clip"""
    non_finite: Literal["stop", "skip"] = "stop"
    """when a step's loss or gradient is infinite or NaN: stop; or skip the step, which leaves weights, optimiser and
    averages as they are, and stop at the tenth in a row, for which a GPU has to wait at every step"""
    ema_decay: Share = 0.9999
    """decay of the moving average of the weights, which sampling uses"""
    extra_ema_decays: tuple[Share, ...] = ()
    """decays of further averages, to choose from after training"""
    power_averages: tuple[Positive, ...] = ()
    """widths of averages with power-function profiles, relative to the training so far, such as 0.05 0.1: from two of
    them, kept at several steps, `pixnerd average` makes any other (Karras et al. 2312.02696, section 3)"""
    average_every: Count = 1
    """update all averages after every k-th step alone, with the decay of k steps: a k-th of the memory traffic, for
    averages whose weights are (k − 1) / 2 steps older, of the 10,000 that a decay of 0.9999 looks back"""

    # --- losses ---
    time_shift: Positive = 1.0
    """shift of the training times; above 1 means more noise"""
    frequency_quality: Percent | None = None
    """weigh the velocity error by frequency as JPEG of this quality does, 1 … 100 (DeCo, 2511.19365); None: equally"""
    align: Annotated[str, Doc(f"REPA: whose features a block's tokens are aligned with: {ALIGNED}; empty: none")] = ""
    align_block: Count | None = None
    """the block whose tokens are aligned, counted from 1; None: the published one, 8, or 6 for a text model"""
    align_weight: NotNegative = 0.5
    """weight of the alignment loss"""
    align_until: int | None = None
    """the step after which alignment stops; None: never"""
    cache_teacher: bool = False
    """keep the teacher's features of every image in memory; for small data sets"""
    perceptual: str = ""
    """add the distance between x̂ and the clean image in this network's features, from t = 0.3 on (PixelGen,
    2602.02493): efficientnet, or a file written by torch.export.save; empty: no such loss"""
    perceptual_weight: NotNegative = 0.1
    """weight of the perceptual loss"""

    # --- precision, memory and devices ---
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 is autocast, the weights stay float32; auto: bfloat16 on a GPU, float32 on a CPU"""
    compile: Compile = "auto"
    """torch.compile for every block and the field; auto: only on a GPU, since a CPU takes up to a minute to compile"""
    recompute: Recompute = "head"
    """what the backward pass recomputes instead of storing"""
    field_kernel: Literal["auto", FieldKernel] = "auto"
    """what computes the field's blocks: torch, operator by operator, or fused, one kernel with less traffic of memory
    for NVIDIA GPUs; auto: fused where it was faster, compiled and in bfloat16 on Hopper GPUs such as the H100, unless
    weights are sharded"""
    accumulate: Count = 1
    """number of parts in which a device processes its share of a batch; saves memory, changes only rounding"""
    shard: bool = False
    """shard weights, gradients and optimiser state over the devices (FSDP2) instead of replicating them (DDP)"""

    deterministic: bool = False
    """compute only in ways that repeat bit for bit on the same kind of GPU; slower, see notebooks/a_run.md"""

    # --- logging and checkpoints ---
    log_every: Count = 50
    """steps between lines of log.jsonl"""
    checkpoint_every: Count = 5_000
    """steps between checkpoints; the last step always gets one"""
    keep_checkpoints: Count = 2
    """how many of the newest checkpoints to keep"""
    keep_every: Count | None = None
    """also keep every checkpoint whose step is a multiple of this; None: only the newest"""

    # --- sampling ---
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """default sampling settings for this run's model"""

    def __post_init__(self):
        check_fields(self)
        if self.align and self.aligned_block > self.model.blocks:
            raise InputError(f"align_block is {self.aligned_block}; the model has blocks 1 … {self.model.blocks}")
        self.average_decays(1)  # knows each width
        if self.average_every > self.steps:
            raise InputError(
                f"average_every is {self.average_every}; a training run of {self.steps} steps would have no average"
            )
        self._check_distillation()
        if self.field_kernel == "fused":
            check_fused(self.model)
        for size in self.decode_sizes:
            check_resolution(self.model, (size, size), (self.model.image_size,) * 2)
        if self.frequency_quality is not None and (odd := [size for size in self.image_sizes if size % JPEG_BLOCK]):
            raise InputError(
                f"frequency_quality is {self.frequency_quality} and images have {odd[0]} pixels along a side; it needs "
                f"multiples of {JPEG_BLOCK}, the side of JPEG's blocks"
            )

    def _check_distillation(self) -> None:
        if bool(self.distil) != bool(self.teacher):
            missing = "teacher is empty" if self.distil else "distil is empty"
            raise InputError(f"{missing}; a student needs both, as in --distil shortcut --teacher runs/quickstart")
        _check_interval("teacher_interval", self.teacher_interval)
        if not self.distil:
            return
        for name in ("align", "perceptual", "frequency_quality"):
            if value := getattr(self, name):
                raise InputError(f"{name} is {value!r}; a student learns from its teacher alone: leave it out")
        if self.sampling.solver != STUDENT_SOLVER:
            raise InputError(f"sampling.solver is {self.sampling.solver!r}; a student is sampled with {STUDENT_SOLVER}")
        if self.distil == "meanflow" and self.shard:
            raise InputError(
                "shard is on; distil=meanflow differentiates forward, which needs all weights in one place"
            )
        if self.distil == "meanflow" and self.field_kernel == "fused":
            raise InputError(
                "field_kernel is fused; distil=meanflow differentiates forward, which the kernel cannot: use torch"
            )
        for name, does in (("fd_weight", "adds to"), ("paths", "belongs to")):
            if (value := getattr(self, name)) and self.distil != "shortcut":
                raise InputError(f"{name} is {value}; it {does} distil=shortcut, not to {self.distil}")
        if self.paths and self.decode_sizes:
            raise InputError(
                f"paths is {self.paths}; paths are kept of one size and decode_sizes asks for several: take 0"
            )
        fd = "distil=fd" if self.distil == "fd" else "fd_weight" if self.fd_weight else ""
        if fd and not self.fd_networks:
            raise InputError(f"fd_networks is empty; {fd} compares the features of at least one network")
        if fd and self.decode_sizes:
            raise InputError(
                f"decode_sizes is {self.decode_sizes}; {fd} compares with the features of real images of one size: "
                "give none"
            )
        if fd and self.accumulate > 1:
            raise InputError(f"accumulate is {self.accumulate}; {fd} needs the features of a step's images at once")

    def check_complete(self) -> None:
        """Raise InputError if a student's settings, such as its recipe's, still lack the teacher that they need."""
        if self.distil:
            return
        only: dict[str, object] = {"paths": self.paths, "fd_weight": self.fd_weight}
        if self.sampling.solver == STUDENT_SOLVER:
            only["sampling.solver"] = STUDENT_SOLVER
        for name, value in only.items():
            if value:
                raise InputError(
                    f"{name} is {value}, which only a few-step student has: name its teacher, as in --teacher RUN"
                )

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Sides of the training images in pixels, one size or several."""
        return self.decode_sizes or (self.model.image_size,)

    def computes_in_bfloat16(self, device_type: str) -> bool:
        """Whether the network computes in bfloat16 on a device of this type."""
        return self.precision == "bfloat16" or (self.precision == "auto" and device_type == "cuda")

    def kernel_on(self, capability: int) -> FieldKernel:
        """What computes the field's blocks on an NVIDIA GPU of this compute capability, 9 for Hopper; 0: elsewhere.

        The fused kernel has been timed on Hopper alone. Compiled for an A100 or an RTX 4090 its backward pass moves
        kilobytes of a thread's numbers out of registers (`python -m tests.measure.field_traffic`). It needs a C
        compiler, as torch.compile does, which a run tries before it starts.
        """
        if self.field_kernel != "auto":
            return self.field_kernel
        timed = capability == 9 and self.computes_in_bfloat16("cuda") and self.compile != "off" and not self.shard
        return "fused" if timed and self.distil != "meanflow" and can_fuse(self.model) else "torch"

    @property
    def aligned_block(self) -> int:
        """The block whose tokens are aligned, counted from 1."""
        return self.align_block or (6 if isinstance(self.model, TextModelConfig) else 8)

    def average_decays(self, step: int) -> dict[str, float]:
        """Name of each moving average in a checkpoint → its decay in the update after step 1, 2, …; none if not due."""
        if step > 1 and step % self.average_every:
            return {}
        since = min(self.average_every, max(1, step - 1))  # the first update is that after step 1
        fixed = {"ema": self.ema_decay, **{f"ema-{decay:g}": decay for decay in self.extra_ema_decays}}
        powers = {f"power-{width:g}": averages.power_decay(width, step, since) for width in self.power_averages}
        return {name: decay**since for name, decay in fixed.items()} | powers

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "TrainConfig":
        """The configuration in config.json; settings newer than the file get their defaults. Raises InputError."""
        try:
            sampling = SamplingConfig(**{name: tupled(value) for name, value in entries["sampling"].items()})
            nested = {"model": model_config(entries["model"]), "sampling": sampling}
            return cls(**{name: tupled(value) for name, value in entries.items()} | nested)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"the training run's configuration cannot be read: {error}") from error


Network = Literal[(*frozen.IMAGE_NETWORKS, "scenes")]  # includes new image networks automatically


@dataclass(frozen=True)
class EvaluationConfig:
    """Which images are measured against which, and how.

    Raises InputError when a value is outside its range.
    """

    source: str
    """what to measure: a trained model (RUN, RUN@STEP, a .safetensors file, released weights), or images: a .npz with
    arr_0, or a folder of pictures"""
    reference: str = ""
    """real images: the ADM suite's reference .npz, a folder of pictures, or a data set; by default the run's"""
    network: Network = "efficientnet"
    """whose features to compare: inception gives FID, sFID, IS, precision and recall; efficientnet needs no download.
    scenes uses no features: it counts how many samples of shapes show their caption"""
    weights: str | None = None
    """Inception's weights file, or DINOv2's folder; by default they are downloaded"""
    draw: Index = 0
    """number of images to sample with the model; 0 measures the existing images"""
    classes: Literal["equal", "random"] = "equal"
    """classes or captions of the sampled images: equally many of each, of more than there are images evenly spread
    ones, or random ones"""
    average: str = "ema"
    """weights to sample with: ema, ema-DECAY, power-WIDTH or model"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """how to sample; on the command line, flags default to the run's own settings"""
    seed: Index = 0
    """seed of the noise and the random classes; image i depends on (seed, i) alone"""
    batch_size: Count = 64
    """images per batch"""
    workers: Index = 0
    """processes that read the real images; 0 reads them in this one"""
    compile: Compile = "auto"
    """torch.compile for the network that samples; auto: on a GPU with at least 3e16 FLOP to do, five minutes of an
    A100, since compiling takes up to a minute"""
    out: str | None = None
    """also write the samples to this .npz, for the ADM suite"""

    def __post_init__(self):
        check_fields(self)
        if self.network == "scenes" and (not self.draw or self.weights):
            raise InputError("network 'scenes' has no weights and reads only fresh samples: use --draw alone")


def tupled(value: Any) -> Any:
    """The lists of JSON or YAML as tuples, inner ones included."""
    return tuple(map(tupled, value)) if isinstance(value, list) else value
