"""Memory of an evaluation by the number of images: `.venv/bin/python -m tests.measure.evaluation_memory [IMAGES]`.

Random images of 256 pixels stream through a network that costs nothing and has as many features as Inception;
everything else is the real code of `pixnerd evaluate --network inception`, so only the network's own memory is
missing. Prints the peak resident memory after every 10,000 images and after the scores.
"""

import resource
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pixnerd.distributed import World
from pixnerd.metrics.features import REFERENCES, collect, compare

BATCH = 64
EVERY = 10_000  # images


def peak() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"  # KiB on Linux


class Slices(nn.Module):
    """As many pixels of the images as Inception has features of each kind."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        values = images.flatten(1).float() / 255
        sizes = {"pool": 2048, "logits": 1008, "spatial": 2023}
        return {name: values[:, start : start + size] for start, (name, size) in enumerate(sizes.items())}


def batches(count: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    for start in range(0, count, BATCH):
        if start % EVERY < BATCH:
            print(f"{start:6} images: peak {peak()}", flush=True)
        size = min(BATCH, count - start)
        yield start, torch.randint(0, 256, (size, 3, 256, 256), dtype=torch.uint8, generator=random)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    alone = World(0, 1, torch.device("cpu"))
    real = collect(Slices(), batches(REFERENCES, 0), REFERENCES, alone, REFERENCES)
    sampled = collect(Slices(), batches(count, 1), count, alone)
    print(f"{count:6} images: peak {peak()}", flush=True)
    compare(real, sampled, "")
    print(f"with the scores: peak {peak()}")


if __name__ == "__main__":
    main()
