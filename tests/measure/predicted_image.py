"""How good the image is that a network predicts on the way: from one path of 25 even Euler steps, by t.

python -m tests.measure.predicted_image RUN [IMAGES]

For a run whose network predicts the image. A sampler may stop at any t and take this image: its last step begins there.
"""

import dataclasses
import sys

import torch

from pixnerd import data, frozen, load, sampling
from pixnerd.conditions import model_conditions
from pixnerd.metrics.softened import sharpness, soften
from pixnerd.metrics.statistics import kernel_distance, precision_recall
from pixnerd.runs import Run

from .last_step import BATCH, SIZE, pooled

STARTS = (0.4, 0.48, 0.56, 0.64, 0.72, 0.8, 0.88, 0.96)  # of the steps whose prediction is measured


def predictions(run: Run, count: int) -> dict[float, torch.Tensor]:
    """t → the images [count, C, H, W] predicted there, the subjects in random order."""
    config, network = run.config(), load(run.folder)
    told = model_conditions(network, config, torch.device("cpu"))
    subjects = told.subjects(config.data, SIZE)
    chosen = torch.randperm(len(subjects), generator=torch.Generator().manual_seed(0)).repeat(count)[:count]
    settings = dataclasses.replace(config.sampling, solver="euler", steps=25, shift=1.0)
    found: dict[float, list[torch.Tensor]] = {start: [] for start in STARTS}
    for batch in torch.arange(count).split(BATCH):
        condition = told.encode([subjects[index] for index in chosen[batch].tolist()])
        path = sampling.trajectory(network, condition, settings, unconditional=told.nothing, indices=batch.tolist())
        for state in path:
            start = round(state.t - 1 / settings.steps, 6)
            if start in found:
                found[start].append(state.image)
    return {start: torch.cat(images) for start, images in found.items()}


def main(folder: str, count: int = 300) -> None:
    run, network = Run(folder), frozen.load("efficientnet")
    dataset = data.load(run.config().data, SIZE)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1))[:2000].tolist()
    real = dataset.batch(order)[0]
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
