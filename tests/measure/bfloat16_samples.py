"""What bfloat16 costs samples, and what a last layer in float32 saves of it.

    python -m tests.measure.bfloat16_samples RUN [IMAGES]

Samples of a run of digits, always from the same noise, with its guidance: in float32; under bfloat16 autocast, as on a
GPU; and so with the last layer in bfloat16 as well. Compared with 2,000 real ones in EfficientNet-Lite0 features.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn

from pixnerd import data, frozen, load, sampling
from pixnerd.layers import OutputLinear
from pixnerd.metrics.statistics import kernel_distance, precision_recall
from pixnerd.runs import Run

from .last_step import pooled

SETTINGS = [("euler", 25), ("euler", 100), ("heun", 25), ("adams2", 16), ("adams2", 25)]
PRECISIONS = {"float32": (False, True), "bfloat16": (True, True), "bfloat16 to the end": (True, False)}


def main() -> None:
    run, count = Run(Path(sys.argv[1])), int(sys.argv[2]) if len(sys.argv) > 2 else 300
    config, network, efficientnet = run.config(), load(run.folder), frozen.load("efficientnet")
    digits = data.load("digits", config.model.image_size)
    reference = pooled(efficientnet, digits.batch([i % 10 * 500 + i // 10 for i in range(2000)])[0]).double()
    float32_output = OutputLinear.forward
    print("| solver, steps | precision | 1000 · KID | precision | recall |\n|---|---|---|---|---|", flush=True)
    for solver, steps in SETTINGS:
        options = dataclasses.replace(config.sampling, solver=solver, steps=steps, shift=1.0)
        for name, (autocast, output) in PRECISIONS.items():
            OutputLinear.forward = float32_output if output else nn.Linear.forward
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                images = torch.cat(list(sampling.sample_batches(network, torch.arange(count) % 10, options, seed=0)))
            found = pooled(efficientnet, data.to_uint8(images.float())).double()
            kid = 1000 * kernel_distance(reference, found).mean
            precision, recall = precision_recall(reference, found, half=False)
            print(f"| {solver}, {steps} | {name} | {kid:.1f} | {precision:.2f} | {recall:.2f} |", flush=True)


if __name__ == "__main__":
    main()
