"""Preprocessing shared by the frozen image networks: channels, means, precision.

Dimension letters: B images, C channels, H × W pixels.
"""

import functools

import torch
from torch import Tensor

from ..errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


def normalise(images: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] in [0, 1] → [B, 3, H, W], normalised by ImageNet's mean and standard deviation."""
    mean, std = constants(images.dtype, images.device)
    return (images - mean) / std


@functools.lru_cache(maxsize=8)
def constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation, [3, 1, 1] each: copied to a GPU once, since it waits for each copy."""
    with torch.inference_mode(False):  # they outlive the caller, who may be in inference mode
        return tuple(
            torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )


def as_rgb(images: Tensor) -> Tensor:
    """[B, 1 or 3, H, W] → float32 [B, 3, H, W]. Raises InputError for any other number of channels."""
    if images.shape[1] not in (1, 3):
        raise InputError(f"images have {images.shape[1]} channels; a teacher takes 1 (grey) or 3 (RGB)")
    return images.float().expand(-1, 3, -1, -1)


def own_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 elsewhere, regardless of the surrounding autocast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
