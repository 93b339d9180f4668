"""All figures of the workbook, as functions that return a matplotlib Figure.

Images are [B, C, H, W] in [−1, 1]; one channel is drawn grey.
"""

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor
from torchvision.utils import make_grid

from .data import to_uint8

GAP = 2  # pixels between images
FEW = 12  # up to this many values on a logarithmic axis are all labelled


def _few_levels(images: Tensor) -> Tensor:
    """uint8 with 32 levels, which look the same and make the figure's file a third as large."""
    return (to_uint8(images.cpu()).float() / 255 * 31).round().mul(255 / 31).to(torch.uint8)


def image_table(
    images: Tensor, columns: int, row_titles: Sequence[str] = (), column_titles: Sequence[str] = (), side: float = 0.5
) -> Figure:
    """A table of images, row by row, each `side` inches wide; every pixel is drawn as a square."""
    height, width = images.shape[2:]
    rows = -(-len(images) // columns)
    grid = make_grid(_few_levels(images), nrow=columns, padding=GAP, pad_value=255)  # [3, rows·…, columns·…]
    size = (columns * side + 0.8, rows * side * height / width + 0.4)  # the rest is for the titles
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=9, labelbottom=False, labeltop=True)
    centres = GAP + (np.arange(max(rows, columns)) + 0.5)[:, None] * (np.array([height, width]) + GAP) - GAP / 2 - 0.5
    axis.set_yticks(centres[: len(row_titles), 0], row_titles)
    axis.set_xticks(centres[: len(column_titles), 1], column_titles)
    plt.close(figure)  # so that only the caller displays it, once
    return figure


def captioned_images(images: Tensor, captions: Sequence[str], columns: int, side: float = 0.64) -> Figure:
    """A table of images [B, C, H, W], each `side` inches wide, with a caption of up to three short lines below it."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * side, rows * (side + 0.38)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, pixels, caption in zip(axes.flat, _few_levels(images), captions, strict=False):
        axis.imshow(pixels.permute(1, 2, 0).squeeze(-1).numpy(), interpolation="nearest", cmap="gray", vmin=0, vmax=255)
        lines = textwrap.wrap(caption, int(side * 18), max_lines=3, placeholder="…")
        axis.text(0.5, -0.06, "\n".join(lines), transform=axis.transAxes, ha="center", va="top", fontsize=6.5)
    figure.subplots_adjust(
        left=0, right=1, top=1, bottom=0.38 / (rows * (side + 0.38)), wspace=0.06, hspace=0.42 / side
    )
    plt.close(figure)
    return figure


def matrix(values: Tensor, names: Sequence[str]) -> Figure:
    """A square table of numbers [N, N] in [0, 1], dark for small, with the same names along both sides."""
    side = 0.5 * len(names) + 1.2
    figure, axis = plt.subplots(figsize=(side, side - 0.4), layout="constrained")
    axis.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis")
    for row, column in np.ndindex(*values.shape):
        value = float(values[row, column])
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value < 0.6 else "k")
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    plt.close(figure)
    return figure


def bars(values: Tensor, names: Sequence[str], title: str, reference: dict[str, float] | None = None) -> Figure:
    """Horizontal bars of values [N] between 0 and 1, the first at the top, each with its number.

    References are dashed lines across the bars: {label: value}.
    """
    figure, axis = plt.subplots(figsize=(5, 0.3 * len(names) + 0.6), layout="constrained")
    rows = axis.barh(list(names), values.numpy())
    axis.bar_label(rows, fmt="%.2f", padding=3, fontsize=9)
    axis.set(xlim=(0, 1), title=title)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    for label, value in (reference or {}).items():
        axis.axvline(value, color="k", linestyle="--", linewidth=1, label=label)
    if reference:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    plt.close(figure)
    return figure


def compared_bars(groups: dict[str, dict[str, float]], names: Sequence[str], top: float) -> Figure:
    """Horizontal bars between 0 and `top`, grouped by name: {group: {name: value}}.

    A missing value leaves a gap.
    """
    height = 0.8 / len(groups)
    figure, axis = plt.subplots(figsize=(6, 0.24 * len(groups) * len(names) + 0.8), layout="constrained")
    for index, (group, values) in enumerate(groups.items()):
        rows = [row for row, name in enumerate(names) if name in values]
        offset = (index - (len(groups) - 1) / 2) * height
        drawn = axis.barh(
            [row + offset for row in rows], [values[names[row]] for row in rows], height, label=group, color=f"C{index}"
        )
        axis.bar_label(drawn, fmt="%.2f" if top <= 1 else "%.1f", padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlim=(0, top))
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    plt.close(figure)
    return figure


def cost_curve(lines: dict[str, list[tuple[int, float]]], name: str, published: dict[str, float]) -> Figure:
    """A figure of merit over network passes per image, both logarithmic: {label: [(passes, value)]}.

    Published values are dashed lines.
    """
    figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
    for label, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    for label, value in published.items():
        axis.axhline(value, color="0.5", linestyle="--", linewidth=0.8)
        axis.annotate(f"{label}: {value}", (0.01, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axis.set(xlabel="network passes per image", ylabel=name, xscale="log", yscale="log")
    passes = sorted({count for points in lines.values() for count, _ in points})
    axis.set_xticks(passes, [str(count) for count in passes])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_formatter("{x:.4g}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    plt.close(figure)
    return figure


def roofline(roofs: dict[str, tuple[float, float]], steps: dict[str, tuple[str, float, float]]) -> Figure:
    """Achieved arithmetic over arithmetic per byte, both logarithmic, below what a device can do at best.

    Args:
        roofs: precision → FLOP/s of a matrix product, bytes per second of a copy.
        steps: name → precision, FLOP per byte, FLOP/s; a step has the colour of its precision's roof.
    """
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    intensities = [intensity for _, intensity, _ in steps.values()]
    ridges = [matmul / copy for matmul, copy in roofs.values()]
    x = np.geomspace(min(intensities + ridges) / 4, max(intensities + ridges) * 4, 100)
    colours = {precision: f"C{number}" for number, precision in enumerate(roofs)}
    for precision, (matmul, copy) in roofs.items():
        axis.plot(x, np.minimum(matmul, x * copy) / 1e9, color=colours[precision], label=f"at best, {precision}")
    for (name, (precision, intensity, rate)), marker in zip(steps.items(), itertools.cycle("osD^vP*X<>")):
        axis.plot(intensity, rate / 1e9, marker, color=colours[precision], markersize=5, label=name)
    axis.set(xlabel="FLOP per byte moved", ylabel="GFLOP/s", xscale="log", yscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=7)
    plt.close(figure)
    return figure


def loss_curve(log: Sequence[dict[str, Any]]) -> Figure:
    """The loss over the steps of a log.jsonl and, on the right, its last quarter by tenths of t."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    losses = np.array([entry["loss"] for entry in log], dtype=float)  # None, if every step was skipped → nan
    left.plot([entry["step"] for entry in log], losses)
    finite = losses[np.isfinite(losses)]
    top = 3 * float(np.median(finite)) if finite.size else None  # the drop in the first steps would flatten the rest
    left.set(xlabel="step", ylabel="mean (v̂ − v)²", ylim=(0, top), title="loss")
    last = log[-max(1, len(log) // 4) :]
    by_t = np.array([entry["loss_by_t"] for entry in last], dtype=float)  # None → nan
    known = ~np.isnan(by_t).all(axis=0)
    right.bar((np.arange(10) / 10 + 0.05)[known], np.nanmean(by_t[:, known], axis=0), width=0.09)
    right.set(xlabel="t  (0 noise, 1 data)", xlim=(0, 1), title="loss by t, last quarter")
    plt.close(figure)
    return figure


def speed_curve(log: Sequence[dict[str, Any]]) -> Figure:
    """Images per second over the steps of a log.jsonl and, on the right, the devices' utilisation."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.2), layout="constrained")
    steps = [entry["step"] for entry in log]
    for axis, name, title in zip(
        axes, ("images_per_second", "utilisation"), ("images / s", "utilisation"), strict=True
    ):
        axis.plot(steps, [entry[name] for entry in log])
        axis.set(xlabel="step", ylim=(0, None), title=title)
    plt.close(figure)
    return figure


def tracks(panels: dict[str, Tensor], targets: Tensor, under: Tensor | None = None) -> Figure:
    """Paths of points in the plane, one panel each [T, n, 2]: from a dot, coloured by the target nearest the end.

    Targets [m, 2] are crosses; `under` [T, n, 2], if given, is drawn below the paths of every panel in wide grey.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, (title, paths) in zip(axes[0], panels.items(), strict=True):
        if under is not None:
            axis.plot(*under.unbind(-1), color="0.8", linewidth=4)
        for path, nearest in zip(paths.unbind(1), torch.cdist(paths[-1], targets).argmin(1).tolist(), strict=True):
            axis.plot(*path.unbind(-1), color=f"C{nearest}", linewidth=0.8)
        axis.scatter(*paths[0].unbind(-1), s=5, color="0.3", zorder=2)
        axis.scatter(*targets.unbind(-1), marker="x", s=40, color="k", zorder=3)
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
    plt.close(figure)
    return figure


def clouds(rows: dict[str, dict[str, Tensor]], targets: Tensor, limit: float) -> Figure:
    """Clouds of points in the plane within ±limit, one row for each name: {name: {title: points [n, 2]}}.

    Targets [m, 2] are crosses.
    """
    columns = len(next(iter(rows.values())))
    size = (1.5 * columns + 0.4, 1.5 * len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, layout="constrained", squeeze=False)
    for line, (name, panels) in zip(axes, rows.items(), strict=True):
        for axis, (title, points) in zip(line, panels.items(), strict=True):
            axis.scatter(*points.unbind(-1), s=1, color="C0", linewidths=0)
            axis.scatter(*targets.unbind(-1), marker="x", s=20, color="k", zorder=2)
            axis.set(aspect="equal", xticks=[], yticks=[], xlim=(-limit, limit), ylim=(-limit, limit))
            axis.set_title(title if line[0] is axes[0, 0] else "", fontsize=9)
        line[0].set_ylabel(name, fontsize=9)
    plt.close(figure)
    return figure


def curves(
    x: Tensor,
    panels: dict[str, dict[str, Tensor]],
    x_label: str,
    log: str = "",
    y_label: str = "",
    share_y: bool = False,
) -> Figure:
    """Panels of lines over the same x [n]: {title: {name: y [n]}}; axes named in `log` ("x", "y") are logarithmic.

    A line keeps its colour in every panel; one whose name starts with "floor" is dashed and black. The legend stands
    beside the panels, where it covers no line. With `share_y` all panels have one scale.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines if not name.startswith("floor")))
    size = (3.6 * len(panels) + 1.4, 2.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False, sharey=share_y)
    entries = {}
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, y in lines.items():
            style = (
                {"color": "k", "linestyle": "--"} if name.startswith("floor") else {"color": f"C{names.index(name)}"}
            )
            (entries[name],) = axis.plot(x, y, label=name, **style)
        axis.set(title=title, xlabel=x_label, **{f"{axis_name}scale": "log" for axis_name in log})
        if "x" in log and len(x) <= FEW:
            axis.set_xticks(x.tolist(), [f"{value:g}" for value in x.tolist()])
            axis.xaxis.minorticks_off()
        if "y" in log:
            _plain_ticks(axis)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(y_label)
    if len(entries) > 1 or next(iter(entries), "").startswith("floor"):
        figure.legend(entries.values(), entries, loc="outside right upper", frameon=False, fontsize=8)
    plt.close(figure)
    return figure


def dots(
    panels: dict[str, dict[str, dict[str, Sequence[float]]]], x_label: str, y_label: str, log: bool = False
) -> Figure:
    """Every run's measure as a dot, and lines through the means: {title: {name: {x: values of the runs}}}.

    All panels share both axes; x are names, evenly spaced. `log` makes y logarithmic.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.55 * len(panels) + 0.6, 2.7), layout="constrained", sharey=True, squeeze=False
    )
    for axis, (title, groups) in zip(axes[0], panels.items(), strict=True):
        for index, (name, points) in enumerate(groups.items()):
            shift, style = 0.08 * (index - (len(groups) - 1) / 2), {"color": f"C{index}", "marker": "os^D"[index % 4]}
            axis.plot([np.mean(values) for values in points.values()], color=f"C{index}", label=name, linewidth=1)
            for place, values in enumerate(points.values()):
                axis.scatter([place + shift] * len(values), values, s=12, alpha=0.6, linewidths=0, **style)
        axis.set_xticks(range(len(points)), list(points))
        axis.set_title(title, fontsize=9)
        axis.set(yscale="log" if log else "linear", xlim=(-0.4, len(points) - 0.6))
        axis.spines[["top", "right"]].set_visible(False)
    if log:
        _plain_ticks(axes[0, 0])  # shared by all panels
    axes[0, 0].set_ylabel(y_label)
    axes[0, -1].legend(fontsize=8, frameon=False)
    figure.supxlabel(x_label, fontsize=10)
    plt.close(figure)
    return figure


def _plain_ticks(axis: Axes) -> None:
    """Ticks of a short logarithmic y axis as 0.2, 0.5, 1 in place of powers of ten with factors."""
    low, high = axis.get_ylim()
    if high / low < 1000:
        steps = (1, 2, 3, 4, 6, 8) if high / low < 10 else (1, 2, 5)
        axis.yaxis.set_major_locator(LogLocator(subs=steps))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())


def maps(
    values: Sequence[Tensor],
    columns: int,
    titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    marks: Sequence[tuple[int, int]] = (),
    under: Tensor | None = None,
    side: float = 1.1,
) -> Figure:
    """Tables of numbers [h, w], one panel each, on a common colour scale; a red square marks a cell (row, column).

    With an image `under` [C, S, S] in [−1, 1], each number tints its part of the image: 0 is clear.
    """
    rows = -(-len(values) // columns)
    size = (columns * side + 1.1, rows * side + 0.3 * (rows if len(titles) > columns else 1))
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    low, high = (0.0 if under is not None else min(float(v.min()) for v in values)), max(float(v.max()) for v in values)
    clear = LinearSegmentedColormap.from_list("clear", [(1, 0.45, 0, 0), (1, 0.45, 0, 0.9)])
    for index, axis in enumerate(axes.flat):
        axis.axis("on" if index < len(values) else "off")
        axis.set(xticks=[], yticks=[])
    for index, (axis, table) in enumerate(zip(axes.flat, values, strict=False)):
        height, width = table.shape
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        if under is not None:
            pixels = _few_levels(under).permute(1, 2, 0).squeeze(-1).numpy() / 255 * 0.6 + 0.2  # tints show on any grey
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
        drawn = axis.imshow(
            table.cpu().numpy(), vmin=low, vmax=high, extent=extent, cmap="viridis" if under is None else clear
        )
        if index < len(marks):
            row, column = marks[index]
            axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.5))
        if index < len(titles):
            axis.set_title(titles[index], fontsize=9)
        if index % columns == 0 and index // columns < len(row_titles):
            axis.set_ylabel(row_titles[index // columns], fontsize=9)
    figure.colorbar(drawn, ax=axes, shrink=min(1, 2 / rows), pad=0.02).ax.tick_params(labelsize=8)
    plt.close(figure)
    return figure


def arrows(panels: dict[str, Tensor], places: Tensor, targets: Tensor) -> Figure:
    """Velocities at the same points `places` [n, 2] of the plane, one panel each [n, 2]; targets [m, 2] are crosses.

    Arrow lengths are comparable only within a panel, where a typical arrow spans the gap between two grid points.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(2.2 * len(panels), 2.4), layout="constrained", squeeze=False)
    gap = 2 * float(places.abs().max()) / max(1, len(places) ** 0.5 - 1)
    for axis, (title, v) in zip(axes[0], panels.items(), strict=True):
        longest = float(v.norm(dim=1).quantile(0.8)) or 1.0
        shown = gap / longest * v
        axis.quiver(*places.T, *shown.T, color="0.45", angles="xy", scale_units="xy", scale=1, width=0.006)
        axis.scatter(*targets.T, marker="x", s=60, color="C3", linewidths=2, zorder=2)
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
    plt.close(figure)
    return figure


def balls(panels: dict[str, tuple[Tensor, Tensor, Tensor]], limit: float) -> Figure:
    """Balls and points in the plane, within ±limit: points inside a ball are blue, the others red.

    Panels: title → centres [m, 2] and radii [m] of the balls, points [n, 2].
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.4), layout="constrained", squeeze=False)
    for axis, (title, (centres, radii, points)) in zip(axes[0], panels.items(), strict=True):
        for centre, radius in zip(centres.tolist(), radii.tolist(), strict=True):
            axis.add_patch(plt.Circle(centre, radius, color="0.5", alpha=0.15, linewidth=0))
        axis.scatter(*centres.T, s=8, color="0.4")
        inside = ((points[:, None] - centres).norm(dim=-1) <= radii).any(1)  # [n]
        axis.scatter(*points[inside].T, s=14, color="C0", zorder=2)
        axis.scatter(*points[~inside].T, s=22, color="C3", marker="x", zorder=2)
        axis.set(title=title, aspect="equal", xticks=[], yticks=[], xlim=(-limit, limit), ylim=(-limit, limit))
    plt.close(figure)
    return figure


def through_samples(
    x: Tensor, panels: dict[str, Tensor], places: Tensor, samples: Tensor, share_y: bool = False
) -> Figure:
    """A curve over x [n] per panel, one below the other: {title: y [n]}. Dots are `samples` [m] at x = `places` [m].

    With `share_y` all panels have one scale.
    """
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(5.4, 0.92 * len(panels) + 0.3),
        sharex=True,
        sharey=share_y,
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, y) in zip(axes[:, 0], panels.items(), strict=True):
        axis.plot(x, y, linewidth=1)
        axis.plot(places, samples, "k.", markersize=4)
        axis.set_title(title, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    plt.close(figure)
    return figure
