"""The networks that are compared, on the same weights, and the steps that they take."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .. import plain, sampling
from ..compiling import check_compiler, compile_regions
from ..conditions import training_conditions
from ..config import TrainConfig
from ..data import load
from ..distributed import World, default_device
from ..errors import InputError
from ..model import PixNerd
from ..model_config import FieldKernel, ModelConfig, Recompute
from ..recorded import record_small_batches
from ..runs import Run
from ..training.batches import Batch, step_batches
from ..training.loop import (
    Job,
    LossWindow,
    TrainingState,
    check_finite,
    compute_gradients,
    update_weights,
)
from ..training.losses import VelocityLoss
from .presets import BenchConfig, Precision

Kind = Literal["package", "plain", "linear"]
TOLERANCE = 1e-4  # of the largest value: what rounding in float32 may change; a nearly empty column's norm magnifies it
GUIDANCE = 3.0
LATEST = 0.9  # t up to which outputs are compared: beyond, an image's error is divided by ever less


class PlainNetwork(PixNerd):
    """`plain.network` as a module with PixNerd's weights, which whatever takes a network takes."""

    def __init__(
        self, config: ModelConfig, num_classes: int, recompute: Recompute = "none", field_kernel: FieldKernel = "torch"
    ):
        super().__init__(config, num_classes, recompute, field_kernel)
        self.parts = plain.dit_block, plain.field_head

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, *_: None, **__: None) -> Tensor:
        """The velocity [B, C, H, W] at x for times t [B] and labels [B]."""
        return plain.network(dict(self.named_parameters()), self.config, x, t, labels, *self.parts)

    def compile_parts(self) -> None:
        """torch.compile a block and the head, the parts that `compile_regions` compiles of the package's network."""
        self.parts = tuple(torch.compile(compute, dynamic=False) for compute in (plain.dit_block, plain.field_head))


@dataclass(frozen=True)
class Contestant:
    """A network and how it is run."""

    kind: Kind
    """the package's network, the plain one, or the package's with a linear head and the same transformer"""
    precision: Precision
    compiled: bool
    recompute: Recompute = "none"
    kernel: FieldKernel = "torch"
    recorded: bool = False
    """sampling from a CUDA graph, see recorded.py"""

    def __str__(self) -> str:
        how = f"{self.precision}, {'compiled' if self.compiled else 'eager'}"
        how += ", fused" * (self.kernel == "fused") + ", recorded" * self.recorded
        return f"{self.kind}, {how}{f', recompute {self.recompute}' * (self.recompute != 'none')}"


def contestants(config: BenchConfig) -> list[Contestant]:
    """All that a benchmark compares; only the package's field has something to recompute in its head.

    The fused kernel recomputes the field anyway.
    """
    found = []
    ways = [way for way in itertools.product(config.recompute, config.kernels) if way != ("head", "fused")]
    for precision in config.precisions:
        for compiled in (value == "on" for value in config.compile):
            found += [Contestant("package", precision, compiled, *way) for way in ways]
            found += [Contestant(kind, precision, compiled) for kind in ("plain", "linear")]
    return found


class Bench:
    """The data, the weights that all contestants share, and what each of them does in a step.

    Raises InputError if the data cannot be opened or torch.compile does not work.
    """

    def __init__(self, config: BenchConfig):
        self.world = World(0, 1, default_device())
        self.dataset = load(config.data, config.model.image_size)
        self.config = config = _with_channels(config, self.dataset.channels)
        if "on" in config.compile:
            check_compiler(self.world.device)
        run = config.training(config.precisions[0], config.recompute[0])
        self.conditions = training_conditions(run, self.dataset, self.world.device)
        if self.conditions.num_classes is None:
            raise InputError(f"{config.data} has no classes; the benchmark is of class-conditional networks")
        self.batches = self.new_batches()
        self.batch = next(self.batches)
        field, linear = self._first("field"), self._first("linear")
        linear.load_state_dict(_trunk(field), assign=True, strict=False)
        self.weights = {"package": field, "plain": field, "linear": linear}
        states = {id(model): self._state(model, run) for model in (field, linear)}
        self.states = {kind: states[id(model)] for kind, model in self.weights.items()}

    def new_batches(self) -> Iterator[Batch]:
        """The training batches, from the first."""
        run = self.config.training("float32", "none")
        return step_batches(run, {run.model.image_size: self.dataset}, self.conditions, 0, self.world)

    def next_batch(self) -> None:
        """All contestants see another batch."""
        self.batch = next(self.batches)

    def _first(self, head: str) -> PixNerd:
        """A network whose weights nothing hides: those that begin at zero are random, too. Always the same weights."""
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            model = PixNerd(_with_head(self.config.model, head), self.conditions.num_classes).to(self.world.device)
            for parameter in model.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
        return model

    def _state(self, model: PixNerd, run: TrainConfig) -> TrainingState:
        """The optimiser and the average of some weights, shared by all who use them."""
        average = copy.deepcopy(model).eval().requires_grad_(False)
        averages = {name: average for name in run.average_decays(1)}
        optimizer = torch.optim.AdamW(model.parameters(), betas=run.betas, weight_decay=run.weight_decay, fused=True)
        return TrainingState({"model": model, **averages}, model, optimizer)

    def network(self, contestant: Contestant, compiled: bool | None = None) -> PixNerd:
        """A contestant's network in training mode: modules of its own on the shared weights."""
        kind = PlainNetwork if contestant.kind == "plain" else PixNerd
        weights = self.weights[contestant.kind]
        with torch.device("meta"):
            network = kind(weights.config, weights.num_classes, contestant.recompute, contestant.kernel)
        network.load_state_dict(weights.state_dict(keep_vars=True), assign=True)
        if contestant.compiled if compiled is None else compiled:
            if contestant.kind == "plain":
                network.compile_parts()
            else:
                compile_regions(network)
        if contestant.recorded:
            record_small_batches(network)
        return network.train()

    def job(self, contestant: Contestant) -> Job:
        """The training run that a contestant's step belongs to."""
        run, datasets = self.config.training(contestant.precision, contestant.recompute), {}
        return Job(run, Run(Path("unused")), datasets, self.conditions, VelocityLoss(run), [], self.world)

    def training_step(self, contestant: Contestant, network: PixNerd) -> Callable[[], None]:
        """A whole step of the package's loop with this network: gradient, clipping, check, optimiser, average."""
        job, shared = self.job(contestant), self.states[contestant.kind]

        def step() -> None:
            state = TrainingState(shared.models | {"model": network}, network, shared.optimizer, step=2)
            compute_gradients(job, state, self.batch)
            if self.world.device.type != "cuda":  # as the loop does
                check_finite(job, state)
            update_weights(job, state)

        return step

    def gradient(self, contestant: Contestant, network: PixNerd) -> Callable[[], None]:
        """The part of a step up to the clipped gradient."""
        job, shared = self.job(contestant), self.states[contestant.kind]

        def compute() -> None:
            state = TrainingState(shared.models, network, shared.optimizer, window=LossWindow())
            compute_gradients(job, state, self.batch)

        return compute

    def evaluation(self, contestant: Contestant, network: PixNerd, images: int, guided: bool) -> Callable[[], Tensor]:
        """One evaluation while sampling, of `images` images; guided, the network sees each of them twice."""
        device = self.world.device.type
        noise = torch.randn(images, *self.batch.image.shape[1:], device=self.world.device)
        labels = torch.arange(images) % self.conditions.num_classes
        guidance = GUIDANCE if guided else 1.0

        def evaluate() -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=contestant.precision == "bfloat16"):
                return sampling.sample(
                    network, labels, solver="euler", steps=1, guidance=guidance, interval=None, noise=noise
                )

        return evaluate

    @torch.no_grad()
    def difference(self, contestant: Contestant, network: PixNerd) -> float:
        """The largest difference of a contestant's velocity from the plain network's, of the largest velocity.

        Both see the current batch; the plain network computes in float64, with a contestant's own head.
        """
        image, t = self.batch.image, self.batch.t.clamp(max=LATEST)
        device = self.world.device.type
        weights = {name: weight.double() for name, weight in network.named_parameters()}
        pieces = zip(*(x.split(4) for x in (image.double(), t.double(), self.batch.condition)), strict=True)  # fits
        exact = torch.cat([plain.network(weights, network.config, *piece) for piece in pieces])
        with torch.autocast(device, torch.bfloat16, enabled=contestant.precision == "bfloat16"):
            found = network(image, t, self.batch.condition)
        return float((found - exact).abs().max() / exact.abs().max())


def check_equal(contestant: Contestant, difference: float) -> None:
    """Raise RuntimeError if a contestant computes something else, so that its time means nothing."""
    if contestant.precision == "float32" and not difference <= TOLERANCE:
        raise RuntimeError(f"{contestant} differs from the plain network by {difference:.2g} of its largest value")


def _with_channels(config: BenchConfig, channels: int) -> BenchConfig:
    model = dataclasses.replace(config.model, channels=channels)
    return dataclasses.replace(config, model=model)


def _with_head(config: ModelConfig, head: str) -> ModelConfig:
    return dataclasses.replace(config, head=head)


def _trunk(model: PixNerd) -> dict[str, Tensor]:
    """The weights outside the head, themselves and not copies."""
    return {name: w for name, w in model.state_dict(keep_vars=True).items() if not name.startswith("head.")}
