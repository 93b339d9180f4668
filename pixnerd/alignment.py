"""Alignment of a model's tokens with the features of a frozen image network, the teacher: REPA (arXiv 2410.06940).

PixNerd adds 0.5 times this loss, on the output of its 8th block (6th for text), with DINOv2-B as the teacher.
Dimension letters: B images, C channels, N tokens (rows × columns, row-major), D width, F features of a token.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError
from .losses import EfficientNetFeatures, at_least_float32

PATCH = 14  # pixels along a side of a DINOv2 patch
STRIDE = 16  # pixels between positions of the EfficientNet block
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in [0, 1]


class Projector(nn.Sequential):
    """Tokens [B, N, D] → what is compared with the teacher's [B, N, F]: three linear layers, torch's initialisation."""

    def __init__(self, width: int, features: int):
        layers = nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, features)
        super().__init__(*layers)


class Teacher(Protocol):
    """A frozen network that describes every token's part of an image."""

    name: str
    features: int  # F

    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, rows·columns, F] in float32, without gradients, of images [B, 1 or 3, H, W] in [−1, 1], any size.

        grid is (rows, columns) of the model's tokens. The network runs in bfloat16 on a GPU, in float32 on a CPU.
        """


def teacher_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 elsewhere, whatever precision the training around it runs in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def check_channels(images: Tensor) -> None:
    """Raise InputError unless the images are grey or RGB."""
    if images.shape[1] not in (1, 3):
        raise InputError(f"images have {images.shape[1]} channels; a teacher looks at 1 (grey) or 3 (RGB)")


class Dinov2Teacher:
    """The patch tokens of a DINOv2's last hidden state, normed, without the class token and register tokens.

    As published, images are normalised with ImageNet's mean and deviation first, and then resized, bicubic without
    antialias, to 14 pixels a token: 14/16 of their size for a model with patches of 16.

    Args:
        source: a hub id ("facebook/dinov2-base") or a folder.
        device: where it runs; images have to be there.

    Raises:
        InputError: transformers is missing, the source cannot be loaded, or is no DINOv2 with patches of 14.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu"):
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise InputError("a DINOv2 teacher needs the package transformers: pip install 'pixnerd[text]'") from error
        try:
            network = AutoModel.from_pretrained(source, dtype=torch.float32)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"teacher {source} could not be loaded from a folder or the hub: {reason}") from error
        config = network.config
        patch = getattr(config, "patch_size", None)
        if config.model_type not in ("dinov2", "dinov2_with_registers") or patch != PATCH:
            raise InputError(
                f"teacher {source} is a {config.model_type} with patch size {patch}; "
                f"a DINOv2 with patch size {PATCH} is needed"
            )
        self.network = network.to(device).eval().requires_grad_(False)
        self.name, self.features = str(source), config.hidden_size
        self.extra_tokens = 1 + getattr(config, "num_register_tokens", 0)
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    @torch.no_grad()
    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, rows·columns, F], see Teacher; the library interpolates the position embeddings to the grid."""
        check_channels(images)
        with teacher_precision(images.device):
            images = ((images.float() + 1) / 2 - self.mean) / self.std  # [B, 3, H, W]
            images = F.interpolate(images, (PATCH * grid[0], PATCH * grid[1]), mode="bicubic", align_corners=False)
            return self.network(images).last_hidden_state[:, self.extra_tokens :].float()


class EfficientNetTeacher:
    """A small teacher without internet: block 10 of EfficientNet-Lite0, 112 features every 16 pixels.

    Images are resized, bicubic, to 16 pixels a token. 224 × 224 pixels give 14 × 14 tokens.

    Raises:
        InputError: the packages with the network are missing.
    """

    name, features = "efficientnet", 112

    def __init__(self, device: torch.device | str = "cpu"):
        self.network = EfficientNetFeatures((10,), device)

    @torch.no_grad()
    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, rows·columns, 112], see Teacher."""
        check_channels(images)
        with teacher_precision(images.device):
            size = STRIDE * grid[0], STRIDE * grid[1]
            images = images.float().expand(-1, 3, -1, -1)
            images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
            (features,) = self.network(images)  # [B, 112, rows, columns]
            return features.flatten(2).transpose(1, 2).float()


def load_teacher(source: str, device: torch.device | str = "cpu") -> Teacher:
    """A teacher by name: "efficientnet" (112 features, inside a wheel), or a DINOv2's folder or hub id.

    Raises:
        InputError: a package or the model is missing, or is no DINOv2 with patches of 14.
    """
    return EfficientNetTeacher(device) if source == "efficientnet" else Dinov2Teacher(source, device)


class CachedTeacher:
    """A teacher that looks at each image once and keeps its features in main memory, in bfloat16.

    That is for small data sets: 1,000 images of 256 tokens with 768 features take 0.4 GB.
    """

    def __init__(self, teacher: Teacher):
        self.teacher, self.name, self.features = teacher, teacher.name, teacher.features
        self._memory: dict[Hashable, Tensor] = {}  # (key, grid) → [N, F] bfloat16

    def __call__(self, images: Tensor, grid: tuple[int, int], keys: Sequence[Hashable]) -> Tensor:
        """[B, rows·columns, F] in float32, where the images are.

        keys: one for each image, (index in the data set, mirrored) for example; equal keys have to mean equal images.
        """
        entries = [(key, tuple(grid)) for key in keys]
        place = dict(zip(entries, range(len(images)), strict=True))
        missing = [entry for entry in place if entry not in self._memory]
        if missing:
            features = self.teacher(images[[place[entry] for entry in missing]], grid).to("cpu", torch.bfloat16)
            self._memory.update(zip(missing, features, strict=True))
        return torch.stack([self._memory[entry] for entry in entries]).to(images.device).float()


def alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """1 − cosine of the angle between two feature vectors, averaged over an image's tokens: [B] in 0 … 2.

    projected (the projector's output) and target (the teacher's) are [B, N, F]; computed in float32 or better.

    Raises:
        InputError: the shapes differ.
    """
    if projected.shape != target.shape:
        raise InputError(
            f"projected tokens of shape {tuple(projected.shape)} cannot be aligned with a teacher's "
            f"{tuple(target.shape)}: tokens and features have to be the same"
        )
    return (1 - F.cosine_similarity(at_least_float32(projected), at_least_float32(target), dim=-1)).mean(1)
