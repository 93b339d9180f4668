"""How well can a linear head do at best, if a patch's noisy numbers have to pass through D numbers of its token?

    .venv/bin/python -m tests.measure.linear_bound [DATA [WIDTH]]        (emoji 128)

For each patch size of the study "noise" (4 × 4 patches of images of 16, 32 and 64 pixels) and each tenth of t, three
mean squared errors of the velocity x − ε:

- v: the best linear estimate of v from a patch's x_t through D numbers (reduced-rank regression);
- x: the best linear estimate of x through D numbers, and the noise from what remains of x_t at each pixel; the scalar
  skip can do the same;
- all: the best linear estimate without that limit.

Patches are taken for Gaussian, with the covariance of the data's; neighbouring patches, which attention reads too, are
ignored, and a network is not linear: these are no bounds for a trained model, but they show what a limit of D numbers
costs.
"""

import sys

import torch
from torch import Tensor

from pixnerd import data
from pixnerd.studies.measures import LAST

TIMES = [LAST * (tenth + 0.5) / 10 for tenth in range(10)]


def variances(name: str, size: int, patch: int) -> Tensor:
    """The variances of a data set's patches along their principal directions, largest first, [C·P·P] in float64."""
    dataset = data.load(name, size)
    images = data.to_float(dataset.batch(range(len(dataset)))[0])
    patches = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, C, rows, columns, P, P]
    rows = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1).double()
    return torch.linalg.eigvalsh(rows.T.cov()).flip(0).clamp(min=0)


def through(explained: Tensor, total: Tensor, numbers: int) -> float:
    """The mean error left when only the `numbers` directions that explain most of a total variance are kept."""
    kept = explained.sort(descending=True).values[:numbers]
    return float((total.sum() - kept.sum()) / len(total))


def errors(spectrum: Tensor, t: float, numbers: int) -> tuple[float, float, float]:
    """The errors "v", "x" and "all" at time t, for independent Gaussian numbers with these variances."""
    of_x_t = t**2 * spectrum + (1 - t) ** 2
    of_v, of_x = (t * spectrum - (1 - t)) ** 2 / of_x_t, (t * spectrum) ** 2 / of_x_t  # explained, if all may pass
    image = through(of_x, spectrum, numbers) / (1 - t) ** 2
    return through(of_v, spectrum + 1, numbers), image, through(of_v, spectrum + 1, len(spectrum))


def main(name: str = "emoji", width: str = "128") -> None:
    for size, patch in ((16, 4), (32, 8), (64, 16)):
        spectrum = variances(name, size, patch)
        print(f"{name} at {size} pixels, {len(spectrum)} numbers of a patch through {width} of its token")
        rows = zip(*(errors(spectrum, t, int(width)) for t in TIMES), strict=True)
        for called, row in zip(("v", "x", "all"), rows, strict=True):
            print(f"  {called:4} mean {sum(row) / 10:.3f}   by t " + " ".join(f"{value:.2f}" for value in row))


if __name__ == "__main__":
    main(*sys.argv[1:])
