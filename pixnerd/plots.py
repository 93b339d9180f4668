"""Every figure of the workbook, as functions that return a matplotlib Figure.

Images are [B, C, H, W] in [−1, 1]; one channel is drawn grey.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from .data import to_uint8


def _show(axis: plt.Axes, image: Tensor) -> None:
    """Draw one image [C, H, W] without ticks, every pixel a square."""
    pixels = to_uint8(image.cpu()).permute(1, 2, 0).numpy()  # [H, W, C]
    axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def image_table(
    images: Tensor, columns: int, row_titles: Sequence[str] = (), column_titles: Sequence[str] = (), side: float = 0.7
) -> Figure:
    """A table of images, row by row; `side` is an image's width in inches."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * side, rows * side), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axis in axes.flat[len(images) :]:
        axis.set_axis_off()
    for axis, image in zip(axes.flat, images, strict=False):
        _show(axis, image)
    for axis, title in zip(axes[:, 0], row_titles, strict=False):
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], column_titles, strict=False):
        axis.set_title(title, fontsize=9)
    plt.close(figure)
    return figure


def loss_curve(log: Sequence[dict[str, Any]]) -> Figure:
    """The loss over the steps of a log.jsonl, and, on the right, by tenth of t in its last quarter."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    left.plot([entry["step"] for entry in log], [entry["loss"] for entry in log])
    left.set(xlabel="step", ylabel="mean (v̂ − v)²", yscale="log", title="loss")
    last = log[-max(1, len(log) // 4) :]
    by_t = np.array([entry["loss_by_t"] for entry in last], dtype=float)  # None → nan
    known = ~np.isnan(by_t).all(axis=0)
    right.bar((np.arange(10) / 10 + 0.05)[known], np.nanmean(by_t[:, known], axis=0), width=0.09)
    right.set(xlabel="t  (0 noise, 1 data)", xlim=(0, 1), title="loss by t, last quarter")
    plt.close(figure)
    return figure
