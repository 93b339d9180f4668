"""DINOv2 (Oquab et al. 2304.07193) from transformers: REPA's published teacher, and the features of FD-DINOv2.

Dimension letters: B images, H × W pixels, F features.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .network import FrozenNetwork
from .preprocess import as_rgb, normalise, own_precision

PATCH = 14  # pixels along a side of a patch
POOLED_SIDE = 224  # pixels
LARGE = "facebook/dinov2-large"  # the one behind FD-DINOv2


class Dinov2(FrozenNetwork):
    """A DINOv2 with patch size 14, with or without register tokens.

    Args:
        source: a hub id ("facebook/dinov2-base") or a folder; by default ViT-L/14 from the hub.
        device: where it runs and expects images.

    Raises:
        InputError: transformers is missing, or the source cannot be loaded or is not a DINOv2 with patch size 14.
    """

    measure = "DINOv2"

    def __init__(self, source: str | Path | None = None, device: torch.device | str = "cpu"):
        super().__init__()
        source = source or LARGE
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise InputError("DINOv2 needs the package transformers: pip install 'pixnerd[text]'") from error
        try:
            network = AutoModel.from_pretrained(source, dtype=torch.float32)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"network {source} could not be loaded from a folder or the hub: {reason}") from error
        config = network.config
        patch = getattr(config, "patch_size", None)
        if config.model_type not in ("dinov2", "dinov2_with_registers") or patch != PATCH:
            raise InputError(
                f"network {source} is a {config.model_type} with patch size {patch}; "
                f"a DINOv2 with patch size {PATCH} is needed"
            )
        self.network, self.name, self.features = network, str(source), config.hidden_size
        self.extra_tokens = 1 + getattr(config, "num_register_tokens", 0)
        self.freeze(device)

    @torch.no_grad()
    def tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The normalised patch tokens of the last hidden state, without class and register tokens.

        As published, images are first normalised and then resized, bicubic without antialiasing, to 14 pixels per token
        (14/16 of their size for a model with patch size 16). The library interpolates position embeddings to the grid.
        """
        with own_precision(images.device):
            images = normalise((as_rgb(images) + 1) / 2)
            images = F.interpolate(images, (PATCH * grid[0], PATCH * grid[1]), mode="bicubic", align_corners=False)
            return self.network(images).last_hidden_state[:, self.extra_tokens :].float()

    def pooled(self, images: Tensor) -> dict[str, Tensor]:
        """ "pool" [B, F]: the class token, for images resized to 224 pixels, bicubic with antialiasing.

        Source: Stein et al. 2306.04675, who found its distances closer to human judgement than FID.
        """
        size = (POOLED_SIDE, POOLED_SIDE)
        images = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 255) / 255
        return {"pool": self.network(normalise(images)).pooler_output}
