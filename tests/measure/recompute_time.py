"""The time of a training step on 256-pixel images by recompute policy: python -m tests.measure.recompute_time

Forward and backward pass of L/16 and XL/16 in float32 on this machine's CPU, two images, policies interleaved in one
run, medians relative to `none`.
"""

import statistics
import time
from typing import get_args

import torch
from tqdm import tqdm

from pixnerd import SIZES, PixNerd, flow
from pixnerd.model import Recompute

ROUNDS = 5
BATCH = 2


def seconds(model: PixNerd) -> float:
    """The time of one forward and backward pass."""
    image, noise = torch.randn(2, BATCH, 3, 256, 256)
    labels, t = torch.randint(0, 1000, (BATCH,)), torch.rand(BATCH)
    begin = time.perf_counter()
    flow.loss(model, image, labels, noise, t).mean.backward()
    return time.perf_counter() - begin


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, median of {ROUNDS}")
    for size in ("L/16", "XL/16"):
        model = PixNerd(SIZES[size], 1000).train()
        times: dict[str, list[float]] = {policy: [] for policy in get_args(Recompute)}
        for turn in tqdm(range(ROUNDS + 1), desc=size):
            for policy, spent in times.items():
                model.recompute = policy
                took = seconds(model)
                if turn:  # the first round allocates
                    spent.append(took)
        medians = {policy: statistics.median(spent) for policy, spent in times.items()}
        print(size, {policy: round(median / medians["none"], 2) for policy, median in medians.items()})


if __name__ == "__main__":
    main()
