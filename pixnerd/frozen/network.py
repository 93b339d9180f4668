"""What a frozen image network can give, each in the form in which it is used.

Dimension letters: B images, C channels, H × W pixels, N tokens (rows × columns, row-major), F features.
"""

import torch
from torch import Tensor, nn

from ..errors import InputError


class FrozenNetwork(nn.Module):
    """An image network in evaluation mode whose weights do not change. A kind gives one or more of the three."""

    name: str
    features: int
    """F of its tokens"""
    measure: str
    """how measures in its pooled features are called, "EffLite0" for KID-EffLite0; empty for Inception, as in FID"""

    def pooled(self, images: Tensor) -> dict[str, Tensor]:
        """Features of whole images by name, "pool" [B, F] among them, of uint8 images [B, 3, H, W]."""
        raise InputError(f"{self.name} gives no features of whole images, which measures need")

    def tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of parts of images [B, N, F] in float32, without gradients: what REPA aligns tokens with.

        Args:
            images: [B, 1 or 3, H, W] in [−1, 1], of any size.
            grid: (rows, columns) of the parts.

        The network runs in bfloat16 on a GPU and in float32 on a CPU, whatever precision is used around it.
        """
        raise InputError(f"{self.name} gives no features of parts of images, which REPA needs")

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, F, h, w] of several depths, of images [B, 3, H, W] in [−1, 1]; gradients pass through."""
        raise InputError(f"{self.name} gives no feature maps, which the perceptual loss needs")

    def freeze(self, device: torch.device | str) -> None:
        """Move to `device`, in evaluation mode for good, without gradients of the weights."""
        self.to(device).eval().requires_grad_(False)
