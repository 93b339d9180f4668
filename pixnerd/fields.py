"""The two heads: a neural field for every patch (the paper's contribution), and the linear layer it replaces.

A head turns one condition vector per patch into the pixels of that patch. The neural field does so with a
small network per patch: a shared layer reads each pixel's noisy value and coordinates, another gives its output, and
the weights of the layers between them are generated from the condition. Source: arXiv 2507.23268, section 4.

Dimension letters: M patches (of all images of a batch), K pixels of a patch (row-major), C channels, D width of the
transformer, W width of the field, R = ratio · W its hidden width, F = 64 features of the coordinate encoding.
"""

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .encodings import Encoding, coordinate_table, encoding_features
from .encodings import dct_encoding as dct_encoding
from .encodings import sincos_encoding as sincos_encoding
from .layers import L2_EPS, OutputLinear, RMSNorm, at_least_float32, modulate
from .linear import Linear
from .model_config import FieldKernel, FieldWeights, WeightNorm

PATCHES_PER_PIECE = 1024  # the backward pass recomputes the field of this many patches at a time


def unit_fan_in(weight: Tensor) -> Tensor:
    """Scale every output unit's weights to unit L2 norm. weight [M, in, out]; the norm runs over the axis `in`."""
    squares = at_least_float32(weight).square().sum(dim=-2, keepdim=True)  # [M, 1, out]
    return weight * squares.clamp_min(L2_EPS**2).rsqrt().to(weight.dtype)


class FieldBlock(nn.Module):
    """h += W₂ᵀ·SiLU(W₁ᵀ·RMSNorm(h)) for each pixel, with W₁ [W, R] and W₂ [R, W] generated per patch."""

    def __init__(
        self, condition_width: int, width: int, ratio: int, weight_norm: WeightNorm, kernel: FieldKernel = "torch"
    ):
        super().__init__()
        self.width, self.hidden, self.weight_norm, self.kernel = width, ratio * width, weight_norm, kernel
        if kernel == "fused":
            from . import fused as fused  # its operators are known, and counted, from here on; needs Triton
        self.generator = Linear(condition_width, 2 * width * self.hidden)
        self.norm = RMSNorm(width)

    def weights(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """W₁ [M, W, R] and W₂ [M, R, W] of the patches with conditions s [M, D]."""
        return self.matrices(self.generate(s))

    def generate(self, s: Tensor) -> Tensor:
        """The weights of every patch's network. s [M, D] → [M, 2·W·R], W₁ before W₂."""
        return self.generator(s)

    def matrices(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """W₁ [M, W, R] and W₂ [M, R, W] as they multiply, from what `generate` gave."""
        fc1, fc2 = weights.chunk(2, dim=-1)  # [M, W·R] each
        fc1 = fc1.unflatten(-1, (self.width, self.hidden))  # [M, W, R]
        fc2 = fc2.unflatten(-1, (self.hidden, self.width))  # [M, R, W]
        if self.weight_norm != "none":
            fc1 = unit_fan_in(fc1)
        if self.weight_norm == "fc1+fc2":
            fc2 = unit_fan_in(fc2)
        return fc1, fc2

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """h [M, K, W] pixels' features, s [M, D] patches' conditions → [M, K, W]."""
        return self.field(h, self.generate(s))

    def field(self, h: Tensor, weights: Tensor) -> Tensor:
        """h [M, K, W] and weights from `generate` → [M, K, W]."""
        if self.kernel == "fused":
            from .fused import field_block

            return field_block(h, weights, self.norm.weight, self.weight_norm)
        fc1, fc2 = self.matrices(weights)
        return torch.baddbmm(h, F.silu(torch.bmm(self.norm(h), fc1)), fc2)


class SharedFieldBlock(nn.Module):
    """h += γ·W₂ SiLU(W₁(RMSNorm(h)·(1 + β) + α)) for each pixel: one network for all patches.

    A patch's condition gives only the vectors α, β and γ (adaLN), zero at the start: the block of DeCo's pixel decoder
    (arXiv 2511.19365, section 3.2).
    """

    def __init__(self, condition_width: int, width: int, ratio: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.fc1 = Linear(width, ratio * width)
        self.fc2 = Linear(ratio * width, width)
        self.modulation = Linear(condition_width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """h [M, K, W] pixels' features, s [M, D] patches' conditions → [M, K, W]."""
        return self.field(h, self.generate(s))

    def generate(self, s: Tensor) -> Tensor:
        """All that the network knows of a patch. s [M, D] → α, β and γ, [M, 3·W]."""
        return self.modulation(s)

    def field(self, h: Tensor, vectors: Tensor) -> Tensor:
        """h [M, K, W] and vectors from `generate` → [M, K, W]."""
        shift, scale, gate = vectors[:, None].chunk(3, dim=-1)  # [M, 1, W] each
        return torch.addcmul(h, gate, self.fc2(F.silu(self.fc1(modulate(self.norm(h), shift, scale)))))


class NeuralFieldHead(nn.Module):
    """Per pixel: concat(noisy values, coordinate encoding) → shared Linear → field blocks → RMSNorm → shared Linear.

    The last Linear starts at zero, so an untrained model predicts zero. For the switches see ModelConfig; `kernel` is
    PatchDenoiser's field_kernel.
    """

    def __init__(
        self,
        condition_width: int,
        channels: int,
        width: int = 64,
        blocks: int = 2,
        ratio: int = 2,
        encoding: Encoding = "dct",
        weight_norm: WeightNorm = "fc1+fc2",
        output_norm: bool = True,
        field_weights: FieldWeights = "generated",
        field_pixels: bool = True,
        kernel: FieldKernel = "torch",
    ):
        super().__init__()
        self.values, self.encoding = channels if field_pixels else 0, encoding
        self.embed = nn.Linear(self.values + encoding_features(encoding), width)
        if field_weights == "generated":
            made = (FieldBlock(condition_width, width, ratio, weight_norm, kernel) for _ in range(blocks))
        else:
            made = (SharedFieldBlock(condition_width, width, ratio) for _ in range(blocks))
        self.blocks = nn.ModuleList(made)
        self.norm = RMSNorm(width) if output_norm else nn.Identity()
        self.out = OutputLinear(width, channels)

    def decode(self, pixels: Tensor, table: Tensor, *generated: Tensor) -> Tensor:
        """pixels [M, K, C], the shared coordinate table [K, F], what each block generated [M, …] → [M, K, C]."""
        of_values, of_coordinates = self.embed.weight.split((self.values, table.shape[1]), dim=1)
        shared = F.linear(table, of_coordinates, self.embed.bias)  # [K, W]: one table serves all patches
        h = F.linear(pixels, of_values) + shared if self.values else shared.expand(len(pixels), -1, -1)  # [M, K, W]
        for block, weights in zip(self.blocks, generated, strict=True):
            h = block.field(h, weights)
        return self.out(self.norm(h))

    def forward(self, pixels: Tensor, s: Tensor, patch: tuple[int, int], recompute: bool) -> Tensor:
        """Decode patches of `patch` = (height, width) pixels. pixels [M, K, C], s [M, D] → [M, K, C].

        With `recompute`, only pixels, s and the generated weights are kept for the backward pass, which decodes again
        in pieces of at most 1,024 patches. The backward pass begins at the head, so recomputing it in one piece would
        not lower the memory peak. Generating the weights is four fifths of the head's arithmetic at the published sizes
        and is not repeated.
        """
        dtype = self.embed.weight.dtype
        precision = torch.promote_types(dtype, torch.float32)  # bfloat16 is too coarse for angles
        table = coordinate_table(self.encoding, *patch, precision, pixels.device).to(dtype)  # [K, F]
        generated = [block.generate(s) for block in self.blocks]  # [M, 2·W·R] each
        if not (recompute and torch.is_grad_enabled()):
            return self.decode(pixels, table, *generated)
        pieces = math.ceil(len(s) / PATCHES_PER_PIECE)
        parts = zip(*(tensor.chunk(pieces) for tensor in (pixels, *generated)), strict=True)
        again = functools.partial(checkpoint, self.decode, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(some_pixels, table, *some_generated) for some_pixels, *some_generated in parts])


class LinearHead(nn.Module):
    """The paper's baseline: one Linear, zero at the start, maps a patch's condition to all of its pixels.

    It does not see the noisy pixels: whatever the output needs from them has to pass through the token.
    """

    def __init__(self, condition_width: int, channels: int, patch_size: int):
        super().__init__()
        self.out = OutputLinear(condition_width, patch_size * patch_size * channels)

    def forward(self, pixels: Tensor, s: Tensor, patch: tuple[int, int], recompute: bool) -> Tensor:
        """s [M, D] → [M, K, C]; the values of `pixels` and `recompute` are not used."""
        return self.out(s).view_as(pixels)
