"""How good the image is that a network predicts on the way: from one path of 25 even Euler steps, by t.

python -m tests.measure.predicted_image RUN [IMAGES]

For a run whose network predicts the image. A sampler may stop at any t and take this image: its last step begins there.
"""

import sys

import torch

from pixnerd import data, frozen
from pixnerd.metrics.softened import sharpness, soften
from pixnerd.metrics.statistics import kernel_distance, precision_recall
from pixnerd.runs import Run

from .last_step import pooled, real_images, trajectories

STEPS = 25
STARTS = (0.4, 0.48, 0.56, 0.64, 0.72, 0.8, 0.88, 0.96)  # of the steps whose prediction is measured


def predictions(run: Run, count: int) -> dict[float, torch.Tensor]:
    """t → the images [count, C, H, W] predicted there."""
    found: dict[float, list[torch.Tensor]] = {start: [] for start in STARTS}
    for states in trajectories(run, count, "euler", STEPS):
        for state in states:
            start = round(state.t - 1 / STEPS, 6)
            if start in found:
                found[start].append(state.image)
    return {start: torch.cat(images) for start, images in found.items()}


def main(folder: str, count: int = 300) -> None:
    run, network = Run(folder), frozen.load("efficientnet")
    real = real_images(run)
    features, softened = pooled(network, real), pooled(network, soften(real))
    print(
        f"| t | 1000 · KID | softened | precision | recall | sharpness |  {count} samples of {folder}\n"
        + "|---" * 6
        + "|"
    )
    for start, images in predictions(run, count).items():
        pixels = data.to_uint8(images)
        found = pooled(network, pixels)
        near = precision_recall(features, found)
        kid = 1000 * kernel_distance(found, features).mean
        soft = 1000 * kernel_distance(pooled(network, soften(pixels)), softened).mean
        sharp = sharpness(pixels) / sharpness(real)
        figures = f"{kid:.1f} | {soft:.1f} | {near.precision:.2f} | {near.recall:.2f} | {sharp:.2f}"
        print(f"| {start} | {figures} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
