"""What the processes of test_distributed.py do.

torchrun -m tests.training.distributed_worker FOLDER straight|killed|resumed
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch

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


def config(folder: Path, way: str) -> TrainConfig:
    return TrainConfig(
        out=str(folder / way),
        data="synthetic",
        model=ModelConfig(width=16, heads=2, blocks=2, patch_size=8, image_size=16, field_width=4, field_blocks=1),
        steps=STEPS,
        batch_size=8,
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


def alone(folder: Path, way: str) -> list[float]:
    """The losses of the same run, or of its remaining steps, in one process that holds the full model."""
    records = train(dataclasses.replace(config(folder, way), shard=False), torch.device("cpu"))
    return [float(record.loss) for record in records]


if __name__ == "__main__":
    work(Path(sys.argv[1]), kill=sys.argv[2] == "killed")
    leave()
