"""How cost grows with image size, patch, width and batch: the same network at several values of one of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import cost, flow
from ..errors import InputError
from ..model import PixNerd
from ..model_config import FieldKernel, ModelConfig, Recompute
from .clock import exponent, median_and_quartiles, take_turns
from .counts import Roofs, count_operators
from .presets import BenchConfig

AXES = ("image_size", "patch_size", "width", "batch_size")


class Point(NamedTuple):
    """A network and a batch."""

    model: ModelConfig
    batch_size: int


def points(config: BenchConfig) -> dict[str, dict[int, Point]]:
    """Axis → its values → network and batch; axes with fewer than two possible values are left out."""
    found: dict[str, dict[int, Point]] = {axis: {} for axis in AXES}
    base = dataclasses.asdict(config.model) | {"batch_size": config.batch_size}
    for axis in AXES:
        for factor in config.factors:
            value = base[axis] * factor
            if value != int(value) or value < 1:
                continue
            try:
                batch_size = int(value) if axis == "batch_size" else config.batch_size
                changed = {} if axis == "batch_size" else {axis: int(value)}
                found[axis][int(value)] = Point(dataclasses.replace(config.model, **changed), batch_size)
            except InputError:  # such as a patch that does not divide the image
                continue
    return {axis: values for axis, values in found.items() if len(values) > 1}


def gradient_action(
    point: Point, num_classes: int, device: torch.device, precision: str, recompute: Recompute, kernel: FieldKernel
) -> Callable[[], None]:
    """Forward and backward pass of a package's network on random images."""
    model = PixNerd(point.model, num_classes, recompute, kernel).to(device).train()
    shape = point.batch_size, point.model.channels, point.model.image_size, point.model.image_size
    image, noise = torch.randn(2, *shape, device=device)
    t, labels = torch.rand(point.batch_size, device=device), torch.zeros(point.batch_size, dtype=torch.long).to(device)

    def action() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = flow.loss(model, image, labels, noise, t).mean
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    return action


def fitting_action(point: Point, *settings: Any) -> Callable[[], None] | None:
    """`gradient_action`, or None if the device does not have the memory for it."""
    try:
        action = gradient_action(point, *settings)
        action()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return action


def measure_scaling(config: BenchConfig, num_classes: int, device: torch.device, roofs: Roofs) -> dict[str, Any]:
    """For each axis: value → seconds, FLOPs, bytes and saved activations of a gradient, and the fitted exponents.

    A value that does not fit the device's memory is left out, and an axis of which fewer than two are left.
    """
    precision, recompute, kernel, found = config.precisions[0], config.recompute[0], config.kernels[0], {}
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    for axis, values in points(config).items():
        actions = {
            value: action
            for value, point in values.items()
            if (action := fitting_action(point, num_classes, device, precision, recompute, kernel))
        }
        if len(actions) < 2:
            continue
        readings = take_turns(actions, max(3, config.rounds // 3))
        rows = []
        for value, action in actions.items():
            point, counts = values[value], count_operators(action, roofs)
            with torch.device("meta"):
                model = PixNerd(point.model, num_classes, recompute, kernel)
            kept = point.batch_size * cost.saved_activation_bytes(model, point.model.image_size, recompute, dtype)
            seconds = median_and_quartiles([reading.wall for reading in readings[value]])
            processor = median_and_quartiles([reading.processor for reading in readings[value]])
            row = {"value": value, "seconds": seconds.median, "processor_seconds": processor.median}
            rows.append(row | {"flops": counts.flops, "bytes": counts.bytes, "saved_bytes": kept})
        sizes = [row["value"] for row in rows]
        costs = ("seconds", "processor_seconds", "flops", "bytes", "saved_bytes")
        found[axis] = {"rows": rows, "exponents": {of: exponent(sizes, [row[of] for row in rows]) for of in costs}}
    return found
