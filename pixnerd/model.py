"""PixNerd: a diffusion transformer on large pixel patches with a neural field per patch instead of a last Linear.

Source: arXiv 2507.23268. Dimension letters: B images, C channels, N patches, P patch size, D width, K = P² pixels.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .errors import InputError
from .fields import LinearHead, NeuralFieldHead
from .layers import Attention, DiTBlock, TimeEmbedding, rotary_table
from .linear import Linear
from .model_config import SIZES as SIZES
from .model_config import FieldKernel, ModelConfig, Recompute, check_fused, check_resolution, check_triton

MIN_REMAINING_TIME = 1e-4  # lower bound of 1 − t as a divisor: no sampler evaluates the network nearer to t = 1


def velocity_from_image(image: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity that leads from x_t at time t straight to `image`: (image − x_t) / (1 − t).

    A step from t to 1 with this velocity ends at `image`. At t = 1 itself, 1 − t counts as 1e-4.
    image and x_t [B, C, H, W], t [B] in [0, 1].
    """
    return (image - x_t) / (1 - t).clamp(min=MIN_REMAINING_TIME).view(-1, 1, 1, 1)


class ScalarSkip(nn.Module):
    """a·x_t + b·output, where a and b are one linear function of the time embedding; a = 0 and b = 1 at the start.

    With velocity prediction, −x_t/(1 − t) is all that the output has to know of the noise: given a(t), a head that does
    not see the pixels needs to carry only the image. Source: arXiv 2609.33895.
    """

    def __init__(self, width: int):
        super().__init__()
        self.scales = nn.Linear(width, 2)
        nn.init.zeros_(self.scales.weight)
        with torch.no_grad():
            self.scales.bias.copy_(torch.tensor([0.0, 1.0]))

    def forward(self, output: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """output and x [B, C, H, W], time embedding [B, D] → [B, C, H, W]."""
        of_x, of_output = self.scales(time)[:, :, None, None, None].unbind(1)  # [B, 1, 1, 1] each
        return of_x * x + of_output * output


class PatchDenoiser(nn.Module):
    """What the class-conditional and the text-to-image network share: patch embedding, blocks, a head for each patch.

    `recompute` is what the backward pass computes again instead of keeping all activations: "none", the pixels of the
    "head", or "all", the head and every block. It changes memory and time, never the numbers. `field_kernel` is what
    computes the field's blocks: "torch", operator by operator, or "fused", one kernel of a GPU (fused.py) that rounds
    less often. The fused kernel computes the pixels again by itself, so with it "head" and "none" are the same.
    """

    num_classes: int | None = None
    """number of classes; None for a text-conditional network"""

    def __init__(
        self, config: ModelConfig, blocks: Iterable[DiTBlock], recompute: Recompute, field_kernel: FieldKernel
    ):
        super().__init__()
        if field_kernel == "fused":
            check_fused(config)
            check_triton()
        self.config, self.recompute, self.field_kernel = config, recompute, field_kernel
        width, patch_size, channels = config.width, config.patch_size, config.channels
        self.patch_embed = Linear(channels * patch_size**2, width)
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
                config.field_weights,
                config.field_pixels,
                field_kernel,
            )
        else:
            self.head = LinearHead(width, channels, patch_size)
        self.skip = ScalarSkip(width) if config.skip else None
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)

    def rotary_ends(self, rows: int, columns: int) -> tuple[float, float]:
        """The last rotary positions of a grid's rows and columns; always 16 for the class-conditional model."""
        return 16, 16

    def denoise(
        self,
        x: Tensor,
        t: Tensor,
        time: Tensor,
        c: Tensor,
        base_resolution: tuple[int, int] | None,
        text: Tensor | None = None,
        tap: int | None = None,
        r: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity [B, C, H, W] at x for times t [B], their embedding [B, D], condition c [B, D], text [B, L, D].

        With ends r [B], the mean velocity over [t, r]: the head's condition has r in place of t. With a base resolution
        (h, w), the transformer sees the image resized to it (nearest pixel), and each patch of the head covers
        P·H/h × P·W/w pixels of the full image, at coordinates resampled over the same range. With `tap`, the output
        tokens [B, N, D] of this block, counted from 1, are returned with the velocity.
        """
        if tap is not None and not 1 <= tap <= len(self.blocks):
            raise InputError(f"tap is {tap}; the model has blocks 1 … {len(self.blocks)}")
        P = self.config.patch_size
        height, width = base_resolution or x.shape[2:]
        rows, columns = height // P, width // P
        seen = x if base_resolution is None else F.interpolate(x, base_resolution, mode="nearest")
        head_dim = self.config.width // self.config.heads
        precision = torch.promote_types(x.dtype, torch.float32)
        rotary = rotary_table(rows, columns, self.rotary_ends(rows, columns), head_dim, precision, x.device)
        tokens = self.patch_embed(rearrange(seen, "b c (h p) (w q) -> b (h w) (c p q)", p=P, q=P))  # [B, N, D]
        for number, block in enumerate(self.blocks, start=1):
            if self.training and self.recompute == "all" and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, c, rotary, text, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, c, rotary, text)
            if number == tap:
                tapped = tokens
        end = time if r is None else self.time_embed(r)  # [B, D]
        s = F.silu(end[:, None] + tokens).flatten(0, 1)  # [B·N, D]
        pixels = rearrange(x, "b c (h p) (w q) -> (b h w) (p q) c", h=rows, w=columns)  # [B·N, K, C]
        patch = x.shape[2] // rows, x.shape[3] // columns
        pixels = self.head(pixels, s, patch, self.training and self.recomputes_head(self.recompute))
        out = rearrange(pixels, "(b h w) (p q) c -> b c (h p) (w q)", h=rows, w=columns, p=patch[0])
        if self.skip is not None:
            out = self.skip(out, x, time)
        v = out if self.config.prediction == "v" else velocity_from_image(out, x, t)
        return v if tap is None else (v, tapped)

    def recomputes_head(self, recompute: Recompute) -> bool:
        """Whether the backward pass computes the head again in pieces, with this setting."""
        return recompute == "all" or (recompute == "head" and self.field_kernel == "torch")

    def check(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor,
        base_resolution: tuple[int, int] | None,
        r: Tensor | None = None,
    ) -> None:
        """Raise InputError unless images, times, condition and base resolution fit the model and each other."""
        if x.ndim != 4:
            raise InputError(f"images have shape {tuple(x.shape)}; [B, C, H, W] is needed")
        check_resolution(self.config, tuple(x.shape[2:]), base_resolution)
        if x.shape[1] != self.config.channels:
            raise InputError(f"images have {x.shape[1]} channels; this model was built for {self.config.channels}")
        if not len(x) == len(t) == len(condition) or t.ndim != 1:
            raise InputError(
                f"times and condition have shapes {tuple(t.shape)} and {tuple(condition.shape)}; "
                f"both need one entry for each of the {len(x)} images"
            )
        if r is not None and r.shape != t.shape:
            raise InputError(f"ends of intervals have shape {tuple(r.shape)}; one is needed for each time, {len(t)}")
        if r is not None and r.device.type == "cpu" and (early := r < t).any():  # a check would stall an accelerator
            end, start = float(r[early][0]), float(t[early][0])
            raise InputError(f"an interval ends at r = {end:g} before its start t = {start:g}; r has to be t or later")

    def about(self) -> dict[str, Any]:
        """What `text.build_network` needs to rebuild this network, ready for JSON."""
        return {"config": dataclasses.asdict(self.config)}

    def as_condition(self, condition: Any) -> Tensor:
        """A condition [B, …] of this network's kind, labels or text features, checked. Raises InputError."""
        raise NotImplementedError

    def unconditional(self, condition: Tensor) -> Tensor | None:
        """The counterpart of a condition [B, …] that means "no condition"; None if the network does not know it."""
        return None

    def example_condition(self, images: int = 1, device: torch.device | None = None) -> Tensor:
        """A placeholder condition for B images [B, …], by default on the network's device: only its shape matters."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(self.config).items())


class PixNerd(PatchDenoiser):
    """The class-conditional velocity network v(x_t, t, label).

    For `recompute` and `field_kernel` see PatchDenoiser.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        recompute: Recompute = "head",
        field_kernel: FieldKernel = "torch",
    ):
        if num_classes < 1:
            raise InputError(f"num_classes is {num_classes}; it has to be at least 1")
        width, hidden = config.width, int(2 / 3 * 4 * config.width)
        blocks = (DiTBlock(Attention(width, config.heads), width, hidden) for _ in range(config.blocks))
        super().__init__(config, blocks, recompute, field_kernel)
        self.num_classes = num_classes
        self.label_embed = nn.Embedding(num_classes + 1, width)  # the last row is "no label"
        nn.init.normal_(self.label_embed.weight, std=0.02)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor,
        base_resolution: tuple[int, int] | None = None,
        tap: int | None = None,
        r: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity at x_t, for either `config.prediction`.

        Args:
            x: noisy images [B, C, H, W], H and W multiples of the patch size.
            t: times [B] in [0, 1]; 0 is noise, 1 is data.
            labels: classes [B], 0 … num_classes; num_classes itself means "no label".
            base_resolution: (h, w) that the transformer sees while the head decodes H × W; by default the same.
            tap: a block, 1 … blocks, whose tokens are returned as well; by default none.
            r: for a student, where the intervals end, [B] in [t, 1]: the velocity is then the mean over [t, r]; by
                default t, the velocity itself.

        Returns:
            velocity [B, C, H, W], an estimate of image − noise; with `tap`, (velocity, tokens [B, N, D]).

        Raises:
            InputError: unsuitable sizes, wrong channels, a label out of range, or an interval that ends before it
                starts.
        """
        self.check(x, t, labels, base_resolution, r)
        if labels.ndim != 1:
            raise InputError(f"labels have shape {tuple(labels.shape)}; one class for each image is needed, [B]")
        if labels.device.type == "cpu":  # a check would stall an accelerator; sample and train check beforehand
            check_labels(labels, self.num_classes)
        time = self.time_embed(t)  # [B, D]
        c = F.silu(time + self.label_embed(labels))  # [B, D]
        return self.denoise(x, t, time, c, base_resolution, tap=tap, r=r)

    def about(self) -> dict[str, Any]:
        return super().about() | {"num_classes": self.num_classes}

    def as_condition(self, condition: Any) -> Tensor:
        """Labels [B], 0 … num_classes."""
        try:
            labels = torch.as_tensor(condition)
        except (TypeError, ValueError, RuntimeError) as error:  # such as prompts
            raise InputError(f"labels are {condition!r}; a list of classes, whole numbers, is needed") from error
        if labels.numel() and (labels.is_floating_point() or labels.is_complex()):
            raise InputError(f"labels have type {labels.dtype}; whole numbers are needed")
        labels = labels.long()
        if labels.ndim != 1 or len(labels) == 0:
            raise InputError(f"labels have shape {tuple(labels.shape)}; a list of at least one class is needed")
        check_labels(labels, self.num_classes)
        return labels

    def unconditional(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.num_classes)

    def example_condition(self, images: int = 1, device: torch.device | None = None) -> Tensor:
        return torch.zeros(images, dtype=torch.long, device=device or self.patch_embed.weight.device)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise InputError unless every label is in 0 … num_classes (num_classes itself is "no label")."""
    if len(labels) and not 0 <= (low := int(labels.min())) <= (high := int(labels.max())) <= num_classes:
        wrong = low if low < 0 else high
        raise InputError(f"label {wrong} is outside 0 … {num_classes} ({num_classes} itself means no label)")
