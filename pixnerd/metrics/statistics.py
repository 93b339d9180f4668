"""From features to numbers: Fréchet and kernel distance, Inception Score, precision and recall, as the papers use them.

The definitions are those of the ADM suite (Dhariwal & Nichol 2105.05233, appendix, and its released evaluator): every
definition agrees, though not every last bit. Dimension letters: N images, F features.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..distributed import World
from ..errors import InputError

NEIGHBOURS = 3
CHUNK = 5000  # images of one Inception Score; the score is the mean over chunks
BLOCK = 10_000  # rows and columns of a distance matrix computed at a time


class Moments:
    """The mean and covariance of features added batch by batch, as sums in float64; memory does not depend on N.

    Args:
        features: F.
        device: where the sums are.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.products = torch.zeros(features, features, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Add a batch [B, F]."""
        batch = features.double().to(self.sum.device)
        self.count += len(batch)
        self.sum += batch.sum(0)
        self.products += batch.T @ batch

    def share(self, world: World) -> None:
        """Combine the sums of all processes; every process has to call it, once."""
        self.count = int(world.sum(torch.tensor(self.count)))
        self.sum, self.products = world.sum(self.sum), world.sum(self.products)

    @property
    def mean(self) -> Tensor:
        """[F], float64."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """[F, F], float64, divided by N − 1 as numpy.cov does. Raises InputError for fewer than two images."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images; there are {self.count}")
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½) of two Gaussians (Heusel et al. 1706.08500).

    The square root's trace is the sum of the square roots of the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½, which are
    real and, up to rounding, not negative. Means [F], covariances [F, F], computed in float64.
    """
    mean_1, covariance_1, mean_2, covariance_2 = (x.double() for x in (mean_1, covariance_1, mean_2, covariance_2))
    values, vectors = torch.linalg.eigh(covariance_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * trace
    return float(distance.clamp(min=0))


class Spread(NamedTuple):
    """A mean over parts of the images, and the standard deviation between the parts."""

    mean: float
    deviation: float


def kernel_distance(first: Tensor, second: Tensor, subsets: int = 100, subset_size: int = 1000) -> Spread:
    """KID: the unbiased squared MMD of the kernel (x·y / F + 1)³, the mean over random subsets (Bińkowski 1801.01401).

    Its expectation does not depend on the number of images, and it may be negative. Subsets are drawn at random as in
    torch-fidelity (seed 2020); of a set with fewer than `subset_size` images, all are taken each time, and as many
    of the other one.

    Args:
        first: features [N, F].
        second: features [N', F].

    Raises:
        InputError: a set has fewer than 2 images.
    """
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise InputError(
            f"a kernel distance needs 2 images or more on each side; there are {len(first)}, {len(second)}"
        )
    draw = np.random.RandomState(2020)  # torch-fidelity's generator
    distances = []
    for _ in range(subsets):
        x, y = (
            features[torch.from_numpy(draw.choice(len(features), size, replace=False))].double()
            for features in (first, second)
        )
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        distances.append(float(within - 2 * xy.mean()))
    return Spread(float(np.mean(distances)), float(np.std(distances)))


def inception_score(logits: Tensor) -> Spread:
    """exp(mean KL(p(y|x) ‖ p(y))), the mean over sequential chunks of 5,000 images (Salimans et al. 1606.03498).

    A chunk's p(y) is the mean over its own images, so a file sorted by class would score low: the images are permuted
    first, always in the same way.

    Args:
        logits: [N, classes], from Inception without the bias of its last layer.
    """
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    scores = []
    for chunk in logits[order].split(CHUNK):
        log_p = chunk.double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(len(chunk))  # log p(y)
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


def squared_distances(rows: Tensor, columns: Tensor, half: bool) -> Tensor:
    """|r|² − 2·r·c + |c|², clamped at 0, [rows, columns]; in float16 if `half` and all of them are finite there."""
    if half:
        rows_16, columns_16 = rows.half(), columns.half()
        if rows.device.type == "cpu":  # slow in float16; a GPU also sums the products in float32
            products = (rows_16.float() @ columns_16.float().T).half()
        else:
            products = rows_16 @ columns_16.T
        distances = rows_16.square().sum(1)[:, None] - 2 * products + columns_16.square().sum(1)
        if distances.isfinite().all():
            return distances.clamp(min=0).float()
    norms = rows.square().sum(1)[:, None], columns.square().sum(1)
    return (norms[0] - 2 * rows @ columns.T + norms[1]).clamp(min=0)


def neighbour_distance(features: Tensor, half: bool) -> Tensor:
    """The squared distance from each point to its third nearest neighbour, [N]."""
    found = []
    for rows in features.split(BLOCK):
        nearest = torch.empty(len(rows), 0, dtype=features.dtype, device=features.device)
        for columns in features.split(BLOCK):
            nearest = torch.cat((nearest, squared_distances(rows, columns, half).to(features.dtype)), 1)
            nearest = nearest.topk(min(NEIGHBOURS + 1, nearest.shape[1]), largest=False).values  # each finds itself too
        found.append(nearest[:, -1])
    return torch.cat(found)


def covered(points: Tensor, centres: Tensor, half: bool) -> float:
    """The share of points inside at least one ball around a centre that reaches to its third nearest neighbour."""
    radii, inside = neighbour_distance(centres, half).split(BLOCK), []
    for rows in points.split(BLOCK):
        within = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, reach in zip(centres.split(BLOCK), radii, strict=True):
            within |= (squared_distances(rows, columns, half) <= reach).any(1)
        inside.append(within)
    return float(torch.cat(inside).double().mean())


class PrecisionRecall(NamedTuple):
    precision: float  # share of samples that look like real images, 0 … 1
    recall: float  # share of real images that the samples cover, 0 … 1


def precision_recall(real: Tensor, sampled: Tensor, half: bool = True) -> PrecisionRecall:
    """How many samples lie among the real images, and the other way round (Kynkäänniemi et al. 1904.06991), k = 3.

    Args:
        real: features [N, F]; ADM takes 10,000.
        sampled: features [N', F]; ADM takes 50,000.
        half: distances in float16 unless one of a block of 10,000 × 10,000 is too large for it, as in ADM's suite.

    Raises:
        InputError: one side has three images or fewer.
    """
    if min(len(real), len(sampled)) <= NEIGHBOURS:
        raise InputError(
            f"precision and recall need at least {NEIGHBOURS + 1} images on each side; "
            f"there are {len(real)} real and {len(sampled)} sampled"
        )
    return PrecisionRecall(covered(sampled, real, half), covered(real, sampled, half))


def retrieval_ranks(sampled: Tensor, true: Tensor) -> Tensor:
    """For each sample, how many true images are nearer to it than its own: 0 is a perfect match, chance is N/2.

    Args:
        sampled: features [N, F] of samples from N captions.
        true: features [N, F] of the images that have these captions. Near means a small angle.

    Returns: [N] in 0 … N − 1.
    """
    if sampled.shape != true.shape:
        raise InputError(
            f"features of shapes {tuple(sampled.shape)} and {tuple(true.shape)} differ: they need the same captions"
        )
    similarity = F.normalize(sampled, dim=1) @ F.normalize(true, dim=1).T  # [N, N]
    return (similarity > similarity.diagonal()[:, None]).sum(1)


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `count` of `total` were seen (Wilson's), in 0 … 1.

    Unlike share ± 2 standard errors it stays within 0 … 1 and has a width where all or none were seen.

    Raises:
        InputError: total is below 1, or count is not in 0 … total.
    """
    if total < 1 or not 0 <= count <= total:
        raise InputError(f"{count} of {total} is no share; the total has to be at least 1 and the count in 0 … total")
    z, share = 1.959964, count / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
