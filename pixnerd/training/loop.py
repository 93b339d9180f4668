"""The training loop, from top to bottom: the call and its checks, the state of a run, its steps, its checkpoints.

`train` is a generator that yields one record per step: the notebook, the command line and the tests share this loop.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import filelock
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..checkpoints import classes_of, leaders_checkpoint, load_training_state, read_window, save_checkpoint, step_of
from ..compiling import check_compiler, compile_regions
from ..conditions import Conditions, training_conditions
from ..config import TrainConfig
from ..data import ImageDataset
from ..differences import differences
from ..distributed import (
    World,
    bare,
    capability,
    check_sharding,
    exchange_gradients,
    join,
    local_part,
    replicate,
    shard,
)
from ..errors import InputError, NonFiniteLoss, WriteError
from ..model import PatchDenoiser
from ..model_config import check_triton
from ..model_source import ModelSource, find_model
from ..randomness import Purpose, derived_seed
from ..runs import Run
from ..text import build_network
from .batches import Batch, check_shared_memory, check_split, load_datasets, step_batches
from .distillation import Teacher, objective
from .losses import LossTerm, Networks, Objective, loss_terms
from .meters import Bad, Board, LossWindow, SpeedMeter, StepPart
from .paths import KeptPaths

MOST_SKIPPED = 10  # steps in a row without a finite loss and gradient; a run that goes on like this is lost


class StepRecord(NamedTuple):
    """What `train` yields after every step."""

    step: int  # steps completed, 1 … config.steps
    loss: Tensor  # 0-dim, on the training device: float(loss) waits for a GPU; of a skipped step, maybe not finite
    learning_rate: float
    model: PatchDenoiser  # the moving average so far; it changes with the next step


# --- the call --------------------------------------------------------------------------------------------------------


class StoppedEarly(Exception):
    """A run was asked to stop before its next step; the argument is the last one."""


def train(
    config: TrainConfig, device: torch.device | None = None, stop_asked: Callable[[], bool] = lambda: False
) -> Iterator[StepRecord]:
    """Train, or resume the run in `config.out`; yields one StepRecord for each remaining step.

    The caller may stop at any step: the state is then saved, and the same call resumes from there. Checkpoints are
    written while training goes on: that of a step is complete before the next one is begun, and before the generator
    yields the last step or ends.

    Under torchrun every process calls this and computes its share of every batch; `device` defaults to its own GPU.
    `stop_asked` is asked while a student's teacher follows paths, which may take long before the first step.

    Raises:
        InputError: at the call, before any work and in every process: the data, the sizes or the folder cannot be used;
            while iterating: an image cannot be read.
        WriteError: while iterating: a file of the run cannot be written; earlier checkpoints are kept.
        NonFiniteLoss: while iterating; earlier checkpoints are kept.
        StoppedEarly: while iterating: `stop_asked` said so; paths that were followed are kept.
    """
    world = join(device)
    run = Run(Path(config.out).absolute())  # a notebook may change its working directory between two steps
    with world.together():
        config.check_complete()
        config = run.completed(config)
        datasets = load_datasets(config, world)
        dataset = datasets[config.image_sizes[0]]
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, channels=dataset.channels))
        check_split(config, world.size)
        if config.shard:
            check_sharding()
        check_shared_memory(config, world)
        conditions = training_conditions(config, dataset, world.device)
    checkpoint = leaders_checkpoint(run.checkpoints, world)
    with world.together():
        if checkpoint is not None and step_of(checkpoint) > config.steps:
            raise InputError(f"steps is {config.steps}; {config.out} has made {step_of(checkpoint)} already")
    config, teacher = find_teacher(config, conditions.num_classes, world)
    start = leaders_model(config.start_from or config.teacher, world) if checkpoint is None else None
    with world.together():
        aim = objective(config, world, dataset.channels, conditions, teacher)
        paths = None
        if config.paths:
            paths = KeptPaths(config, world, dataset, conditions, Teacher(teacher, config, conditions.nothing))
    job = Job(config, run, datasets, conditions, aim, loss_terms(config, world), world, start, paths, stop_asked)
    with world.together():
        if start is not None and config.start_from:  # else it is the teacher, which was checked
            check_network("start_from", start.load(), config, conditions.num_classes)
        check_classes(run, checkpoint, conditions.num_classes)
        if job.compiles:
            check_compiler(world.device)
        if config.field_kernel == "fused":
            check_triton()
            check_gpu(world.device)
        classes = None if conditions.num_classes is None else dataset.classes
        lock = run.begin(config, classes) if world.leads else None
    if checkpoint is None:  # else it has what was measured; outside of `together`, since processes wait for each other
        aim.measure_data(dataset)
    return _train(job, checkpoint, lock)


def check_gpu(device: torch.device) -> None:
    """Raise InputError unless the fused field's kernel runs on the device."""
    if device.type != "cuda":
        raise InputError(f"field_kernel is fused, which runs on a GPU alone; this run's device is {device}: use torch")


def check_classes(run: Run, checkpoint: Path | None, num_classes: int | None) -> None:
    """Raise InputError if the checkpoint of an earlier version's run, which named no classes, has another number."""
    if checkpoint is not None and run.classes() is None and (before := classes_of(checkpoint)) != num_classes:
        raise InputError(
            f"the model in {run.folder} has {before} classes and the data has {num_classes} now: restore the data, or "
            "choose another output folder"
        )


def leaders_model(name: str, world: World) -> ModelSource | None:
    """The weights that the leading process finds under a name, on every process; None for an empty name.

    Raises:
        InputError: in every process, if one of them cannot read them.
    """
    if not name:
        return None
    with world.together():
        source = find_model(name) if world.leads else None
    return world.from_leader(source).settled(world)


def find_teacher(
    config: TrainConfig, num_classes: int | None, world: World
) -> tuple[TrainConfig, PatchDenoiser | None]:
    """The configuration with its teacher's checkpoint and content, and the teacher on the device, if it has one.

    Raises:
        InputError: in every process: the teacher is missing, another network or a student, or has other weights now.
    """
    source = leaders_model(config.teacher, world)
    model = dataclasses.replace(config.model, student=source is not None)
    if source is None:
        return dataclasses.replace(config, model=model), None
    with world.together():
        if (teacher := source.load(device=world.device)).config.student:
            raise InputError(
                f"teacher {config.teacher} is a few-step student; a student's teacher samples in many steps"
            )
        check_network("teacher", teacher, config, num_classes)
        content = source.content()
        if config.teacher_content not in ("", content):
            raise InputError(
                f"teacher {config.teacher} has weights {content}; teacher_content asks for {config.teacher_content}"
            )
    return dataclasses.replace(config, model=model, teacher=source.pinned, teacher_content=content), teacher


def check_network(what: str, model: PatchDenoiser, config: TrainConfig, num_classes: int | None) -> None:
    """Raise InputError unless the weights of the model that the setting `what` names fit the configured network."""
    with torch.device("meta"):
        wanted = build_network(config.model, num_classes)
    name = getattr(config, what)
    theirs, ours = (type(network).__name__ for network in (model, wanted))
    if theirs != ours:
        raise InputError(f"{what} {name} is a {theirs}; this run trains a {ours}")
    found = [d._replace(name=d.name.removeprefix("config.")) for d in differences(model.about(), wanted.about())]
    free = {"image_size"} | ({"student"} if config.distil else set())  # weights fit any size; a student adds none
    differ = [f"{d.name} {d.old} → {d.new}" for d in found if d.name not in free]
    if differ:
        raise InputError(f"{what} {name} is another network: {', '.join(differ)}")


# --- the state of a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What stays the same throughout a run."""

    config: TrainConfig
    run: Run
    datasets: dict[int, ImageDataset]
    """by size in pixels"""
    conditions: Conditions
    objective: Objective
    """the loss that is minimised"""
    terms: list[LossTerm]
    """the losses added to it"""
    world: World
    start: ModelSource | None = None
    """the weights that a new run starts from; None: random ones"""
    paths: KeptPaths | None = None
    """the teacher's paths, where they are kept"""
    stop_asked: Callable[[], bool] = lambda: False
    """whether to stop before the next step; asked while paths are followed"""

    @property
    def bf16(self) -> bool:
        """Whether the network computes in bfloat16."""
        return self.config.computes_in_bfloat16(self.world.device.type)

    @property
    def compiles(self) -> bool:
        return self.config.compile == "on" or (self.config.compile == "auto" and self.world.device.type == "cuda")


@dataclass
class TrainingState:
    """What changes at every step."""

    models: dict[str, PatchDenoiser | nn.Module]
    """by checkpoint file: "model", which is trained; its moving averages "ema", …; the "projector" of REPA; the
    "moments" of FD-loss"""
    network: nn.Module
    """the model as the forward pass calls it: wrapped in DDP where processes replicate it"""
    optimizer: torch.optim.Optimizer
    step: int = 0
    """steps completed"""
    saved: int = 0
    """the step of the newest complete checkpoint"""
    writing: Future[Path] | None = None
    """the checkpoint that is being written, see `save_checkpoint`; in every process or in none"""
    consistent: bool = True
    """False during an update and after a non-finite loss: the state must not be saved then"""
    skipped: int = 0
    """the newest steps that were skipped, in a row"""
    window: LossWindow = field(default_factory=LossWindow)


def build_models(job: Job) -> dict[str, PatchDenoiser]:
    """The model to train, "model", and its moving averages, "ema" and one per extra decay, all equal at first."""
    config, world, models = job.config, job.world, {}
    for name in ("model", *config.average_decays(1)):
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(config.seed, Purpose.INITIAL_WEIGHTS))
            settings = job.conditions.num_classes, config.recompute, config.kernel_on(capability(world.device))
            models[name] = build_network(config.model, *settings).to(world.device)
    if job.start is not None:
        with world.together():
            weights = job.start.load(device=world.device).state_dict()
        for model in models.values():
            model.load_state_dict(weights)
    for name, model in models.items():
        if config.shard:
            shard(model, world, config.computes_in_bfloat16(world.device.type))
        if name != "model":
            model.eval().requires_grad_(False)
    return models


def build_state(job: Job, checkpoint: Path | None) -> TrainingState:
    """Models and optimiser, fresh or restored from a checkpoint."""
    config, world = job.config, job.world
    models = build_models(job)
    model = models["model"].train()
    for term in job.terms:
        if term.trained is not None:
            models["projector"] = bare(term.trained)
    if job.objective.kept is not None:
        models["moments"] = job.objective.kept
    trained = [p for name in ("model", "projector") if name in models for p in models[name].parameters()]
    optimizer = torch.optim.AdamW(trained, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    step = 0
    if checkpoint is not None:
        step = load_training_state(checkpoint, models, optimizer, world)
    window = LossWindow() if checkpoint is None else LossWindow.restored(read_window(checkpoint), world)
    if world.leads:
        job.run.cut_log(step)  # also to nothing, after a kill before the first checkpoint
    if job.compiles:
        for network in (model, *job.objective.asked):
            compile_regions(network)
    return TrainingState(models, replicate(model, world), optimizer, step, step, window=window)


# --- the steps -------------------------------------------------------------------------------------------------------


def _train(job: Job, checkpoint: Path | None, lock: filelock.BaseFileLock | None) -> Iterator[StepRecord]:
    """Run the remaining steps; the completed ones are saved however the loop stops, even by closing the generator."""
    try:
        with repeatable(job.config.deterministic):
            yield from _steps(job, checkpoint)
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def repeatable(on: bool) -> Iterator[None]:
    """If `on`, operators that have several implementations use one whose sums have a fixed order."""
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _steps(job: Job, checkpoint: Path | None) -> Iterator[StepRecord]:
    config, world = job.config, job.world
    state = build_state(job, checkpoint)
    settled = state.network is state.models["model"]
    if job.paths is None:
        batches = step_batches(config, job.datasets, job.conditions, state.step, world)
    else:
        if not job.paths.complete(job.compiles, job.stop_asked):
            raise StoppedEarly(state.step)
        batches = job.paths.batches(state.step)
    board = Board(job.run, state.step) if world.leads else None
    speed = SpeedMeter(config, job.conditions.num_classes, torch.bfloat16 if job.bf16 else torch.float32, world)
    try:
        for batch in batches:
            logs, saves = (is_due(config, state.step + 1, n) for n in (config.log_every, config.checkpoint_every))
            if not settled:
                settle_buckets(job, state, batch)
                settled = True
            # ================================================ one step ================================================
            loss = compute_gradients(job, state, batch)
            if config.non_finite == "skip":
                skip_unless_finite(job, state)
            elif logs or saves or world.device.type != "cuda":  # the check stalls a GPU
                check_finite(job, state)
            lr = update_weights(job, state)
            # ==========================================================================================================
            if logs:
                entry = {"step": state.step, **state.window.summary(world), "learning_rate": lr}
                entry |= speed.read(state.window.steps_here * config.batch_size)
                if config.non_finite == "skip":
                    entry["skipped"] = state.window.skipped
                if board is not None:
                    job.run.log(entry)
                    board.add(entry)
                state.window = LossWindow()
            if logs and state.writing is not None and world.from_leader(state.writing.done()):
                complete_checkpoint(job, state)  # or find out now that it could not be written
            if saves:
                save(job, state)
            if state.step == config.steps:
                complete_checkpoint(job, state)
            yield StepRecord(state.step, loss, lr, state.models["ema"])
    except BaseException as reason:
        together = world.size == 1 or isinstance(reason, GeneratorExit)  # one process cannot save for all
        can_write = not isinstance(reason, WriteError)
        if state.consistent and together and can_write and not (state.window.losses and state.window.first_bad()):
            save(job, state)
            complete_checkpoint(job, state)
        elif state.writing is not None:
            concurrent.futures.wait([state.writing])
        raise
    finally:
        if board is not None:
            board.close()


def settle_buckets(job: Job, state: TrainingState, batch: Batch) -> None:
    """Compute a gradient and drop it, so that a resumed run adds up gradients as one that never stopped.

    After its first backward pass DDP divides the gradients anew into the buckets that it exchanges. With three or more
    processes the order in which a number is summed depends on its place there, and so does its last bit.
    """
    window, state.window = state.window, LossWindow()
    compute_gradients(job, state, batch)
    state.window = window


def compute_gradients(job: Job, state: TrainingState, batch: Batch) -> Tensor:
    """Compute the clipped gradient of all losses; returns the objective averaged over all processes, 0-dim."""
    config, world, device = job.config, job.world, job.world.device
    roles = Networks(state.network, state.models["model"])
    terms = [term for term in job.terms if term.counts(state.step)]
    tap = next((term.tap for term in terms if term.tap is not None), None)
    networks = [state.network, *(term.trained for term in terms if term.trained is not None)]
    state.optimizer.zero_grad()
    means, measured = [], []
    for number, part in enumerate(batch.parts(config.accumulate), start=1):
        for network in networks:
            exchange_gradients(network, number == config.accumulate)
        with torch.autocast(device.type, torch.bfloat16, enabled=job.bf16):
            losses = job.objective(roles, part, tap)
            values = {term.name: term.value(losses, part) for term in terms}
            total = losses.mean
            for term in terms:
                total = total + term.weight * values[term.name]
        (total / config.accumulate).backward()
        means.append(losses.mean.detach())
        measured.append(StepPart(losses.per_image, {name: value.detach() for name, value in values.items()}))
    trained = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if config.clip is not None:
        nn.utils.clip_grads_with_norm_(trained, config.clip, norm)
    loss = world.mean(torch.stack(means).mean())
    state.window.add_step(loss, norm, measured, batch.t)
    return loss


def check_finite(job: Job, state: TrainingState) -> None:
    """Raise NonFiniteLoss if a loss, or a gradient, since the last log entry was not finite."""
    if (bad := state.window.first_bad()) is not None:
        stop_at(bad, job, state)


def skip_unless_finite(job: Job, state: TrainingState) -> None:
    """Have the next update skipped if the loss or the gradient is not finite; every process finds the same.

    Raises NonFiniteLoss when it is the last of MOST_SKIPPED such steps in a row.
    """
    bad = state.window.first_bad()  # of the last step, since skipped ones are not in the window
    state.skipped = state.skipped + 1 if bad else 0
    if state.skipped == MOST_SKIPPED:
        stop_at(bad, job, state)
    if bad:
        state.window.skip_step()


def stop_at(bad: Bad, job: Job, state: TrainingState) -> NoReturn:
    """Raise NonFiniteLoss, which names the step and the last good checkpoint."""
    state.consistent = False
    complete_checkpoint(job, state)
    folder, saved, before = job.run.checkpoints, state.saved, max(0, state.skipped - 1)
    kept = f"step {saved} is kept in {folder}" if saved else "there was no checkpoint yet"
    skipped = f", and the {before} steps before it were skipped" if before else ""
    raise NonFiniteLoss(f"the {bad.what} of step {state.step + 2 - bad.ago} is not finite{skipped}; {kept}")


def update_weights(job: Job, state: TrainingState) -> float:
    """Update the weights with AdamW, then the moving averages, or skip both; returns the step's learning rate."""
    lr = learning_rate(job.config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.consistent = False
    if not state.skipped:
        state.optimizer.step()
        update_averages(state.models, job.config, state.step + 1)
        job.objective.updated()
    state.step += 1
    state.consistent = True
    return lr


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of `step`, 0 … steps − 1."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = 1 - step / config.steps
    shapes = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return config.learning_rate * warm * shapes[config.decay]


@torch.no_grad()
def update_averages(models: dict[str, PatchDenoiser], config: TrainConfig, step: int) -> None:
    """Move every average that is due towards the weights after `step` steps; after the first step it equals them."""
    for name, decay in config.average_decays(step).items():
        average, weights = ([local_part(p) for p in models[which].parameters()] for which in (name, "model"))
        if step == 1:
            torch._foreach_copy_(average, weights)
        else:
            get_ema_multi_avg_fn(decay)(average, weights, step)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def is_due(config: TrainConfig, step: int, every: int) -> bool:
    """Whether something done every `every` steps, and after the last one, is due after `step` steps."""
    return step % every == 0 or step == config.steps


def save(job: Job, state: TrainingState) -> None:
    """Start to write a checkpoint of the completed steps, unless one exists; first complete the one before."""
    complete_checkpoint(job, state)
    if state.step > state.saved:
        config, window = job.config, state.window.sums(job.world)
        state.writing = save_checkpoint(
            job.run.checkpoints,
            state.step,
            state.models,
            state.optimizer,
            config.keep_checkpoints,
            job.world,
            config.keep_every,
            window,
        )


def complete_checkpoint(job: Job, state: TrainingState) -> None:
    """Wait for the checkpoint that is being written. Raises its WriteError, in every process."""
    if state.writing is None:
        return
    written, state.writing = state.writing, None
    with job.world.together():
        state.saved = step_of(written.result())
