"""PixNerd from text: the same patches and fields, with captions that the blocks attend to along with the image.

Source: arXiv 2507.23268 and the released text-to-image code. Dimension letters: B images, C channels, L text tokens,
D width, F features of the text encoder.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError
from .layers import Attention, DiTBlock, JointAttention, RMSNorm
from .linear import Linear
from .model import PatchDenoiser, PixNerd
from .model_config import TEXT_SIZES as TEXT_SIZES
from .model_config import FieldKernel, ModelConfig, Recompute, TextModelConfig


class TextPixNerd(PatchDenoiser):
    """The text-conditional velocity network v(x_t, t, text).

    For `recompute` and `field_kernel` see PatchDenoiser.
    """

    config: TextModelConfig

    def __init__(self, config: TextModelConfig, recompute: Recompute = "head", field_kernel: FieldKernel = "torch"):
        width, hidden = config.width, 4 * config.width
        blocks = (DiTBlock(JointAttention(width, config.heads), width, hidden) for _ in range(config.blocks))
        super().__init__(config, blocks, recompute, field_kernel)
        self.text_embed = Linear(config.text_features, width)
        self.text_norm = RMSNorm(width)
        self.text_positions = nn.Parameter(torch.randn(1, config.text_length, width))
        self.text_blocks = nn.ModuleList(
            DiTBlock(Attention(width, config.heads), width, hidden) for _ in range(config.text_blocks)
        )

    def rotary_ends(self, rows: int, columns: int) -> tuple[float, float]:
        """Rows end at the number of columns and columns at that of rows, as released; equal for square grids."""
        return columns, rows

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        base_resolution: tuple[int, int] | None = None,
        tap: int | None = None,
        r: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity at x_t, for either `config.prediction`.

        Args:
            x: noisy images [B, C, H, W].
            t: times [B] in [0, 1]; 0 is noise, 1 is data.
            text: the encoder's features [B, L, F], padding included and attended to; those of "" mean "no text".
            base_resolution: (h, w) that the transformer sees while the head decodes H × W; by default the same.
            tap: a block, 1 … blocks, whose tokens are returned as well; by default none.
            r: for a student, where the intervals end, [B] in [t, 1]: the velocity is then the mean over [t, r]; by
                default t, the velocity itself.

        Returns:
            velocity [B, C, H, W], an estimate of image − noise; with `tap`, (velocity, tokens [B, N, D]).

        Raises:
            InputError: unsuitable sizes, wrong channels, text of another length or from another encoder, or an
                interval that ends before it starts.
        """
        self.check(x, t, text, base_resolution, r)
        check_text(self.config, text)
        time = self.time_embed(t)  # [B, D]
        c = F.silu(time)  # [B, D]
        text = text.to(self.text_embed.weight.dtype)  # encoders on a GPU give bfloat16
        text = self.text_norm(self.text_embed(text)) + self.text_positions  # [B, L, D]
        for block in self.text_blocks:
            text = block(text, c)
        return self.denoise(x, t, time, c, base_resolution, text, tap, r)

    def as_condition(self, condition: Any) -> Tensor:
        """Text features [B, L, F]."""
        try:
            text = torch.as_tensor(condition)
        except (TypeError, ValueError, RuntimeError) as error:  # such as prompts
            raise InputError(f"text is {condition!r}; the features of an encoder are needed, [B, L, F]") from error
        check_text(self.config, text)
        return text

    def example_condition(self, images: int = 1, device: torch.device | None = None) -> Tensor:
        """Zeros."""
        device = device or self.patch_embed.weight.device
        return torch.zeros(images, self.config.text_length, self.config.text_features, device=device)


def check_text(config: TextModelConfig, text: Tensor) -> None:
    """Raise InputError unless text features fit the model."""
    expected = (config.text_length, config.text_features)
    if text.ndim != 3 or tuple(text.shape[1:]) != expected:
        raise InputError(
            f"text features have shape {tuple(text.shape)}; this model reads [B, {expected[0]}, {expected[1]}]: "
            f"{expected[0]} tokens of an encoder with {expected[1]} features"
        )


def build_network(
    config: ModelConfig,
    num_classes: int | None,
    recompute: Recompute = "head",
    field_kernel: FieldKernel = "torch",
) -> PatchDenoiser:
    """A network with fresh weights, of the family to which its configuration belongs.

    num_classes is only for the class-conditional network; a text-conditional one has no classes.
    """
    if isinstance(config, TextModelConfig):
        return TextPixNerd(config, recompute, field_kernel)
    return PixNerd(config, num_classes, recompute, field_kernel)
