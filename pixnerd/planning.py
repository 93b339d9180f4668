"""What a training run will take of each GPU before it is started: arithmetic, memory, hours; and what an evaluation.

Everything here is computed from shapes; the hours are an estimate from a published speed.
"""

import bisect
import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from . import cost, frozen
from .config import TrainConfig
from .errors import InputError
from .fields import PATCHES_PER_PIECE
from .files import read_json
from .frozen.dinov2 import LARGE, PATCH
from .frozen.network import FrozenNetwork
from .model import PatchDenoiser
from .model_config import Recompute, TextModelConfig
from .sampling import network_passes
from .text import build_network
from .training.batches import SHORTCUTS, check_split
from .training.distillation import LAST, path_passes, vectors
from .training.paths import path_bytes

GIB = 2**30
CARDS = {8: 7.8, 12: 11.8, 16: 15.7, 24: 23.6, 80: 79.2}  # GB that a card is sold with → GiB that it reports
CARD = CARDS[80]
NODE = 8  # GPUs of a machine: where there are several, each of them holds all shards, see distributed.sharding_mesh
SPARE = 0.08  # share of a card for what is not counted: the context, workspaces, buffers of communication, fragments
# The authors' XL/16 takes 0.27 s a step on eight A100 (arXiv 2507.23268): 32 images a GPU of 3 · 268 + 46 GFLOP each
RATE = 1e14  # FLOP/s of an A100
MOST_IMAGES = 4096  # at once, up to which the largest number that fits is looked for
POLICIES: tuple[Recompute, ...] = ("none", "head", "all")
DINOV2 = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "giant": (1536, 40)}  # width, blocks
ENCODERS = {"Qwen/Qwen3-1.7B": (1.7e9, 1.4e9)}  # parameters, and those without the table of tokens


@dataclass(frozen=True)
class Frozen:
    """What frozen networks add to a training step."""

    flops: float = 0
    """an image"""
    bytes: float = 0
    """of weights on each GPU"""
    kept: float = 0
    """bytes an image that they save for the backward pass, where gradients pass through them"""

    def __add__(self, other: "Frozen") -> "Frozen":
        return Frozen(self.flops + other.flops, self.bytes + other.bytes, self.kept + other.kept)


@dataclass(frozen=True)
class Fit:
    """The memory of one GPU, in GiB, with one way of saving it."""

    recompute: Recompute
    accumulate: int
    images: int
    """that a GPU computes at once"""
    state: float
    """weights, gradients, AdamW's moments, moving averages; copies of the weights in bfloat16; frozen networks, a
    student's teacher among them"""
    kept: float
    """from the forward pass for the backward pass"""
    passing: float
    """computed again in the backward pass, one block or one piece of the head at a time, and the gradients of the
    generated weights, which all pieces share"""

    @property
    def total(self) -> float:
        return self.state + self.kept + self.passing

    def fits(self, card: float = CARD) -> bool:
        """Whether a card of so many GiB holds it, with some to spare."""
        return self.total <= (1 - SPARE) * card


@dataclass(frozen=True)
class Plan:
    """What a training run takes."""

    config: TrainConfig
    gpus: int
    model: PatchDenoiser
    """on the meta device: shapes alone"""
    frozen: Frozen
    kept: dict[str, float]
    """GiB an image, by policy of recomputation"""
    head: float
    """GiB an image: the part of kept["none"] that computing the head again in pieces saves"""

    def fit(self, recompute: Recompute | None = None, accumulate: int | None = None, images: int | None = None) -> Fit:
        """The memory of one GPU; by default with the run's own settings, and with its share of the run's batch."""
        config = self.config
        recompute, accumulate = recompute or config.recompute, accumulate or config.accumulate
        among = NODE if self.gpus % NODE == 0 else self.gpus
        shards = among if config.shard else 1
        state = cost.state_bytes(self.model, len(config.average_decays(1)), shards) / GIB
        if config.precision != "float32":
            state += 2 * sum(p.numel() for p in self.model.parameters()) / GIB
        images = images or config.batch_size // (self.gpus * accumulate)
        tokens = (config.model.image_size // config.model.patch_size) ** 2
        piece = self.head * min(images, PATCHES_PER_PIECE / tokens)
        piece += images * cost.generated_bytes(config.model, activations_dtype(config)) / GIB  # all pieces' gradients
        block = (self.kept["none"] - self.head - self.kept["all"]) * images / config.model.blocks
        pieces = piece if self.model.recomputes_head(recompute) else 0.0
        passing = max(pieces, block) if recompute == "all" else pieces
        kept = (self.kept[recompute] + self.frozen.kept / GIB) * images
        return Fit(recompute, accumulate, images, state + self.frozen.bytes / GIB, kept, passing)

    def most_images(self, recompute: Recompute, card: float = CARD) -> int:
        """The largest number of images at once that fits a card of so many GiB; 0 if not even one does."""
        numbers = range(1, MOST_IMAGES + 1)
        return bisect.bisect_left(numbers, True, key=lambda images: not self.fit(recompute, images=images).fits(card))

    def suggestions(self, card: float = CARD) -> list[Fit]:
        """What fits a card where the run's own settings do not: a step in more parts, or more recomputation.

        Every policy that needs fewer parts than those that recompute less, the fewest parts first.
        """
        if self.fit().fits(card):
            return []
        config, each = self.config, self.config.batch_size // self.gpus
        parts = [n for n in range(config.accumulate, each + 1) if self._can_accumulate(n)]
        found: list[Fit] = []
        for policy in POLICIES[POLICIES.index(config.recompute) :]:
            fit = next((fit for n in parts if (fit := self.fit(policy, n)).fits(card)), None)
            if fit and (not found or fit.accumulate < found[-1].accumulate):
                found.append(fit)
        return found[::-1]

    def _can_accumulate(self, parts: int) -> bool:
        """Whether the run could compute its steps in so many parts; a student's losses forbid some."""
        try:
            check_split(dataclasses.replace(self.config, accumulate=parts), self.gpus)
        except InputError:
            return False
        return True

    def flops(self, recompute: Recompute | None = None) -> float:
        """Floating-point operations of a training step for one image, recomputation and frozen networks included."""
        counts = [cost.step_flops(self.model, size, recompute) for size in self.config.image_sizes]
        return statistics.fmean(counts) + self.frozen.flops

    def hours(self, rate: float = RATE) -> float:
        """Of training, at `rate` FLOP/s of each GPU."""
        config = self.config
        return self.flops() * config.batch_size * config.steps / (rate * self.gpus) / 3600

    def sampling_hours(self, images: int = 50_000, rate: float = RATE) -> float:
        """Of sampling so many images with the run's settings on all GPUs, at `rate` FLOP/s of each."""
        flops = network_passes(self.config.sampling) * cost.forward_flops(self.model, self.config.model.image_size)
        return images * flops / (rate * self.gpus) / 3600


def plan_run(config: TrainConfig, gpus: int = 1, num_classes: int = 1000, capability: int = 0) -> Plan:
    """Count what a run takes of each of `gpus` GPUs.

    With `field_kernel` auto, that depends on their major compute capability; with 0, of torch's kernel.

    Raises:
        InputError: they cannot share a batch, or the run's teacher is not named or not found.
    """
    config.check_complete()
    check_split(config, gpus, "GPUs")
    with torch.device("meta"):
        model = build_network(config.model, num_classes, config.recompute, config.kernel_on(capability))
    settings = {"dtype": activations_dtype(config), "decoded": max(config.image_sizes)}  # the largest has to fit
    size = config.model.image_size
    kept = {policy: cost.saved_activation_bytes(model, size, policy, **settings) / GIB for policy in POLICIES}
    in_pieces = kept["head"]
    if not model.recomputes_head("head"):  # the fused kernel's pieces keep what torch's do
        with torch.device("meta"):
            pieces = build_network(config.model, num_classes, "head", "torch")
        in_pieces = cost.saved_activation_bytes(pieces, size, "head", **settings) / GIB
    others = teacher_cost(config) + encoder_cost(config) + distillation_cost(config, model)
    return Plan(config, gpus, model, others, kept, kept["none"] - in_pieces)


def activations_dtype(config: TrainConfig) -> torch.dtype:
    """The precision that a run's network computes in on a GPU."""
    return torch.bfloat16 if config.computes_in_bfloat16("cuda") else torch.float32


def teacher_cost(config: TrainConfig) -> Frozen:
    """What REPA's teacher takes; a DINOv2's size is read off its name or its folder's config.json."""
    if not config.align:
        return Frozen()
    rows = config.model.image_size // config.model.patch_size
    teacher = LARGE if config.align == "dinov2" else config.align
    described = Path(teacher) / "config.json"
    width, blocks = next((size for name, size in DINOV2.items() if f"dinov2-{name}" in teacher), (0, 0))
    if described.is_file():
        about = read_json(described, "the configuration of a DINOv2")
        width, blocks = about.get("hidden_size", width), about.get("num_hidden_layers", blocks)
    if width:
        tokens, matrices = rows**2 + 1, 12 * blocks * width**2
        attention, patches = 2 * blocks * tokens**2 * width, rows**2 * 3 * PATCH**2 * width
        return Frozen(2 * (tokens * matrices + attention + patches), 4 * matrices)
    network = frozen.load(teacher)
    with FlopCounterMode(display=False) as counter:
        network.tokens(torch.zeros(1, 3, *(config.model.image_size,) * 2), (rows, rows))
    return Frozen(counter.get_total_flops(), 4 * sum(p.numel() for p in network.parameters()))


def encoder_cost(config: TrainConfig) -> Frozen:
    """What the reader of captions takes, if it is a known large one: its arithmetic only if it reads each one anew."""
    if not isinstance(config.model, TextModelConfig) or config.text_encoder not in ENCODERS:
        return Frozen()
    weights, computing = ENCODERS[config.text_encoder]
    return Frozen(0 if config.cache_text else 2 * computing * config.model.text_length, 2 * weights)


def distillation_cost(config: TrainConfig, model: PatchDenoiser) -> Frozen:
    """What a student's step takes beside its own forward and backward pass; `model` is on the meta device.

    The teacher's velocities, those of its whole path for as many images as the path has intervals; MeanFlow's
    derivative; the networks of FD-loss. Only FD-loss alone does without the teacher in memory.
    """
    found = Frozen()
    if config.distil in ("shortcut", "meanflow"):
        if config.distil == "meanflow":
            passes = (
                1 if config.teacher_guidance == 1 else 2
            ) + 3  # with its derivative, as torch counts it, about three
        else:  # kept paths are followed once, before the first step
            followed = config.paths / config.steps / config.batch_size if config.paths else 1 / len(SHORTCUTS)
            passes = path_passes(config) * followed
        teacher = 0 if config.paths else 4 * sum(p.numel() for p in model.parameters())
        forward = statistics.fmean(cost.forward_flops(model, size) for size in config.image_sizes)
        found += Frozen(passes * forward, teacher)
    if config.distil == "fd" or config.fd_weight:
        share = 1 if config.distil == "fd" else len(LAST) / len(SHORTCUTS)
        for network in map(frozen.load, config.fd_networks):
            found += features_cost(network, config.model.image_size, share)
    return found


def features_cost(network: FrozenNetwork, size: int, share: float) -> Frozen:
    """What FD-loss takes of a frozen network, of which it sees this share of a step's images.

    Forward, and backward to the image alone, which costs as much again.
    """
    kept = []
    with FlopCounterMode(display=False) as counter:
        for images in (1, 2):
            storages = set()
            x = torch.zeros(images, 3, size, size, requires_grad=True)
            with saved_tensors_hooks(lambda tensor: storages.add(tensor.untyped_storage()) or tensor, lambda x: x):  # noqa: B023
                vectors(network, x)
            kept.append(sum(storage.nbytes() for storage in storages))
    flops, weights = counter.get_total_flops() / 3, sum(p.numel() for p in network.parameters())
    return Frozen(2 * share * flops, 4 * weights, share * (kept[1] - kept[0]))


def memory_table(plan: Plan, card: float = CARD) -> list[list[str]]:
    """A table's titles and rows: each policy of recomputation, whether it fits a card of so many GiB."""
    titles = ["recompute", "accumulate", "images at once", "state", "kept", "computed again", "sum (GiB)", "fits"]
    rows = [titles]
    for policy in POLICIES:
        fit = plan.fit(policy)
        numbers = (f"{value:.3g}" for value in (fit.state, fit.kept, fit.passing, fit.total))
        rows.append([policy, str(fit.accumulate), str(fit.images), *numbers, "yes" if fit.fits(card) else "no"])
    return rows


def cards_table(plan: Plan) -> list[list[str]]:
    """A table's titles and rows: the most images at once, by card and by policy of recomputation."""
    rows = [["images at once", *(f"recompute {policy}" for policy in POLICIES)]]
    for sold, card in CARDS.items():
        rows.append([f"card of {sold} GB", *(str(plan.most_images(policy, card)) for policy in POLICIES)])
    return rows


def card_here() -> float:
    """GiB of this machine's GPU, or where there is none of one that is sold with 80 GB."""
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else CARD


def advice(plan: Plan, card: float = CARD) -> str:
    """One sentence: whether the run's settings fit the card, and otherwise which do."""
    fit = plan.fit()
    own = f"recompute {fit.recompute}, accumulate {fit.accumulate}: {fit.total:.1f} GiB of a card with {card:g} GiB"
    if fit.fits(card):
        return f"{own}, which fits"
    fitting = plan.suggestions(card)
    if not fitting:
        return f"{own}, too much, and no recomputation or accumulation suffices: use more GPUs and --shard"
    ways = [f"--recompute {way.recompute} --accumulate {way.accumulate} ({way.total:.1f} GiB)" for way in fitting]
    return f"{own}, too much; use {' or '.join(ways)}"


def paths_line(config: TrainConfig) -> str:
    """The number of a student's kept paths and their size on the disk, in one line."""
    size = config.paths * path_bytes(config.model) / GIB
    return f"{config.paths:,} paths of the teacher, followed before the first step, take {size:.3g} GiB on the disk"


def hours_line(plan: Plan, rate: float = RATE) -> str:
    """The arithmetic and the estimated hours, in one line."""
    config, full = plan.config, plan.flops() / 1e9
    beside = "the teacher and other frozen networks" if config.distil else "frozen networks"
    with_frozen = f", {plan.frozen.flops / 1e9:.4g} of them of {beside}" if plan.frozen.flops else ""
    hours, evaluation = plan.hours(rate), plan.sampling_hours(rate=rate)
    return (
        f"a step: {full:.4g} GFLOP an image{with_frozen}; at {rate:.3g} FLOP/s a GPU {config.steps:,} steps take "
        f"{hours:.3g} hours on {plan.gpus}, {hours * plan.gpus:.4g} GPU-hours, and sampling 50,000 images "
        f"{evaluation:.2g} hours (estimates)"
    )
