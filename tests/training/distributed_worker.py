"""What the processes of test_distributed.py do.

torchrun -m tests.training.distributed_worker FOLDER straight|killed|resumed|again|listings
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch

from pixnerd import InputError, checkpoints
from pixnerd.distributed import join, leave
from pixnerd.model import ModelConfig
from pixnerd.training import TrainConfig, train

STEPS, KILLED_AFTER = 20, 7
WAYS = {
    "replicated": {},
    "sharded": {"shard": True},
    "accumulated": {"accumulate": 2},
    "aligned": {"shard": True, "align": "efficientnet", "align_block": 2},
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
        clip=1.0,
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
    join().wait()
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)


def again(folder: Path) -> None:
    """Train in three ways, each once straight through and once given up after a checkpoint and resumed."""
    given_up = []
    for way in ("replicated", "sharded", "accumulated"):
        for name in ("straight", "resumed"):
            settings = dataclasses.replace(config(folder / name, way, several=True), workers=1, log_every=1)
            if name == "resumed":
                records = train(settings, torch.device("cpu"))
                given_up.append(records)  # not closed: it saves nothing
                while next(records).step < KILLED_AFTER + 2:
                    pass
            for _ in train(settings, torch.device("cpu")):
                pass


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


def alone(folder: Path, way: str) -> list[float]:
    """The losses of the same run, or of its remaining steps, in one process that holds the full model."""
    records = train(dataclasses.replace(config(folder, way), shard=False), torch.device("cpu"))
    return [float(record.loss) for record in records]


if __name__ == "__main__":
    place, what = Path(sys.argv[1]), sys.argv[2]
    {"again": again, "listings": listings}.get(what, lambda place: work(place, kill=what == "killed"))(place)
    leave()
