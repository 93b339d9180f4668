"""The interface of frozen image networks: the kinds of features that they can give.

Dimension letters: B images, C channels, H × W pixels, N tokens (rows × columns, row-major), F features.
"""

import torch
from torch import Tensor, nn

from ..errors import InputError


class FrozenNetwork(nn.Module):
    """An image network in evaluation mode, with fixed weights. A subclass provides one or more kinds of features."""

    name: str
    features: int = 0
    """F of its tokens"""
    measure: str
    """suffix for metrics of its pooled features, "EffLite0" in KID-EffLite0; empty for Inception, as in FID"""

    def pooled(self, images: Tensor) -> dict[str, Tensor]:
        """Features by name, one vector per image, including "pool" [B, F]. Images are uint8 [B, 3, H, W]."""
        raise InputError(f"{self.name} gives no features of whole images, which metrics need")

    def tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of image patches [B, N, F] in float32, without gradients: what REPA aligns tokens with.

        Args:
            images: [B, 1 or 3, H, W] in [−1, 1], of any size.
            grid: (rows, columns) of the patches.

        The network runs in bfloat16 on a GPU and in float32 on a CPU, regardless of the surrounding autocast.
        """
        raise InputError(f"{self.name} gives no features of image patches, which REPA needs")

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, F, h, w] at several depths for images [B, 3, H, W] in [−1, 1]; gradients pass through."""
        raise InputError(f"{self.name} gives no feature maps, which the perceptual loss and FD-loss need")

    def freeze(self, device: torch.device | str) -> None:
        """Move to `device`, permanently in evaluation mode, without gradients for the weights."""
        self.to(device).eval().requires_grad_(False)
