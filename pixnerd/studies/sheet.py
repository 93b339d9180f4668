"""Sixteen samples as one small picture, as a study keeps it of each run. It needs no torch."""

import contextlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError
from ..files import read_arrays, readable

SHEET = 16  # samples on a sheet
ROW = 4  # samples beside each other
LINE = 128  # grey of the lines between them, one pixel wide
TILE = 64  # larger samples are reduced to about this side
LARGEST = 2**28  # bytes of samples that are read for a sheet
QUALITIES = (95, 85, 70, 50)  # of WebP, tried in turn where a lossless sheet is too large


def save_sheet(images: np.ndarray, file: Any) -> None:
    """Write up to 16 images, uint8 [N, S, S, 3], as a grid of 4 × 4 in lossless WebP; places that are left are grey."""
    side = images.shape[1]
    grid = np.full((ROW * (side + 1) + 1, ROW * (side + 1) + 1, 3), LINE, np.uint8)
    for place, image in enumerate(images[:SHEET]):
        top, left = (1 + (side + 1) * step for step in divmod(place, ROW))
        grid[top : top + side, left : left + side] = image
    Image.fromarray(grid).save(file, "WEBP", lossless=True)


def lossy(sheet: bytes, quality: int) -> bytes:
    """A sheet in lossy WebP of a quality from 0 to 100; as it is where that is no smaller, or if it is no picture."""
    file = io.BytesIO()
    with contextlib.suppress(OSError):
        Image.open(io.BytesIO(sheet)).convert("RGB").save(file, "WEBP", quality=quality, method=6)
    return file.getvalue() if 0 < file.tell() < len(sheet) else sheet


def at_most(sheet: bytes, size: int) -> bytes:
    """A sheet as it is if it has at most `size` bytes, else in the best quality that has, or in the lowest."""
    kept = sheet
    for quality in QUALITIES:
        if len(kept) <= size:
            break
        kept = lossy(sheet, quality)
    return kept


def sheet_of_samples(path: Path) -> bytes:
    """A sheet of sixteen samples in samples.npz, spread evenly over it: their middle, at most about TILE wide.

    Raises:
        InputError: the file is damaged, is too large to be read for a picture, or holds no samples.
    """
    with readable(path, "is not a readable .npz"):
        try:
            with zipfile.ZipFile(path) as file:
                size = file.getinfo("arr_0.npy").file_size
        except (KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} holds no samples") from error
    if size > LARGEST:
        raise InputError(
            f"{path} has {size / 1e6:.0f} MB of samples; a sheet is made of at most {LARGEST / 1e6:.0f} MB"
        )
    pixels = read_arrays(path, ("arr_0",))["arr_0"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise InputError(f"{path} holds no samples: they are arr_0, uint8 [N, H, W, 3]")
    chosen = np.unique(np.arange(SHEET) * len(pixels) // SHEET)
    side = min(pixels.shape[1:3])
    top, left = ((whole - side) // 2 for whole in pixels.shape[1:3])
    factor = max(1, round(side / TILE))
    tiles = [Image.fromarray(image).reduce(factor) for image in pixels[chosen, top : top + side, left : left + side]]
    file = io.BytesIO()
    save_sheet(np.stack(tiles), file)
    return file.getvalue()
