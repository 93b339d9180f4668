"""PixNerd from text: the same patches and fields, with captions that the blocks look at beside the image.

Source: arXiv 2507.23268 and the released text-to-image code. Dimension letters: B images, C channels, L text tokens,
D width, F features of the text encoder.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError
from .fields import Encoding, WeightNorm
from .layers import Attention, DiTBlock, JointAttention, RMSNorm
from .model import SIZES, ModelConfig, PatchDenoiser, Recompute, Sizes


@dataclass(frozen=True)
class TextModelConfig(ModelConfig):
    """A text-conditional network; the defaults are the published XXL/16 at 512 pixels."""

    width: int = 1536
    heads: int = 24
    blocks: int = 16
    image_size: int = 512
    encoding: Encoding = "sincos"
    weight_norm: WeightNorm = "fc1"
    output_norm: bool = False
    text_blocks: int = 4
    """blocks that refine the text before the image's blocks look at it"""
    text_features: int = 2048
    """F, features of a token from the text encoder (Qwen3-1.7B: 2048)"""
    text_length: int = 128
    """L, tokens of a caption, padding included"""


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


ALL_SIZES = Sizes({**SIZES, **TEXT_SIZES})


class TextPixNerd(PatchDenoiser):
    """The text-conditional velocity network v(x_t, t, text). For `recompute` see PatchDenoiser."""

    config: TextModelConfig

    def __init__(self, config: TextModelConfig, recompute: Recompute = "head"):
        width, hidden = config.width, 4 * config.width
        blocks = (DiTBlock(JointAttention(width, config.heads), width, hidden) for _ in range(config.blocks))
        super().__init__(config, blocks, recompute)
        self.text_embed = nn.Linear(config.text_features, width)
        self.text_norm = RMSNorm(width)
        self.text_positions = nn.Parameter(torch.randn(1, config.text_length, width))
        self.text_blocks = nn.ModuleList(
            DiTBlock(Attention(width, config.heads), width, hidden) for _ in range(config.text_blocks)
        )

    def rotary_ends(self, rows: int, columns: int) -> tuple[float, float]:
        """Rows end at the number of columns and columns at that of rows, as released; square grids do not differ."""
        return columns, rows

    def forward(self, x: Tensor, t: Tensor, text: Tensor, base_resolution: tuple[int, int] | None = None) -> Tensor:
        """The velocity at x_t, whatever `config.prediction` is.

        Args:
            x: noisy images [B, C, H, W].
            t: times [B] in [0, 1]; 0 is noise, 1 is data.
            text: the encoder's features [B, L, F], padding included and attended to; those of "" mean "no text".
            base_resolution: (h, w) that the transformer sees while the head decodes H × W; by default the same.

        Returns:
            velocity [B, C, H, W], an estimate of image − noise.

        Raises:
            InputError: sizes that do not fit, wrong channels, text of another length or another encoder.
        """
        self.check(x, t, text, base_resolution)
        check_text(self.config, text)
        time = self.time_embed(t)  # [B, D]
        c = F.silu(time)  # [B, D]
        text = self.text_norm(self.text_embed(text)) + self.text_positions  # [B, L, D]
        for block in self.text_blocks:
            text = block(text, c)
        return self.denoise(x, t, time, c, base_resolution, text)


def check_text(config: TextModelConfig, text: Tensor) -> None:
    """Raise InputError unless text features fit the model."""
    expected = (config.text_length, config.text_features)
    if text.ndim != 3 or tuple(text.shape[1:]) != expected:
        raise InputError(
            f"text features have shape {tuple(text.shape)}; this model reads [B, {expected[0]}, {expected[1]}]: "
            f"{expected[0]} tokens of an encoder with {expected[1]} features"
        )
