"""How a network is trained, sampled and measured: every setting with its meaning, its default and what it may be.

The defaults are the published ones (arXiv 2507.23268). Nothing here needs torch.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from . import frozen
from .checks import Count, Index, NotNegative, Positive, Share, check_fields
from .errors import InputError
from .model_config import SIZES, ModelConfig, Recompute, check_resolution, model_config
from .solvers import SOLVERS


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample; the defaults are the published ones for class-conditional images (arXiv 2507.23268).

    Raises InputError when a value is outside its range.
    """

    steps: Count = 100
    """solver steps"""
    solver: str = "euler"
    """one of pixnerd.solvers.SOLVERS"""
    guidance: float = 3.5
    """w of v_u + w·(v_c − v_u); 1 is no guidance"""
    interval: tuple[float, float] | None = (0.1, 1.0)
    """guide only the steps that start strictly inside; None guides every step"""
    shift: Positive = 1.0
    """moves the time grid, see solvers.time_grid"""

    def __post_init__(self):
        check_fields(self)
        if self.solver not in SOLVERS:
            raise InputError(f"solver {self.solver!r} is unknown; known solvers: {', '.join(SOLVERS)}")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] <= 1:
            low, high = self.interval
            raise InputError(f"guidance interval ({low}, {high}) is not a range; it needs 0 ≤ low < high ≤ 1")

    def guides(self, t: float) -> bool:
        """Whether a step that starts at t is guided."""
        return self.guidance != 1 and (self.interval is None or self.interval[0] < t < self.interval[1])


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the defaults are the published recipe for ImageNet 256 (arXiv 2507.23268).

    Raises InputError when a value is outside its range.
    """

    out: str = "runs/train"
    """the run's folder"""

    # --- data ---
    data: str = "folder:data/imagenet/train"
    """name of the data set; `pixnerd data --help` lists them"""
    decode_sizes: tuple[int, ...] = ()
    """pixels a side, one chosen at random for each step, that the fields decode while the transformer sees
    model.image_size; empty: that size alone"""
    horizontal_flip: bool = False
    """mirror every second image"""
    label_dropout: Share = 0.1
    """how often an image is shown without its label or caption, which is what guidance needs"""
    text_encoder: str = "Qwen/Qwen3-1.7B"
    """what reads the captions for a text model: minilm, a local folder, or a hub id"""
    cache_text: bool = True
    """keep every caption's features in memory and under data/text; with millions of captions they are too large"""
    workers: Index = 0
    """processes that load images; 0 loads in this one"""
    seed: Index = 0
    """of the initial weights, the order of the data, noise, times and dropout"""

    # --- network ---
    model: ModelConfig = SIZES["L/16"]
    """the network; its channels are set to the data's"""
    start_from: str = ""
    """a trained model to start from (what pixnerd.load takes); its moving average is taken. Empty: random weights"""

    # --- optimiser ---
    steps: Count = 800_000
    """optimiser steps of the whole run"""
    batch_size: Count = 256
    """images a step, over all devices"""
    learning_rate: Positive = 1e-4
    """AdamW's, after warm-up"""
    warmup_steps: Index = 0
    """linear rise of the learning rate from 0"""
    decay: Literal["constant", "linear"] = "constant"
    """the learning rate after warm-up: as it is, or in a line to 0 at the last step"""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's"""
    weight_decay: NotNegative = 0.0
    """AdamW's, on all weights"""
    clip: Positive | None = None
    """largest norm of the gradient; None does not clip"""
    ema_decay: Share = 0.9999
    """of the moving average of the weights, which sampling uses"""
    extra_ema_decays: tuple[Share, ...] = ()
    """of further averages, kept beside it to choose from after training (Karras et al. 2312.02696, section 3)"""

    # --- losses ---
    time_shift: Positive = 1.0
    """of the training times; above 1 means more noise"""
    frequency_quality: int | None = None
    """weigh the velocity error by frequency as JPEG of this quality does, 1 … 100 (DeCo, 2511.19365); None: alike"""
    align: str = ""
    """REPA: whose features a block's tokens are aligned with: facebook/dinov2-base, a folder, efficientnet; or none"""
    align_block: Count = 8
    """the block, counted from 1; published: 8, and 6 for text"""
    align_weight: NotNegative = 0.5
    """of the alignment in the loss"""
    align_until: int | None = None
    """the step after which nothing is aligned any more; None: to the end"""
    cache_teacher: bool = False
    """keep the teacher's features of every image in memory; for small data sets"""
    perceptual: str = ""
    """add the distance of x̂ to the clean image in this network's features, from t = 0.3 on (PixelGen, 2602.02493):
    efficientnet, or a file of torch.export.save; empty: no such loss"""
    perceptual_weight: NotNegative = 0.1
    """of the perceptual loss in the loss"""

    # --- precision, memory and devices ---
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 is autocast, the weights stay float32; auto: bfloat16 on a GPU, float32 on a CPU"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of every block and of the field; auto: on a GPU only, it takes half a minute on a CPU"""
    recompute: Recompute = "head"
    """what the backward pass computes again instead of keeping it"""
    accumulate: Count = 1
    """parts that a device computes its images of a step in, one after the other; saves memory, changes only rounding"""
    shard: bool = False
    """keep only a part of weights, gradients and optimiser on every device (FSDP2) instead of all (DDP)"""

    # --- logging and checkpoints ---
    log_every: Count = 50
    """steps between lines of log.jsonl"""
    checkpoint_every: Count = 5_000
    """steps between checkpoints; there is always one at the end"""
    keep_checkpoints: Count = 2
    """newest checkpoints to keep"""

    # --- sampling ---
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """how this run's model is sampled unless said otherwise"""

    def __post_init__(self):
        check_fields(self)
        if self.align and self.align_block > self.model.blocks:
            raise InputError(f"align_block is {self.align_block}; the model has blocks 1 … {self.model.blocks}")
        if self.frequency_quality is not None and not 1 <= self.frequency_quality <= 100:
            raise InputError(f"JPEG quality is {self.frequency_quality}; it has to be a whole number from 1 to 100")
        for size in self.decode_sizes:
            check_resolution(self.model, (size, size), (self.model.image_size,) * 2)

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Pixels a side of the training images, one size or several."""
        return self.decode_sizes or (self.model.image_size,)

    @property
    def ema_decays(self) -> dict[str, float]:
        """A checkpoint's name for every moving average → its decay."""
        return {"ema": self.ema_decay, **{f"ema-{decay:g}": decay for decay in self.extra_ema_decays}}

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "TrainConfig":
        """Back from config.json; what an older version did not write yet has its default. Raises InputError."""
        try:
            sampling = SamplingConfig(**{name: _tupled(value) for name, value in entries["sampling"].items()})
            nested = {"model": model_config(entries["model"]), "sampling": sampling}
            return cls(**{name: _tupled(value) for name, value in entries.items()} | nested)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"the training run's configuration cannot be read: {error}") from error


Network = Literal[(*frozen.IMAGE_NETWORKS, "scenes")]  # a new image network is a choice without a line here


@dataclass(frozen=True)
class EvaluationConfig:
    """Which images are measured against which, and how.

    Raises InputError when a value is outside its range.
    """

    source: str
    """run folder, or images: a .npz with arr_0, or a folder of pictures"""
    reference: str = ""
    """real images: the ADM suite's reference .npz, a folder of pictures, or a data set; by default the run's"""
    network: Network = "efficientnet"
    """whose features: inception gives FID, sFID, IS, precision and recall; efficientnet needs no download. Or
    none: scenes counts, of captions of shapes, those that the samples show"""
    weights: str | None = None
    """Inception's file of weights, or DINOv2's folder; by default they are fetched"""
    draw: Index = 0
    """sample so many images with the newest checkpoint; 0 measures the images that are there"""
    classes: Literal["equal", "random"] = "equal"
    """of sampled images: as many of each class, or of each caption, or at random"""
    average: str = "ema"
    """weights to sample with: ema, ema-DECAY or model"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """how to sample; on the command line, flags that are not given are the run's own"""
    seed: Index = 0
    """of the noise and the random classes; image i depends on (seed, i) alone"""
    batch_size: Count = 64
    """images at a time"""
    out: str | None = None
    """also write what is sampled as .npz, for the ADM suite"""

    def __post_init__(self):
        check_fields(self)
        if self.network == "scenes" and (not self.draw or self.weights):
            raise InputError("network 'scenes' has no weights and reads what is drawn on the spot: name --draw alone")


def _tupled(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(value) if isinstance(value, list) else value
