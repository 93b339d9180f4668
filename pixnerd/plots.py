"""Every figure of the workbook, as functions that return a matplotlib Figure.

Images are [B, C, H, W] in [−1, 1]; one channel is drawn grey.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from .data import to_uint8

GAP = 2  # pixels between images


def image_table(
    images: Tensor, columns: int, row_titles: Sequence[str] = (), column_titles: Sequence[str] = (), side: float = 0.5
) -> Figure:
    """A table of images, row by row, `side` inches each; every pixel is drawn as a square."""
    height, width = images.shape[2:]
    rows = -(-len(images) // columns)
    pixels = to_uint8(images.cpu())
    if pixels.shape[1] == 1:  # 32 greys look the same and make the file a third as large
        pixels = (pixels.float() / 255 * 31).round().mul(255 / 31).to(pixels.dtype)
    grid = make_grid(pixels, nrow=columns, padding=GAP, pad_value=255)  # [3, rows·…, columns·…]
    size = (columns * side + 0.8, rows * side * height / width + 0.4)  # the rest is for the titles
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=9, labelbottom=False, labeltop=True)
    centres = GAP + (np.arange(max(rows, columns)) + 0.5)[:, None] * (np.array([height, width]) + GAP) - GAP / 2 - 0.5
    axis.set_yticks(centres[: len(row_titles), 0], row_titles)
    axis.set_xticks(centres[: len(column_titles), 1], column_titles)
    plt.close(figure)  # whoever asked for it displays it, once
    return figure


def loss_curve(log: Sequence[dict[str, Any]]) -> Figure:
    """The loss over the steps of a log.jsonl, and, on the right, by tenth of t over its last quarter."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    losses = [entry["loss"] for entry in log]
    left.plot([entry["step"] for entry in log], losses)
    top = 3 * float(np.median(losses))  # the first steps' fall would flatten all that follows
    left.set(xlabel="step", ylabel="mean (v̂ − v)²", ylim=(0, top), title="loss")
    last = log[-max(1, len(log) // 4) :]
    by_t = np.array([entry["loss_by_t"] for entry in last], dtype=float)  # None → nan
    known = ~np.isnan(by_t).all(axis=0)
    right.bar((np.arange(10) / 10 + 0.05)[known], np.nanmean(by_t[:, known], axis=0), width=0.09)
    right.set(xlabel="t  (0 noise, 1 data)", xlim=(0, 1), title="loss by t, last quarter")
    plt.close(figure)
    return figure
