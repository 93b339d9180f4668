"""What clamping 1 − t leaves of the noise: samples of an image-predicting run with and without a clamp, by solver.

python -m tests.measure.last_step RUN [IMAGES]

The clamp, 0.05, is that of the training loss; `jump` takes the predicted image at the first step from t = 0.95 on.
"""

import dataclasses
import sys
from collections.abc import Iterator

import torch

from pixnerd import data, frozen, load, model, sampling
from pixnerd.conditions import model_conditions
from pixnerd.frozen.network import FrozenNetwork
from pixnerd.metrics.statistics import kernel_distance, precision_recall
from pixnerd.runs import Run

SIZE, BATCH = 32, 64
SETTINGS = [("euler", 25), ("euler", 100), ("heun", 25), ("adams2", 25), ("sde", 100)]
JUMP = 0.95


def pooled(network: FrozenNetwork, images: torch.Tensor) -> torch.Tensor:
    """[N, F] of uint8 images [N, 1 or 3, H, W]."""
    return torch.cat([network.pooled(part.expand(-1, 3, -1, -1))["pool"] for part in images.split(BATCH)])


def real_images(run: Run) -> torch.Tensor:
    """uint8 [≤ 2000, C, H, W], at random from what a run was trained on."""
    dataset = data.load(run.config().data, SIZE)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1))[:2000].tolist()
    return dataset.batch(order)[0]


def trajectories(run: Run, count: int, solver: str, steps: int) -> Iterator[Iterator[sampling.State]]:
    """Batch by batch, the states of `count` images in even steps: subjects in turn, always from the same noise."""
    config, network = run.config(), load(run.folder)
    told = model_conditions(network, config, torch.device("cpu"))
    subjects = told.subjects(config.data, SIZE)
    chosen = torch.randperm(len(subjects), generator=torch.Generator().manual_seed(0)).repeat(count)[:count]
    settings = dataclasses.replace(config.sampling, solver=solver, steps=steps, shift=1.0)
    for batch in torch.arange(count).split(BATCH):
        condition = told.encode([subjects[index] for index in chosen[batch].tolist()])
        yield sampling.trajectory(network, condition, settings, unconditional=told.nothing, indices=batch.tolist())


def samples(run: Run, count: int, solver: str, steps: int, way: str) -> torch.Tensor:
    """[count, C, H, W], where a trajectory ends by this way."""
    model.MIN_REMAINING_TIME = 0.05 if way == "clamp" else 1e-4
    found = []
    for states in trajectories(run, count, solver, steps):
        last = JUMP + 1 / steps if way == "jump" else 1  # where the first step from JUMP on, or the last one, ends
        state = next(state for state in states if state.t > last - 1e-9)
        found.append(state.image if way == "jump" else state.x)
    return torch.cat(found)


def main(folder: str, count: int = 500) -> None:
    run, network = Run(folder), frozen.load("efficientnet")
    real = pooled(network, real_images(run))
    print(
        f"| solver, steps | way | 1000 · KID | precision | recall |  {count} samples of {folder}\n|---|---|---|---|---|"
    )
    for solver, steps in SETTINGS:
        for way in ("clamp", "exact", "jump"):
            features = pooled(network, data.to_uint8(samples(run, count, solver, steps, way)))
            near = precision_recall(real, features)
            kid = 1000 * kernel_distance(features, real).mean
            print(f"| {solver}, {steps} | {way} | {kid:.0f} | {near.precision:.2f} | {near.recall:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
