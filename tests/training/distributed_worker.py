"""What the processes of test_distributed.py do.

torchrun -m tests.training.distributed_worker FOLDER straight|killed|resumed|again|listings|skips|starts|students
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pixnerd import InputError, checkpoints, flow
from pixnerd.config import STUDENT_SAMPLING
from pixnerd.distributed import join, leave
from pixnerd.model import ModelConfig
from pixnerd.model_source import student_config
from pixnerd.training import StepRecord, TrainConfig, loop, train

STEPS, KILLED_AFTER = 20, 7
WAYS = {
    "replicated": {},
    "sharded": {"shard": True},
    "accumulated": {"accumulate": 2},
    "aligned": {"shard": True, "align": "efficientnet", "align_block": 2},
}
STUDENTS = {
    "shortcut": {},
    "kept": {"distil": "shortcut", "paths": 192, "workers": 1},
    "meanflow": {"distil": "meanflow"},
    "fd": {"distil": "fd"},
}


def config(folder: Path, way: str, several: bool = False) -> TrainConfig:
    """`several`: for 3 or 4 processes, which share a larger batch."""
    return TrainConfig(
        out=str(folder / way),
        data="synthetic",
        model=ModelConfig(width=16, heads=2, blocks=2, patch_size=8, image_size=16, field_width=4, field_blocks=1),
        steps=STEPS,
        batch_size=8 if not several else 24,
        learning_rate=1e-2,
        ema_decay=0.9,
        extra_ema_decays=(0.5,),
        log_every=5,
        checkpoint_every=KILLED_AFTER,
        horizontal_flip=True,
        clip=0.05,  # below every gradient norm
        **WAYS[way],
    )


def work(folder: Path, kill: bool) -> None:
    """Train in every way and record the losses; with `kill`, die by SIGKILL just after every run's checkpoint."""
    unfinished = []
    for way in WAYS:
        records, losses = train(config(folder, way), torch.device("cpu")), []
        for record in records:
            losses.append(float(record.loss))
            if kill and record.step == KILLED_AFTER + 2:
                unfinished.append(records)  # not closed: a killed process saves nothing
                break
        if join().leads:
            (folder / f"{way}.json").write_text(json.dumps(losses))
    join().any(False)  # the last one arrives
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)


def until_given_up(settings: TrainConfig) -> Iterator[StepRecord]:
    """A training run two steps after its checkpoint. The caller keeps it: if it were closed, it would save."""
    records = train(settings, torch.device("cpu"))
    while next(records).step < KILLED_AFTER + 2:
        pass
    return records


def again(folder: Path) -> None:
    """Train in three ways, each once straight through and once given up after a checkpoint and resumed."""
    given_up = []
    for way in ("replicated", "sharded", "accumulated"):
        for name in ("straight", "resumed"):
            settings = dataclasses.replace(config(folder / name, way, several=True), workers=1, log_every=1)
            if name == "resumed":
                given_up.append(until_given_up(settings))
            for _ in train(settings, torch.device("cpu")):
                pass


def skips(folder: Path) -> None:
    """Runs in which process 1 alone overflows at two steps, straight through and given up between them."""
    given_up = []
    for way in ("replicated", "sharded", "accumulated"):
        for name in ("straight", "resumed"):
            settings = dataclasses.replace(config(folder / name, way), non_finite="skip")
            with overflowing(3, KILLED_AFTER + 4):
                if name == "resumed":
                    given_up.append(until_given_up(settings))
                for _ in train(settings, torch.device("cpu")):
                    pass


@contextlib.contextmanager
def overflowing(*steps: int) -> Iterator[None]:
    """Make the gradient infinite at these steps, of process 1 if there are several; the loss stays finite."""
    compute, true_loss, now = loop.compute_gradients, flow.loss, 0

    def compute_gradients(job, state, batch):
        nonlocal now
        now = state.step + 1
        return compute(job, state, batch)

    def loss(*arguments):
        losses, world = true_loss(*arguments), join(torch.device("cpu"))
        if now in steps and world.rank == world.size - 1:
            losses.mean.register_hook(lambda gradient: gradient * math.inf)
        return losses

    loop.compute_gradients, flow.loss = compute_gradients, loss
    try:
        yield
    finally:
        loop.compute_gradients, flow.loss = compute, true_loss


def starts(folder: Path) -> None:
    """A new run starts from another one, of which each process finds a different newest checkpoint."""
    world = join(torch.device("cpu"))
    settings = config(folder / "first", "sharded")
    for _ in train(dataclasses.replace(settings, steps=2, checkpoint_every=1), world.device):
        pass
    listed = checkpoints.newest_checkpoint
    checkpoints.newest_checkpoint = lambda path: listed(path) and path / f"step-{2 - world.rank}"
    start = str(folder / "first" / "sharded")
    settings = dataclasses.replace(config(folder / "second", "sharded"), steps=1, learning_rate=1e-30, start_from=start)
    for _ in train(settings, world.device):
        pass


def student(folder: Path, way: str, teacher: Path) -> TrainConfig:
    return student_config(
        str(teacher),
        config(folder, "replicated", several=True),
        out=str(folder / way),
        batch_size=32,
        learning_rate=1e-3,  # at a larger one rounding grows within twenty steps
        extra_ema_decays=(),
        sampling=STUDENT_SAMPLING,
        **STUDENTS[way],
    )


def students(folder: Path) -> None:
    """Students of one teacher in each way of distilling; every process keeps its own weights."""
    world = join(torch.device("cpu"))
    for way in STUDENTS:
        for record in train(student(folder, way, folder / "teacher"), world.device):
            last = record
        torch.save(last.model.state_dict(), folder / f"{way}-{world.rank}.pt")


def listings(folder: Path) -> None:
    """What every process says of a run's checkpoints when their listings differ, and when one cannot read them."""
    world, run = join(), folder / "run" / "checkpoints"
    steps = [9, 5, 7]
    checkpoints.newest_checkpoint = lambda _: run / f"step-{steps[world.rank]}"
    refused = {2} if world.rank == 1 else set()
    checkpoints.check_checkpoint = lambda path: (
        refuse(path) if int(path.name.removeprefix("step-")) in refused else None
    )
    found = [checkpoints.leaders_checkpoint(run, world).name]
    steps[0] = 2
    try:
        checkpoints.leaders_checkpoint(run, world)
    except InputError as error:
        found.append(str(error))
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


def refuse(path: Path) -> None:
    raise InputError(f"{path.name} is not here")


def alone(folder: Path, way: str, **changes: Any) -> list[float]:
    """The losses of the same run, or of its remaining steps, in one process that holds the full model."""
    records = train(dataclasses.replace(config(folder, way), shard=False, **changes), torch.device("cpu"))
    return [float(record.loss) for record in records]


if __name__ == "__main__":
    place, what = Path(sys.argv[1]), sys.argv[2]
    functions = {"again": again, "listings": listings, "skips": skips, "starts": starts, "students": students}
    functions.get(what, lambda place: work(place, kill=what == "killed"))(place)
    leave()
