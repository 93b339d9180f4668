"""The architecture settings of the class- and the text-conditional network, and the named sizes.

Source: arXiv 2507.23268 and the released code.
"""

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

from .checks import Count, Few, Side, check_fields
from .encodings import Encoding
from .errors import InputError

WeightNorm = Literal["none", "fc1", "fc1+fc2"]
FieldWeights = Literal["generated", "shared"]
Prediction = Literal["v", "x"]
# entries of one matrix of a patch: the fused kernel keeps two such matrices and two of sums in registers
FUSED_WEIGHTS = 8192
Recompute = Literal["none", "head", "all"]  # what the backward pass recomputes, see model.PatchDenoiser
FieldKernel = Literal["torch", "fused"]  # what computes a field block, see model.PatchDenoiser


@dataclass(frozen=True)
class ModelConfig:
    """The network's architecture; every choice that the paper ablates is a plain field.

    Raises InputError when a value is outside its range.
    """

    width: Count = 1024
    """D, channels of a token"""
    heads: Count = 16
    """attention heads; width / heads has to be a multiple of 4"""
    blocks: Few = 22
    """transformer blocks"""
    patch_size: Count = 16
    """P, pixels along a side of a patch"""
    channels: Count = 3
    """channels of the images"""
    image_size: Side = 256
    """pixels along a side of the training images; the network takes any multiple of the patch size"""
    head: Literal["field", "linear"] = "field"
    """what decodes a patch: its own neural field, or one linear layer (the baseline)"""
    field_width: Count = 64
    """channels per pixel inside the field"""
    field_blocks: Few = 2
    """field blocks"""
    field_ratio: Count = 2
    """hidden width of a field block / field width"""
    encoding: Encoding = "dct"
    """coordinate encoding of the field"""
    weight_norm: WeightNorm = "fc1+fc2"
    """which generated matrices are scaled to unit fan-in norm"""
    output_norm: bool = True
    """RMSNorm before the field's last Linear"""
    field_weights: FieldWeights = "generated"
    """where a field block's weights come from: generated for each patch, as published, or shared by all patches, whose
    condition then only shifts, scales and gates (adaLN), as in DeCo's pixel decoder (arXiv 2511.19365)"""
    field_pixels: bool = True
    """the field sees each pixel's noisy value; without, only its coordinates: the token has to carry the noise"""
    skip: bool = False
    """for any head: output = a·x_t + b·(the head's output) with a and b learned functions of t alone, which spares the
    token the noise (arXiv 2609.33895)"""
    prediction: Prediction = "v"
    """what the network's last layer predicts: the velocity x − ε, or the clean image x"""
    student: bool = False
    """a few-step student: its head is told the end r of an interval of time [t, r] while the blocks are told t, and its
    output is the mean velocity over it; a training run sets this where it distils"""

    def __post_init__(self):
        check_fields(self, "model.")
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(
                f"model.width {self.width} over {self.heads} heads is {self.width / self.heads:g} channels per head; "
                "2-D rotary positions need a multiple of 4"
            )
        if self.head == "field" and not self.field_pixels and self.encoding == "none":
            raise InputError("model.field_pixels is False and model.encoding is none; the field has to see one of them")
        check_image_size(self, self.image_size, self.image_size)


@dataclass(frozen=True)
class TextModelConfig(ModelConfig):
    """A text-conditional network; the defaults are the published XXL/16 at 512 pixels."""

    width: Count = 1536
    heads: Count = 24
    blocks: Few = 16
    image_size: Side = 512
    encoding: Encoding = "sincos"
    weight_norm: WeightNorm = "fc1"
    output_norm: bool = False
    text_blocks: Few = 4
    """blocks that refine the text before the image blocks attend to it"""
    text_features: Count = 2048
    """F, features per token from the text encoder (Qwen3-1.7B: 2048)"""
    text_length: Count = 128
    """L, tokens per caption, padding included"""


def model_config(entries: dict[str, Any]) -> ModelConfig:
    """The configuration from its JSON entries. Raises InputError if they do not describe a network."""
    kind = TextModelConfig if "text_length" in entries else ModelConfig
    try:
        return kind(**entries)
    except TypeError as error:
        raise InputError(f"the network's configuration cannot be read: {error}") from error


def check_image_size(config: ModelConfig, height: int, width: int) -> None:
    """Raise InputError unless both sides are multiples of the patch size."""
    P = config.patch_size
    if height < P or width < P or height % P or width % P:
        raise InputError(
            f"image size {height}x{width} does not fit patches of {P}; both sides have to be multiples of {P}"
        )


def check_resolution(config: ModelConfig, size: tuple[int, int], base_resolution: tuple[int, int] | None) -> None:
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
        raise InputError(f"a linear head decodes only at its base resolution; {size} is not {base_resolution}")


def check_fused(config: ModelConfig) -> None:
    """Raise InputError unless fused.py computes this network's field blocks."""
    if config.head != "field" or config.field_weights != "generated":
        what = "head" if config.head != "field" else "field_weights"
        raise InputError(
            f"field_kernel is fused and model.{what} is {getattr(config, what)}; the fused kernel computes fields with "
            "generated weights: use field_kernel torch"
        )
    sides = config.field_width, config.field_width * config.field_ratio
    if math.prod(2 ** max(4, (side - 1).bit_length()) for side in sides) > FUSED_WEIGHTS:
        raise InputError(
            f"field_kernel is fused and the field's matrices are {sides[0]}x{sides[1]}; with sides rounded up to "
            f"powers of two they may have {FUSED_WEIGHTS:,} entries: use field_kernel torch"
        )


def check_triton() -> None:
    """Raise InputError unless Triton, in which the fused kernel is written, is installed."""
    if find_spec("triton") is None:
        raise InputError("field_kernel is fused, and the package triton is not installed: use field_kernel torch")


def can_fuse(config: ModelConfig) -> bool:
    """Whether fused.py, and this installation, can compute this network's field blocks on a GPU."""
    try:
        check_fused(config)
        check_triton()
    except InputError:
        return False
    return True


class Sizes(dict[str, ModelConfig]):
    """Named model sizes; an unknown name raises an InputError that lists the known ones."""

    def __missing__(self, name: str) -> ModelConfig:
        raise InputError(f"model size {name!r} is unknown; known sizes: {', '.join(self)}")


LAPTOP = TextModelConfig(
    width=192,
    heads=6,
    blocks=5,
    patch_size=8,
    image_size=32,
    field_width=16,
    field_blocks=1,
    text_blocks=1,
    text_features=384,
    text_length=16,
)
TEXT_SIZES = Sizes(
    {
        # for laptops: 32-pixel images, captions read by a small encoder with 384 features
        "text-nano/8": replace(LAPTOP, width=64, heads=2, blocks=2),
        "text-micro/8": LAPTOP,
        # published: 1,171.5 M parameters beside the frozen Qwen3-1.7B
        "XXL/16": TextModelConfig(),
    }
)

SIZES = Sizes(
    {
        # for laptops and tests: 32-pixel images
        "nano/8": ModelConfig(64, heads=2, blocks=2, patch_size=8, image_size=32, field_width=16, field_blocks=1),
        "micro/8": ModelConfig(128, heads=4, blocks=4, patch_size=8, image_size=32, field_width=16, field_blocks=1),
        "small/8": ModelConfig(384, heads=6, blocks=8, patch_size=8, image_size=32, field_width=32),
        # published (arXiv 2507.23268): 452 M and 701 M parameters, and the paper's baseline for L/16
        "L/16": ModelConfig(width=1024, heads=16, blocks=22, field_blocks=2),
        "XL/16": ModelConfig(width=1152, heads=16, blocks=26, field_blocks=4),
        "L/16-linear": ModelConfig(width=1024, heads=16, blocks=24, head="linear"),
        **TEXT_SIZES,
    }
)
