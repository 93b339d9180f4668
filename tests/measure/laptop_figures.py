"""Neural field against linear head on a laptop, over seeds: python -m tests.measure.laptop_figures DATA RUN …

Reads what `pixnerd evaluate RUN --draw N` wrote to the runs' metrics.json and prints, by head and guidance, the mean
and the standard deviation over the runs. The last line is the baseline: as many real images of DATA, left out of the
reference, against the rest of them.
"""

import statistics
import sys
from collections import defaultdict

import torch

from pixnerd import data
from pixnerd.distributed import World
from pixnerd.frozen.efficientnet import EfficientNet
from pixnerd.metrics.features import collect, compare
from pixnerd.runs import Run

NAMES = ("KID-EffLite0", "FD-EffLite0", "precision", "recall")
SIZE, BATCH = 32, 64


def row(title: str, found: list[dict[str, float]]) -> str:
    cells = []
    for name in NAMES:
        values = [scores[name] * (1000 if name.startswith("KID") else 1) for scores in found]
        deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3g}{deviation}")
    return f"| {title} | {len(found)} | " + " | ".join(cells) + " |"


def real_against_real(name: str, count: int) -> dict[str, float]:
    dataset, alone = data.load(name, SIZE), World(0, 1, torch.device("cpu"))
    network = EfficientNet(device=alone.device)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    count = min(count, len(dataset) // 2)

    def features(indices: list[int]):
        pieces = [(i, dataset.batch(indices[i : i + BATCH])[0]) for i in range(0, len(indices), BATCH)]
        return collect(network.pooled, ((i, x.expand(-1, 3, -1, -1)) for i, x in pieces), len(indices), alone)

    return compare(features(order[count:]), features(order[:count]), network.measure)


def main(name: str, folders: list[str]) -> None:
    found = defaultdict(list)
    for folder in folders:
        run = Run(folder)
        for entry in run.metrics()["evaluations"]:
            settings = entry["settings"]
            if "sampling" not in settings:  # saved samples, with unknown settings
                continue
            key = (run.config().model.head, settings["sampling"]["guidance"], settings["images"])
            found[key].append(entry["scores"])
    print("| head | runs | 1000 · KID-EffLite0 | FD-EffLite0 | precision | recall |\n|---|---|---|---|---|---|")
    for (head, guidance, images), scores in sorted(found.items(), reverse=True):
        print(row(f"{head}, guidance {guidance:g}, {images:,} samples", scores))
    count = max(images for _, _, images in found)
    print(row("real against real", [real_against_real(name, count)]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
