"""What the processes of test_reading.py do: python -m tests.metrics.reading_worker FOLDER WORKERS

They measure a reference of 37 images whose every reading is noted in FOLDER/reads, and write its moments.
"""

import sys
from pathlib import Path

import torch

from pixnerd import data
from pixnerd.distributed import join, leave
from pixnerd.metrics.features import reference_features

COUNT = 37


class Noted(data.ImageDataset):
    """Random images; whoever reads one says so in a file."""

    def __init__(self, folder: Path):
        super().__init__(8, 3, [0] * COUNT, ["all"])
        self.folder = folder

    def pixels(self, index: int) -> torch.Tensor:
        with (self.folder / "reads").open("a") as file:
            file.write(f"{index}\n")
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator)


def pooled(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pool": images[:, :, :2, :2].flatten(1).float()}


if __name__ == "__main__":
    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    data.open_data_set = lambda name, image_size: Noted(folder)
    found = reference_features(pooled, "own", "synthetic", 8, 4, join(torch.device("cpu")), workers=workers)
    if join(torch.device("cpu")).leads:
        mean, covariance = found.gaussians["pool"]
        torch.save({"mean": mean, "covariance": covariance, "rows": found.rows["pool"]}, folder / "found.pt")
    leave()
