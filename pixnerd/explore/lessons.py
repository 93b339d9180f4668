"""The trained model of digits from which several lessons start."""

import dataclasses
from pathlib import Path

from tqdm import tqdm

from ..config import TrainConfig
from ..model import PixNerd
from ..model_source import load
from ..recipes import quickstart
from ..runs import Run
from ..training import train


def trained_digits(out: str | Path, steps: int) -> tuple[PixNerd, TrainConfig]:
    """A class-conditional model of digits and the settings of its run; their `out` is where the run lies.

    If `quickstart` beside `out` holds the finished quickstart run, its model is loaded. Otherwise a model is trained
    with the quickstart's recipe, shortened to `steps`, and saved in `out`, from where later calls load it.
    """
    beside = Run(Path(out).with_name("quickstart"))
    if beside.config_path.is_file():
        config = dataclasses.replace(beside.config(), out=str(beside.folder))  # as seen from here
        if (beside.checkpoints / f"step-{config.steps}").is_dir() and config.data == "digits":
            return load(beside.folder), config
    config = dataclasses.replace(quickstart(), out=str(out), steps=steps)
    if steps < config.log_every:
        config = dataclasses.replace(config, compile="off")  # compiling takes longer than these few steps
    for _ in tqdm(train(config), total=steps, unit="step", desc="training", mininterval=5):
        pass
    return load(out), config
