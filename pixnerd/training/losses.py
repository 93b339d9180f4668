"""The losses beyond the velocity's mean squared error, and the list of those that a configuration asks for.

Errors weighted by frequency (DeCo, arXiv 2511.19365), distances in a network's features (PixelGen, arXiv 2602.02493),
and the alignment of a block's tokens with a teacher's (REPA, arXiv 2410.06940). A term consists of a function or class
here, a line in `loss_terms`, and its fields in TrainConfig.

Dimension letters: B images, C channels, H × W pixels, N tokens (rows × columns, row-major), D width, F features of a
token or of a position. t = 0 is noise and t = 1 is data.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .. import flow, frozen
from ..config import JPEG_BLOCK, TrainConfig
from ..data import ImageDataset
from ..distributed import World, replicate, shard
from ..errors import InputError
from ..flow import FlowLoss
from ..frozen.network import FrozenNetwork
from ..layers import at_least_float32
from ..model import PatchDenoiser
from ..randomness import Purpose, derived_seed
from .batches import Batch

GATE = 0.3  # t from which the perceptual loss counts


# --- what a configuration asks for -----------------------------------------------------------------------------------


class Networks(NamedTuple):
    """A run's network in its two roles."""

    trained: nn.Module  # as the forward pass calls it: wrapped in DDP where processes replicate it
    bare: PatchDenoiser  # the same without its wrapper


class Objective(Protocol):
    """What a training run minimises; further terms may be added to it."""

    kept: nn.Module | None = None
    """what it has to remember from step to step, kept in checkpoints; None: nothing"""

    def __call__(self, networks: Networks, part: Batch, tap: int | None) -> FlowLoss:
        """The loss of a part of a step. `tap`: a block whose tokens are returned as well, see flow.loss."""

    asked: Sequence[PatchDenoiser] = ()
    """other networks that it evaluates, such as a teacher"""

    def measure_data(self, dataset: ImageDataset) -> None:
        """Before the first step of a run: find out what it has to know of the data, each process from its share."""

    def updated(self) -> None:
        """The weights were updated with the gradient of the last loss."""


class VelocityLoss(Objective):
    """Flow matching, see flow.loss: what every run minimises that distils nothing."""

    def __init__(self, config: TrainConfig):
        self.base_resolution, self.measure = base_resolution(config), velocity_measure(config)

    def __call__(self, networks: Networks, part: Batch, tap: int | None) -> FlowLoss:
        return flow.loss(
            networks.trained,
            part.image,
            part.condition,
            part.noise,
            part.t,
            self.base_resolution,
            self.measure,
            tap,
        )


def base_resolution(config: TrainConfig) -> tuple[int, int] | None:
    """The (h, w) that the transformer sees where the fields decode other sizes; None: the images' own."""
    return (config.model.image_size,) * 2 if config.decode_sizes else None


class LossTerm(NamedTuple):
    """A loss that is added to the velocity loss and logged under its name."""

    name: str
    weight: float
    value: Callable[[FlowLoss, Batch], Tensor]  # → 0-dim
    tap: int | None = None  # the block whose tokens it uses, counted from 1; one term of a run may have a tap
    trained: nn.Module | None = None  # a network that is trained with the model; one term of a run may have one
    until: int | None = None  # the step after which it no longer counts

    def counts(self, step: int) -> bool:
        """Whether the term is still added after `step` steps."""
        return self.until is None or step < self.until


def velocity_measure(config: TrainConfig) -> Callable[[Tensor], Tensor]:
    """The function that measures velocity errors: [B, C, H, W] → [B]."""
    if config.frequency_quality is None:
        return flow.mean_square
    return functools.partial(frequency_weighted, quality=config.frequency_quality)


def loss_terms(config: TrainConfig, world: World) -> list[LossTerm]:
    """The terms added to the velocity loss. Raises InputError when a network that a term needs is missing."""
    terms = []
    if config.align:
        alignment = Alignment(config, world)
        terms.append(
            LossTerm(
                "alignment",
                config.align_weight,
                alignment,
                tap=config.aligned_block,
                trained=alignment.projector,
                until=config.align_until,
            )
        )
    if config.perceptual:
        with world.together():
            distance = perceptual_term(config, world.device)
        terms.append(LossTerm("perceptual", config.perceptual_weight, distance))
    return terms


def perceptual_term(config: TrainConfig, device: torch.device) -> Callable[[FlowLoss, Batch], Tensor]:
    """The function that gives a batch's mean perceptual loss. Raises InputError when its network is missing."""
    if config.perceptual != "efficientnet" and not Path(config.perceptual).is_file():
        raise InputError(
            f"perceptual is {config.perceptual!r}; it has to be efficientnet or a file that torch.export.save wrote"
        )
    distance = PerceptualLoss(frozen.load(config.perceptual, device))
    return lambda losses, batch: distance(losses.clean, batch.image, batch.t).mean()


# --- the velocity's error by frequency -------------------------------------------------------------------------------

# ITU-T T.81, tables K.1 and K.2: rows are vertical frequencies, columns horizontal ones
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # rows Y, Cb, Cr of R, G, B


def quantisation_tables(quality: int) -> Tensor:
    """The tables that libjpeg quantises with: [2, 8, 8], luminance then chrominance, integers 1 … 255 in float64.

    Raises:
        InputError: the quality is not an integer from 1 to 100.
    """
    if not isinstance(quality, int) or not 1 <= quality <= 100:
        raise InputError(f"JPEG quality is {quality}; it has to be a whole number from 1 to 100")
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = torch.tensor([LUMINANCE, CHROMINANCE])
    return ((base * percent + 50) // 100).clamp(1, 255).double()


def frequency_weights(quality: int) -> Tensor:
    """1 / table, scaled to a mean of 1 for each table: [2, 8, 8], luminance then chrominance, in float64.

    All are 1 at quality 100 and at quality 1, where both tables are flat.
    """
    inverse = 1 / quantisation_tables(quality)
    return inverse / inverse.mean(dim=(1, 2), keepdim=True)


def dct_matrix() -> Tensor:
    """The orthonormal DCT-II of 8 values as a matrix [8, 8] in float64: row k holds the cosine of frequency k."""
    k = torch.arange(JPEG_BLOCK, dtype=torch.float64)
    matrix = torch.cos(math.pi / JPEG_BLOCK * (k + 0.5) * k[:, None]) * math.sqrt(2 / JPEG_BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix


def colour_matrix() -> Tensor:
    """An orthonormal basis of colours, [3, 3] in float64: Y, then two directions that do not change Y.

    Gram–Schmidt on the rows of JPEG's YCbCr, Y first.
    """
    rows = []
    for row in torch.tensor(YCBCR, dtype=torch.float64):
        for earlier in rows:
            row = row - (row @ earlier) * earlier
        rows.append(row / row.norm())
    return torch.stack(rows)


@functools.lru_cache(maxsize=32)
def _constants(quality: int, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [C, 1, 1, 8, 8], DCT [8, 8] and colours [3, 3], cached so that they are copied to a GPU only once."""
    tables = [0, 1, 1] if channels == 3 else [0]
    with torch.inference_mode(False):  # they outlive the caller, who may be in inference mode
        weights = frequency_weights(quality)[tables][:, None, None]
        return tuple(constant.to(device, dtype) for constant in (weights, dct_matrix(), colour_matrix()))


def frequency_weighted(error: Tensor, quality: int) -> Tensor:
    """The mean squared error with a weight for each frequency of JPEG's 8 × 8 blocks: what JPEG keeps counts more.

    DeCo's frequency-aware loss (arXiv 2511.19365): the velocity error in YCbCr, the orthonormal DCT-II of each block,
    each coefficient squared and weighted by 1/q of JPEG's table (ITU-T T.81, Annex K) at that quality, with a mean
    weight of 1 per table. The luminance table is for Y and for single-channel images, the chrominance table for the
    other two channels. Unlike DeCo we make YCbCr's basis orthonormal (`colour_matrix`), so that with all weights 1, as
    at quality 100, the loss is exactly the mean squared error; plain YCbCr would scale it by 0.42 for white noise.

    Args:
        error: estimate − truth [B, C, H, W] with 1 or 3 channels (RGB), H and W multiples of 8.
        quality: 1 … 100 as in libjpeg. From 20 to 90 the weights hardly differ, since only their ratios matter; towards
            100 the tables round to 1, and towards 1 they saturate at 255, so both ends give the plain mean.

    Returns:
        [B], in float32 or better, also under autocast.

    Raises:
        InputError: wrong channels, sides or quality.
    """
    channels, height, width = error.shape[1:]
    if channels not in (1, 3):
        raise InputError(f"images have {channels} channels; the frequency-weighted loss takes 1 (grey) or 3 (RGB)")
    if height % JPEG_BLOCK or width % JPEG_BLOCK:
        raise InputError(
            f"image size {height}x{width} does not fit JPEG's blocks; both sides have to be multiples of 8"
        )
    with torch.autocast(error.device.type, enabled=False):
        error = at_least_float32(error)
        weights, dct, colours = _constants(quality, channels, error.dtype, error.device)
        if channels == 3:
            error = torch.einsum("kc,bchw->bkhw", colours, error)
        blocks = rearrange(error, "b c (y i) (x j) -> b c y x i j", i=JPEG_BLOCK, j=JPEG_BLOCK)
        return (weights * (dct @ blocks @ dct.T).square()).mean(dim=(1, 2, 3, 4, 5))


# --- distances in a network's features -------------------------------------------------------------------------------


class PerceptualLoss:
    """The distance between two images in the features of a frozen network, counted from t = 0.3 on.

    Each position's feature vector is scaled to unit length; the squared distance of two, 0 … 4, is averaged over
    positions, then over layers: LPIPS (Zhang et al. 1801.03924) without its learned weights. PixelGen (arXiv
    2602.02493) found that it helps pixel-space training, and that noisier times are better left out.

    Args:
        network: its `maps` are compared; it is set to evaluation mode and frozen.
    """

    def __init__(self, network: FrozenNetwork):
        self.network = network.eval().requires_grad_(False)

    def __call__(self, estimate: Tensor, image: Tensor, t: Tensor) -> Tensor:
        """The distance between x̂ and the clean image, for each image of a batch.

        Args:
            estimate: x̂ [B, C, H, W] around [−1, 1], 1 or 3 channels; the only input that receives gradients.
            image: the clean image [B, C, H, W].
            t: times [B] in [0, 1]. Images with t < 0.3 are computed too, which avoids a GPU synchronisation.

        Returns:
            [B], 0 where t < 0.3.

        Raises:
            InputError: the shapes differ, or the channels are neither 1 nor 3.
        """
        if estimate.shape != image.shape or image.shape[1] not in (1, 3):
            raise InputError(
                f"the perceptual loss was given images of shapes {tuple(estimate.shape)} and {tuple(image.shape)}; "
                "both need the same shape [B, 1 or 3, H, W]"
            )
        with torch.no_grad():
            wanted = self.network.maps(image.expand(-1, 3, -1, -1))
        layers = [
            (unit(ours) - unit(theirs)).square().sum(1).mean((1, 2))  # [B]
            for ours, theirs in zip(self.network.maps(estimate.expand(-1, 3, -1, -1)), wanted, strict=True)
        ]
        return torch.stack(layers).mean(0).where(t >= GATE, 0)


def unit(features: Tensor) -> Tensor:
    """Feature maps [B, F, h, w] with each position's vector scaled to length 1, in float32 or better."""
    return F.normalize(at_least_float32(features), dim=1)


# --- alignment of tokens with a teacher's ----------------------------------------------------------------------------


class Projector(nn.Sequential):
    """Tokens [B, N, D] → the teacher's feature space [B, N, F]: three linear layers, torch's initialisation."""

    def __init__(self, width: int, features: int):
        layers = nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, features)
        super().__init__(*layers)


class Alignment:
    """REPA's term: a block's tokens, passed through a trained projector, should resemble a teacher's features.

    PixNerd adds 0.5 times this loss, on the output of its 8th block (6th for text), with DINOv2-B as the teacher. The
    teacher sees the clean image, mirrored whenever the model's is.
    """

    def __init__(self, config: TrainConfig, world: World):
        with world.together():
            teacher = frozen.load(config.align, world.device)
            if not teacher.features:
                raise InputError(f"{teacher.name} gives no features of image patches, which REPA needs")
        self.grid = (config.model.image_size // config.model.patch_size,) * 2
        self.tokens = teacher.tokens
        self.cache = CachedTokens(teacher.tokens) if config.cache_teacher else None
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(config.seed, Purpose.PROJECTOR_WEIGHTS))
            projector = Projector(config.model.width, teacher.features).to(world.device)
        if config.shard:
            shard(projector, world, config.computes_in_bfloat16(world.device.type))
        self.projector = replicate(projector, world)

    def __call__(self, losses: FlowLoss, batch: Batch) -> Tensor:
        """0-dim."""
        if self.cache is None:
            target = self.tokens(batch.image, self.grid)
        else:
            flipped, size = batch.flipped.tolist(), batch.image.shape[-1]
            keys = [(index, flip, size) for index, flip in zip(batch.indices.tolist(), flipped, strict=True)]
            target = self.cache(batch.image, self.grid, keys)
        return alignment_loss(self.projector(losses.tokens), target).mean()


class CachedTokens:
    """A teacher's tokens for each image, computed once and kept in main memory, in bfloat16.

    Meant for small data sets: 1,000 images of 256 tokens with 768 features take 0.4 GB.

    Args:
        tokens: images [B, C, H, W] and their grid (rows, columns) → [B, rows·columns, F], see FrozenNetwork.tokens.
    """

    def __init__(self, tokens: Callable[[Tensor, tuple[int, int]], Tensor]):
        self.tokens = tokens
        self._memory: dict[Hashable, Tensor] = {}  # (key, grid) → [N, F] bfloat16

    def __call__(self, images: Tensor, grid: tuple[int, int], keys: Sequence[Hashable]) -> Tensor:
        """[B, rows·columns, F] in float32, on the images' device.

        keys: one per image, for example (index in the data set, mirrored); equal keys have to mean equal images.
        """
        entries = [(key, tuple(grid)) for key in keys]
        image_of = dict(zip(entries, range(len(images)), strict=True))
        missing = [entry for entry in image_of if entry not in self._memory]
        if missing:
            features = self.tokens(images[[image_of[entry] for entry in missing]], grid).to("cpu", torch.bfloat16)
            self._memory.update(zip(missing, features, strict=True))
        return torch.stack([self._memory[entry] for entry in entries]).to(images.device).float()


def alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """1 − cosine of the angle between two feature vectors, averaged over an image's tokens: [B] in 0 … 2.

    projected (the projector's output) and target (the teacher's) are [B, N, F]; computed in float32 or better.

    Raises:
        InputError: the shapes differ.
    """
    if projected.shape != target.shape:
        raise InputError(
            f"projected tokens of shape {tuple(projected.shape)} cannot be aligned with a teacher's "
            f"{tuple(target.shape)}: the numbers of tokens and features have to match"
        )
    return (1 - F.cosine_similarity(at_least_float32(projected), at_least_float32(target), dim=-1)).mean(1)
