"""The coordinate encodings of a neural field: what each pixel of a patch is told about its position.

An encoding consists of a function, a row in ENCODINGS and a name in Encoding. The functions import torch themselves, so
that configurations and --help can list the names without it.

Dimension letters: K pixels of a patch (row-major), F features of a pixel's coordinates.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Encoding = Literal["dct", "sincos", "none"]


def dct_encoding(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosine products of the DCT, damped: cos(π f_x x)·cos(π f_y y) / (1 + f_x f_y), [K, 64].

    x = column and y = row over linspace(0, 1); eight frequencies linspace(0, 8, 8) (not integers, as published), f_x
    the outer index of the 8 × 8 features. Source: arXiv 2507.23268, section 4.
    """
    import torch

    frequency = torch.linspace(0, 8, 8, dtype=dtype, device=device)
    y = torch.linspace(0, 1, height, dtype=dtype, device=device)
    x = torch.linspace(0, 1, width, dtype=dtype, device=device)
    cos_x = torch.cos(math.pi * x[:, None] * frequency)  # [width, 8]
    cos_y = torch.cos(math.pi * y[:, None] * frequency)  # [height, 8]
    products = cos_x[None, :, :, None] * cos_y[:, None, None, :]  # [height, width, 8 (f_x), 8 (f_y)]
    damped = products / (1 + frequency[:, None] * frequency)
    return damped.reshape(height * width, 64)


def sincos_encoding(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[cos xω₀, cos yω₀, cos xω₁, cos yω₁, …], ω_k = 10000^(−4k/128), k = 0 … 31: [K, 64].

    x = column and y = row over linspace(0, 16). The published text-to-image model uses this one, cosines only.
    """
    import torch

    omega = 10000.0 ** (-4 / 128 * torch.arange(32, dtype=dtype, device=device))
    y = torch.linspace(0, 16, height, dtype=dtype, device=device)
    x = torch.linspace(0, 16, width, dtype=dtype, device=device)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    angles = torch.stack((grid_x, grid_y), -1).reshape(-1, 1, 2) * omega[:, None]  # [K, 32, 2]
    return angles.flatten(1).cos()


def no_encoding(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """No features, [K, 0]: the field sees only each pixel's noisy value."""
    import torch

    return torch.zeros(height * width, 0, dtype=dtype, device=device)


ENCODINGS = {"dct": (dct_encoding, 64), "sincos": (sincos_encoding, 64), "none": (no_encoding, 0)}  # function, F


def encoding_features(encoding: Encoding) -> int:
    """F, the features of a pixel's coordinates."""
    return ENCODINGS[encoding][1]


@functools.lru_cache(maxsize=32)
def coordinate_table(encoding: Encoding, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The encoded coordinates of a patch's pixels, [K, F]: the same for every patch, so computed once and cached."""
    import torch

    with torch.inference_mode(False):  # the table outlives the caller, who may be in inference mode
        return ENCODINGS[encoding][0](height, width, dtype, device)
