"""PixNerd: a diffusion transformer over large pixel patches with a neural field per patch instead of a last linear.

Source: arXiv 2507.23268. Dimension letters: B images, C channels, N patches, P patch size, D width, K = P² pixels.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .errors import InputError
from .fields import Encoding, LinearHead, NeuralFieldHead, WeightNorm
from .layers import Attention, DiTBlock, TimeEmbedding, rotary_table

Prediction = Literal["v", "x"]
Recompute = Literal["none", "head", "all"]

MIN_REMAINING_TIME = 0.05  # 1 − t is not taken smaller than this where it divides


def check_image_size(config: "ModelConfig", height: int, width: int) -> None:
    """Raise InputError unless the patch divides both sides."""
    P = config.patch_size
    if height < P or width < P or height % P or width % P:
        raise InputError(
            f"image size {height}x{width} does not fit patches of {P}; both sides have to be multiples of {P}"
        )


def check_resolution(config: "ModelConfig", size: tuple[int, int], base_resolution: tuple[int, int] | None) -> None:
    """Raise InputError unless images of `size` can be decoded from tokens of the base resolution."""
    if base_resolution is None:
        return check_image_size(config, *size)
    check_image_size(config, *base_resolution)
    for side, full, base in zip(("height", "width"), size, base_resolution, strict=True):
        tokens = base // config.patch_size
        if full < tokens or full % tokens:
            raise InputError(
                f"image {side} {full} cannot be shared by the {tokens} patches of base {side} {base}; "
                f"it has to be a multiple of {tokens}"
            )
    if config.head == "linear" and tuple(size) != tuple(base_resolution):
        raise InputError(f"a linear head draws at its base resolution alone; {size} is not {base_resolution}")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the network; every switch that the paper ablates is a plain field.

    Raises InputError when a value is outside its range.
    """

    width: int = 1024
    """D, channels of a token"""
    heads: int = 16
    """attention heads; width / heads has to be a multiple of 4"""
    blocks: int = 22
    """transformer blocks"""
    patch_size: int = 16
    """P, pixels along a patch's side"""
    channels: int = 3
    """channels of the images"""
    image_size: int = 256
    """pixels along a side of the training images; the network takes any size that the patch divides"""
    head: Literal["field", "linear"] = "field"
    """what decodes a patch: its own neural field, or one linear layer (the baseline)"""
    field_width: int = 64
    """channels of a pixel inside the field"""
    field_blocks: int = 2
    """field blocks, each with generated weights"""
    field_ratio: int = 2
    """hidden width of a field block / field width"""
    encoding: Encoding = "dct"
    """coordinate encoding of the field"""
    weight_norm: WeightNorm = "fc1+fc2"
    """which generated matrices are scaled to unit fan-in norm"""
    output_norm: bool = True
    """RMSNorm before the field's last linear"""
    prediction: Prediction = "v"
    """what the network's last layer means: the velocity x − ε, or the clean image x"""

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is int and value < 1:
                raise InputError(f"model.{name} is {value}; it has to be at least 1")
            if get_args(kind) and value not in get_args(kind):
                raise InputError(f"model.{name} is {value!r}; allowed: {', '.join(get_args(kind))}")
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(
                f"model.width {self.width} over {self.heads} heads gives {self.width / self.heads:g} channels a head; "
                "2-D rotary positions need a multiple of 4"
            )
        check_image_size(self, self.image_size, self.image_size)


class Sizes(dict[str, ModelConfig]):
    """Named model sizes; an unknown name is an InputError that lists the known ones."""

    def __missing__(self, name: str) -> ModelConfig:
        raise InputError(f"model size {name!r} is unknown; known sizes: {', '.join(self)}")


SIZES = Sizes(
    {
        # for laptops and tests: 32-pixel images
        "nano/8": ModelConfig(64, heads=2, blocks=2, patch_size=8, image_size=32, field_width=16, field_blocks=1),
        "micro/8": ModelConfig(128, heads=4, blocks=4, patch_size=8, image_size=32, field_width=16, field_blocks=1),
        "small/8": ModelConfig(384, heads=6, blocks=8, patch_size=8, image_size=32, field_width=32),
        # published (arXiv 2507.23268): 452 M and 701 M parameters, and the baseline the paper sets beside L/16
        "L/16": ModelConfig(width=1024, heads=16, blocks=22, field_blocks=2),
        "XL/16": ModelConfig(width=1152, heads=16, blocks=26, field_blocks=4),
        "L/16-linear": ModelConfig(width=1024, heads=16, blocks=24, head="linear"),
    }
)


def velocity_from_image(image: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity that leads from x_t at time t straight to `image`: (image − x_t) / max(1 − t, 0.05).

    image and x_t [B, C, H, W], t [B] in [0, 1].
    """
    return (image - x_t) / (1 - t).clamp(min=MIN_REMAINING_TIME).view(-1, 1, 1, 1)


class PatchDenoiser(nn.Module):
    """What the class-conditional and the text-to-image network share: patches in, blocks, a head for every patch.

    `recompute` is what training computes again in the backward pass instead of keeping every activation: "none", the
    pixels of the "head", or "all", the head and every block. It changes memory and time, never the numbers.
    """

    def __init__(self, config: ModelConfig, blocks: Iterable[DiTBlock], recompute: Recompute):
        super().__init__()
        self.config, self.recompute = config, recompute
        self.tap: int | None = None  # which block's output to keep in `tapped`, counted from 1
        self.tapped: Tensor | None = None  # [B, N, D]
        width, patch_size, channels = config.width, config.patch_size, config.channels
        self.patch_embed = nn.Linear(channels * patch_size**2, width)
        self.time_embed = TimeEmbedding(width)
        self.blocks = nn.ModuleList(blocks)
        if config.head == "field":
            self.head = NeuralFieldHead(
                width,
                channels,
                config.field_width,
                config.field_blocks,
                config.field_ratio,
                config.encoding,
                config.weight_norm,
                config.output_norm,
            )
        else:
            self.head = LinearHead(width, channels, patch_size)
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)

    def rotary_ends(self, rows: int, columns: int) -> tuple[float, float]:
        """Where the rotary positions of a grid's rows and columns end; always 16 for the class-conditional model."""
        return 16, 16

    def denoise(
        self,
        x: Tensor,
        t: Tensor,
        time: Tensor,
        c: Tensor,
        base_resolution: tuple[int, int] | None,
        text: Tensor | None = None,
    ) -> Tensor:
        """The velocity [B, C, H, W] at x for times t [B], their embedding [B, D], condition c [B, D], text [B, L, D].

        With a base resolution (h, w), the transformer sees the image resized to it (nearest pixel), and every patch of
        the head covers P·H/h × P·W/w pixels of the full image, at coordinates resampled over the same range.
        """
        P = self.config.patch_size
        height, width = base_resolution or x.shape[2:]
        rows, columns = height // P, width // P
        seen = x if base_resolution is None else F.interpolate(x, base_resolution, mode="nearest")
        head_dim = self.config.width // self.config.heads
        precision = torch.promote_types(x.dtype, torch.float32)
        rotary = rotary_table(rows, columns, self.rotary_ends(rows, columns), head_dim, precision, x.device)
        tokens = self.patch_embed(rearrange(seen, "b c (h p) (w q) -> b (h w) (c p q)", p=P, q=P))  # [B, N, D]
        for place, block in enumerate(self.blocks, start=1):
            if self.training and self.recompute == "all" and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, c, rotary, text, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, c, rotary, text)
            if place == self.tap:
                self.tapped = tokens
        s = F.silu(time[:, None] + tokens).flatten(0, 1)  # [B·N, D]
        pixels = rearrange(x, "b c (h p) (w q) -> (b h w) (p q) c", h=rows, w=columns)  # [B·N, K, C]
        patch = x.shape[2] // rows, x.shape[3] // columns
        pixels = self.head(pixels, s, patch, self.training and self.recompute != "none")
        out = rearrange(pixels, "(b h w) (p q) c -> b c (h p) (w q)", h=rows, w=columns, p=patch[0])
        return out if self.config.prediction == "v" else velocity_from_image(out, x, t)

    def check(self, x: Tensor, t: Tensor, condition: Tensor, base_resolution: tuple[int, int] | None) -> None:
        """Raise InputError unless image, times, condition and base resolution fit this model and one another."""
        check_resolution(self.config, tuple(x.shape[2:]), base_resolution)
        if x.shape[1] != self.config.channels:
            raise InputError(f"images have {x.shape[1]} channels; this model was built for {self.config.channels}")
        if not len(x) == len(t) == len(condition) or t.ndim != 1:
            raise InputError(
                f"times and condition have shapes {tuple(t.shape)} and {tuple(condition.shape)}; "
                f"both need one entry for each of the {len(x)} images"
            )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(self.config).items())


class PixNerd(PatchDenoiser):
    """The class-conditional velocity network v(x_t, t, label). For `recompute` see PatchDenoiser."""

    def __init__(self, config: ModelConfig, num_classes: int, recompute: Recompute = "head"):
        if num_classes < 1:
            raise InputError(f"num_classes is {num_classes}; it has to be at least 1")
        width, hidden = config.width, int(2 / 3 * 4 * config.width)
        blocks = (DiTBlock(Attention(width, config.heads), width, hidden) for _ in range(config.blocks))
        super().__init__(config, blocks, recompute)
        self.num_classes = num_classes
        self.label_embed = nn.Embedding(num_classes + 1, width)  # the last row is "no label"
        nn.init.normal_(self.label_embed.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, base_resolution: tuple[int, int] | None = None) -> Tensor:
        """The velocity at x_t, whatever `config.prediction` is.

        Args:
            x: noisy images [B, C, H, W], H and W multiples of the patch size.
            t: times [B] in [0, 1]; 0 is noise, 1 is data.
            labels: classes [B], 0 … num_classes; num_classes itself means "no label".
            base_resolution: (h, w) that the transformer sees while the head decodes H × W; by default the same.

        Returns:
            velocity [B, C, H, W], an estimate of image − noise.

        Raises:
            InputError: sizes that do not fit, wrong channels, a label out of range.
        """
        self.check(x, t, labels, base_resolution)
        if labels.ndim != 1:
            raise InputError(f"labels have shape {tuple(labels.shape)}; one class for each image is needed, [B]")
        if labels.device.type == "cpu":  # on an accelerator the look would stall it; sample and train look beforehand
            check_labels(labels, self.num_classes)
        time = self.time_embed(t)  # [B, D]
        c = F.silu(time + self.label_embed(labels))  # [B, D]
        return self.denoise(x, t, time, c, base_resolution)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise InputError unless every label is in 0 … num_classes (num_classes itself is "no label")."""
    if len(labels) and not 0 <= (low := int(labels.min())) <= (high := int(labels.max())) <= num_classes:
        wrong = low if low < 0 else high
        raise InputError(f"label {wrong} is outside 0 … {num_classes} ({num_classes} itself means no label)")
