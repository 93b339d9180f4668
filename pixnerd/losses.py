"""Further losses for a velocity network in pixel space: errors weighted by frequency, and distances between features.

Both were shown to matter by systems after PixNerd: DeCo (arXiv 2511.19365) and PixelGen (arXiv 2602.02493).
Dimension letters: B images, C channels, H × W pixels, F features of a position. t = 0 is noise and t = 1 is data.
"""

import functools
import math
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError
from .metrics.efficientnet import EfficientNetLite0

BLOCK = 8  # pixels along a side of a JPEG block
GATE = 0.3  # t from which the perceptual loss counts

# ITU-T T.81, tables K.1 and K.2: rows are vertical frequencies, columns horizontal ones
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # rows Y, Cb, Cr of R, G, B


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where that is more precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def quantisation_tables(quality: int) -> Tensor:
    """The tables that libjpeg quantises with: [2, 8, 8], luminance then chrominance, whole numbers 1 … 255 in float64.

    Raises:
        InputError: the quality is no whole number from 1 to 100.
    """
    if not isinstance(quality, int) or not 1 <= quality <= 100:
        raise InputError(f"JPEG quality is {quality}; it has to be a whole number from 1 to 100")
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = torch.tensor([LUMINANCE, CHROMINANCE])
    return ((base * percent + 50) // 100).clamp(1, 255).double()


def frequency_weights(quality: int) -> Tensor:
    """1 / table, scaled to a mean of 1 for each table: [2, 8, 8], luminance then chrominance, in float64.

    All are 1 at quality 100 and at quality 1, where both tables are flat.
    """
    inverse = 1 / quantisation_tables(quality)
    return inverse / inverse.mean(dim=(1, 2), keepdim=True)


def dct_matrix() -> Tensor:
    """The orthonormal DCT-II of 8 values as a matrix [8, 8] in float64: row k holds the cosine of frequency k."""
    k = torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos(math.pi / BLOCK * (k + 0.5) * k[:, None]) * math.sqrt(2 / BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix


def colour_matrix() -> Tensor:
    """An orthonormal basis of colours, [3, 3] in float64: Y, then two directions that do not change Y.

    Gram–Schmidt on the rows of JPEG's YCbCr, Y first.
    """
    rows = []
    for row in torch.tensor(YCBCR, dtype=torch.float64):
        for earlier in rows:
            row = row - (row @ earlier) * earlier
        rows.append(row / row.norm())
    return torch.stack(rows)


@functools.lru_cache(maxsize=32)
def _constants(quality: int, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [C, 1, 1, 8, 8], DCT [8, 8] and colours [3, 3]: kept, so that a GPU gets them only once."""
    tables = [0, 1, 1] if channels == 3 else [0]
    with torch.inference_mode(False):  # they outlive the caller, who may be in inference mode
        weights = frequency_weights(quality)[tables][:, None, None]
        return tuple(constant.to(device, dtype) for constant in (weights, dct_matrix(), colour_matrix()))


def frequency_weighted(error: Tensor, quality: int) -> Tensor:
    """The mean squared error with a weight for each frequency of JPEG's 8 × 8 blocks: what JPEG keeps counts more.

    DeCo's frequency-aware loss (arXiv 2511.19365): the velocity's error in YCbCr, the orthonormal DCT-II of each block,
    each coefficient squared and weighted with 1/q of JPEG's table (ITU-T T.81, Annex K) at that quality, with a mean
    weight of 1 for each table. The luminance table is for Y and for images of one channel, the chrominance table for
    the other two. Unlike DeCo we make YCbCr's basis orthonormal (`colour_matrix`), so that with all weights 1, as at
    quality 100, the loss is exactly the mean squared error; plain YCbCr scales that of white noise by 0.42.

    Args:
        error: estimate − truth [B, C, H, W] with 1 or 3 channels (RGB), H and W multiples of 8.
        quality: 1 … 100 as in libjpeg. From 20 to 90 the weights hardly differ, for only their ratios count; towards
            100 the tables round to 1, and towards 1 they end at 255, so that both ends are the plain mean.

    Returns:
        [B], in float32 or better, also under autocast.

    Raises:
        InputError: channels, sides or quality do not fit.
    """
    channels, height, width = error.shape[1:]
    if channels not in (1, 3):
        raise InputError(f"images have {channels} channels; the frequency-weighted loss knows 1 (grey) and 3 (RGB)")
    if height % BLOCK or width % BLOCK:
        raise InputError(
            f"image size {height}x{width} does not fit JPEG's blocks; both sides have to be multiples of 8"
        )
    with torch.autocast(error.device.type, enabled=False):
        error = at_least_float32(error)
        weights, dct, colours = _constants(quality, channels, error.dtype, error.device)
        if channels == 3:
            error = torch.einsum("kc,bchw->bkhw", colours, error)
        blocks = rearrange(error, "b c (y i) (x j) -> b c y x i j", i=BLOCK, j=BLOCK)
        return (weights * (dct @ blocks @ dct.T).square()).mean(dim=(1, 2, 3, 4, 5))


class EfficientNetFeatures(nn.Module):
    """Images [B, 3, H, W] in [−1, 1] → what some blocks of EfficientNet-Lite0 give, a list of [B, F, h, w]. Frozen.

    The outputs of its 16 blocks have, by index (channels, stride in pixels): 0 (16, 2), 1–2 (24, 4), 3–4 (40, 8),
    5–7 (80, 16), 8–10 (112, 16), 11–14 (192, 32), 15 (320, 32). By default the last of each stride down to 16.

    Raises:
        InputError: the packages with the network are missing.
    """

    def __init__(self, blocks: tuple[int, ...] = (0, 2, 4, 10), device: torch.device | str = "cpu"):
        super().__init__()
        self.network = EfficientNetLite0(device).network
        self.blocks = blocks

    def forward(self, images: Tensor) -> list[Tensor]:
        """The outputs of the chosen blocks, in the network's order; later blocks are not computed."""
        outputs = []
        x = self.network._swish(self.network._bn0(self.network._conv_stem(images)))
        for index, block in enumerate(self.network._blocks[: max(self.blocks) + 1]):
            x = block(x)
            if index in self.blocks:
                outputs.append(x)
        return outputs


class ExportedFeatures(nn.Module):
    """A network that torch.export saved: as it was exported, it has no training mode to be taken out of."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> "ExportedFeatures":
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] in [−1, 1] → features, a list of [B, F, h, w]."""
        return list(self.network(images))


def load_features(source: str, device: torch.device | str = "cpu") -> nn.Module:
    """The network of a perceptual loss: "efficientnet" (inside a wheel), or a file of torch.export.save (.pt2).

    A file's network maps images [B, 3, H, W] in [−1, 1], of any batch size, to a list of features [B, F, h, w].

    Raises:
        InputError: there is no such file, it is none of torch.export, or the packages with EfficientNet are missing.
    """
    if source == "efficientnet":
        return EfficientNetFeatures(device=device)
    if not Path(source).is_file():
        raise InputError(f"perceptual is {source!r}; it has to be efficientnet or a file that torch.export.save wrote")
    try:
        network = torch.export.load(source).module()
    except Exception as error:  # torch.export raises whatever the unpacking met first
        raise InputError(f"{source} is not a network that torch.export.save wrote") from error
    return ExportedFeatures(network).to(device)


class PerceptualLoss:
    """The distance between two images in the features of a frozen network, for times from 0.3 on.

    Each position's feature vector is scaled to unit length; the squared distance of two, 0 … 4, is averaged over
    positions, then over layers: LPIPS (Zhang et al. 1801.03924) without its learned weights. That it helps training on
    pixels, and that noisier times are better left out, is PixelGen's finding (arXiv 2602.02493).

    Args:
        network: maps [B, 3, H, W] in [−1, 1] to a list of features [B, F, h, w], `EfficientNetFeatures` for example;
            it is set to evaluation mode and frozen.
    """

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    def __call__(self, estimate: Tensor, image: Tensor, t: Tensor) -> Tensor:
        """The distance between x̂ and the clean image of each position in the batch.

        Args:
            estimate: x̂ [B, C, H, W] around [−1, 1], 1 or 3 channels; the only one that gradients reach.
            image: the clean image [B, C, H, W].
            t: times [B] in [0, 1]. Images with t < 0.3 are computed all the same, so that a GPU need not wait.

        Returns:
            [B], 0 where t < 0.3.

        Raises:
            InputError: the shapes differ, or the channels are neither 1 nor 3.
        """
        if estimate.shape != image.shape or image.shape[1] not in (1, 3):
            raise InputError(
                f"the perceptual loss was given images of shapes {tuple(estimate.shape)} and {tuple(image.shape)}; "
                "both need the same shape [B, 1 or 3, H, W]"
            )
        with torch.no_grad():
            wanted = self.network(image.expand(-1, 3, -1, -1))
        layers = [
            (unit(ours) - unit(theirs)).square().sum(1).mean((1, 2))  # [B]
            for ours, theirs in zip(self.network(estimate.expand(-1, 3, -1, -1)), wanted, strict=True)
        ]
        return torch.stack(layers).mean(0).where(t >= GATE, 0)


def unit(features: Tensor) -> Tensor:
    """Feature maps [B, F, h, w] with each position's vector scaled to length 1, in float32 or better."""
    return F.normalize(at_least_float32(features), dim=1)
