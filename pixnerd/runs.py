"""A run is a folder: config.json, classes.json, log.jsonl, checkpoints/, samples.png, samples.npz, metrics.json.

Everything that reports on a run reads this folder, the only source of truth.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from .classes import ClassNames
from .config import SamplingConfig, TrainConfig
from .data.synsets import words_of
from .differences import differences
from .errors import InputError
from .files import (
    LOCK,
    hold,
    is_partial,
    make_folder,
    reachable,
    read_arrays,
    read_json,
    readable,
    remove_partial_files,
    replacing,
    write_atomically,
    writing,
)

if TYPE_CHECKING:  # most of a run's files need no torch
    from torch import Tensor

# entries of config.json that may change when a run is resumed: where, how long, how often, on which hardware, and what
# only later commands read
CHANGEABLE = {"out", "steps", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every"}
CHANGEABLE |= {"accumulate", "compile", "deterministic", "field_kernel", "non_finite", "recompute", "shard", "workers"}
CHANGEABLE |= {f"sampling.{field.name}" for field in dataclasses.fields(SamplingConfig)}
SWEEP = "sweep"  # folder in a run's folder that belongs to the study which the run is part of
CONTENTS = {"model_content", "reference_content"}  # of an evaluation's settings: hashes


class Run:
    """The files of one run; the folder need not exist yet."""

    def __init__(self, folder: str | Path):
        self.folder = reachable(folder)
        self.config_path = self.folder / "config.json"
        self.classes_path = self.folder / "classes.json"
        self.log_path = self.folder / "log.jsonl"
        self.checkpoints = self.folder / "checkpoints"

    def begin(self, config: TrainConfig, classes: Sequence[str] | None = None) -> filelock.BaseFileLock:
        """Create the folder for `config` and the data's `classes`, if it has any, or resume the run in it.

        Returns:
            a lock: until it is released, or gone with its owner, no other process can begin or resume the run.

        Raises:
            InputError: the folder holds something else, or a run that has begun its work with a different configuration
                or other classes, or another process trains the run.
        """
        self._check_folder(config, classes)
        make_folder(self.folder)
        busy = "is being trained by another process: wait for its end, or choose another output folder"
        lock = hold(self.folder, busy)
        try:
            self._check_folder(config, classes)  # another process may have begun, and ended, meanwhile
            remove_partial_files(self.folder)
            write_atomically(self.config_path, json.dumps(config.to_dict(), indent=2) + "\n")
            make_folder(self.checkpoints)
            remove_partial_files(self.checkpoints)
            if classes is not None and (self.classes() is None or not self._has_work()):
                written = {"classes": list(classes), "words": words_of(classes)}
                write_atomically(self.classes_path, json.dumps(written) + "\n")
        except BaseException:
            lock.release()
            raise
        return lock

    def _check_folder(self, config: TrainConfig, classes: Sequence[str] | None) -> None:
        """Raise InputError unless the folder is free for the run, or holds it."""
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; the output has to be a folder")
        if not self.config_path.exists():
            if self.folder.exists() and any(not self._may_come_first(path) for path in self.folder.iterdir()):
                raise InputError(f"{self.folder} is not empty and holds no run: choose another output folder")
        elif self._has_work():
            changed = differences(self.config(), config)
            if config.decay != "constant" and any(d.name == "steps" for d in changed):
                raise InputError(
                    f"{self.folder} was planned for {self.config().steps} steps, not {config.steps}: with "
                    f"decay={config.decay} the learning rate of every step depends on their number, so it cannot "
                    f"change midway; keep it, or start a new run with --start-from {self.folder}"
                )
            found = [d for d in changed if d.name not in CHANGEABLE]
            if found:
                different = [f"{d.name} {json.dumps(d.old)} there, {json.dumps(d.new)} asked for" for d in found]
                raise InputError(
                    f"{self.folder} already holds another run ({'; '.join(different)}): "
                    "choose another output folder, or resume it with the same settings"
                )
            self.check_classes(classes)

    def _has_work(self) -> bool:
        """Whether a step of the run is kept or logged; until then it may begin again with other settings."""
        return any(self.checkpoints.glob("step-*")) or (self.log_path.exists() and self.log_path.stat().st_size > 0)

    def _may_come_first(self, path: Path) -> bool:
        """Whether something in the folder may be there before the run begins: the running notebook, which papermill
        writes, a sweep's own files, the run's lock, and what a begin that failed for want of room has left."""
        left = is_partial(path) or (path == self.checkpoints and not any(path.iterdir()))
        return left or path.suffix == ".ipynb" or path.name in (SWEEP, LOCK)

    def classes(self) -> list[str] | None:
        """The class that each label means, from classes.json; None if an earlier version began the run."""
        if not self.classes_path.is_file():
            return None
        return self._names("classes")

    def class_names(self) -> ClassNames | None:
        """The same with the words for it, of which earlier versions wrote none."""
        if (classes := self.classes()) is None:
            return None
        words = self._names("words", classes)
        if len(words) != len(classes):
            raise InputError(f"{self.classes_path} has {len(words)} words for {len(classes)} classes")
        return ClassNames(classes, words)

    def _names(self, entry: str, default: list[str] | None = None) -> list[str]:
        """A list of names in classes.json. Raises InputError if it is none."""
        names = read_json(self.classes_path, "the names of a run's classes").get(entry, default)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{self.classes_path} holds no list of {entry}")
        return names

    def check_classes(self, classes: Sequence[str] | None) -> None:
        """Raise InputError unless these classes of its data, as they are now, are those of when the run began."""
        before = self.classes()
        if before is None or classes is None or before == list(classes):
            return
        if len(before) != len(classes):
            what = f"{len(before)} classes, now it has {len(classes)}"
        else:
            label = next(i for i, (old, new) in enumerate(zip(before, classes, strict=True)) if old != new)
            what = f"label {label} for {before[label]!r}, now it is {classes[label]!r}"
        raise InputError(
            f"when {self.folder} began, its data had {what}; labels have to keep their meaning: restore the data, or "
            "choose another output folder"
        )

    def completed(self, config: TrainConfig) -> TrainConfig:
        """`config`, with what the run in this folder has found out: teacher's checkpoint, aligned block, field kernel.

        A teacher that is named by its run alone is the checkpoint which that was when the student began. Earlier
        versions wrote block 8 into every configuration, also where text models align block 6 by default today, and
        the kernel torch, where "auto" may take another today.
        """
        if not self.config_path.is_file() or not self._has_work():
            return config
        before = self.config()
        if config.align_block is None:
            config = dataclasses.replace(config, align_block=before.align_block)
        if config.field_kernel == "auto":
            config = dataclasses.replace(config, field_kernel=before.field_kernel)
        if config.teacher and before.teacher.rpartition("@")[0] == str(Path(config.teacher)):
            config = dataclasses.replace(config, teacher=before.teacher)
        return config

    def config(self) -> TrainConfig:
        """The contents of config.json. Raises InputError if there is no run here or the file cannot be read."""
        if not self.config_path.is_file():
            raise InputError(f"{self.folder} holds no run: {self.config_path.name} is missing there")
        return TrainConfig.from_dict(read_json(self.config_path, "a run's configuration"))

    def log(self, entry: dict[str, Any]) -> None:
        """Append one object to log.jsonl."""
        with writing(self.log_path), self.log_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The objects in log.jsonl, oldest first, without a last line that a crash cut off.

        Raises InputError if another line is damaged: resuming the run would drop all that follow.
        """
        if not self.log_path.exists():
            return []
        with readable(self.log_path, "cannot be read as a run's log"):
            lines = self.log_path.read_text(errors="replace").splitlines()
        entries: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if type(entry["step"]) is not int:
                    raise TypeError("its step is no whole number")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if number == len(lines):
                    break
                raise InputError(f"line {number} of {self.log_path} is damaged: mend or remove it") from error
            entries.append(entry)
        return entries

    def cut_log(self, step: int) -> None:
        """Drop everything logged after `step`: a run that resumes there logs it again."""
        if not self.log_path.exists():
            return
        kept = [json.dumps(entry) + "\n" for entry in self.read_log() if entry["step"] <= step]
        write_atomically(self.log_path, "".join(kept))

    def save_samples(self, images: Tensor, labels: Tensor, columns: int) -> None:
        """Write samples.npz (arr_0 uint8 [B, H, W, 3], labels [B]) and samples.png, a grid of all of them.

        images [B, C, H, W] in [−1, 1]; greyscale is written as three equal channels, as readers of such files expect.
        """
        import numpy as np
        from PIL import Image
        from torchvision.utils import make_grid

        from .data import to_uint8

        pixels = to_uint8(images.cpu())
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        with replacing(self.folder / "samples.npz") as path:
            np.savez_compressed(path, arr_0=pixels.permute(0, 2, 3, 1).numpy(), labels=labels.cpu().numpy())
        grid = make_grid(pixels, nrow=columns, padding=2, pad_value=128)
        with replacing(self.folder / "samples.png") as path:
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)

    def load_samples(self) -> tuple[Tensor, Tensor]:
        """(uint8 [B, 3, H, W], labels [B]) from samples.npz. Raises InputError if it is missing or damaged."""
        import torch

        path = self.folder / "samples.npz"
        if not path.is_file():
            raise InputError(f"{path} does not exist: run `pixnerd sample {self.folder}` first")
        found = read_arrays(path, ("arr_0", "labels"))
        pixels, labels = found.get("arr_0"), found.get("labels")
        if pixels is None or labels is None or pixels.dtype != "uint8" or pixels.shape[3:] != (3,):
            raise InputError(f"{path} holds no samples: they are arr_0, uint8 [B, H, W, 3], and labels [B]")
        if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
            wrong = f"labels are {labels.dtype} {labels.shape}"
            raise InputError(f"{path}: {wrong}; {len(pixels)} whole numbers are needed")
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels)

    def metrics(self) -> dict[str, Any]:
        """The contents of metrics.json so far. Raises InputError if it is damaged."""
        path = self.folder / "metrics.json"
        found = read_json(path, "a run's metrics") if path.is_file() else {}
        rows = found.get("evaluations", [])
        if not isinstance(rows, list) or not all(map(is_evaluation, rows)):
            raise InputError(f"{path} is damaged: not every entry of `evaluations` has settings and scores")
        return found

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Add these entries to metrics.json."""
        write_atomically(self.folder / "metrics.json", json.dumps(self.metrics() | metrics, indent=2) + "\n")

    def evaluation(self, settings: dict[str, Any]) -> dict[str, float] | None:
        """The scores in metrics.json measured with exactly these settings; None if there are none."""
        rows = self.metrics().get("evaluations", [])
        return next((row["scores"] for row in rows if same_evaluation(row["settings"], settings)), None)

    def save_evaluation(self, settings: dict[str, Any], scores: dict[str, float]) -> None:
        """Add a row to the list `evaluations` in metrics.json, or replace the one with the same settings."""
        rows = [row for row in self.metrics().get("evaluations", []) if not same_evaluation(row["settings"], settings)]
        self.save_metrics({"evaluations": [*rows, {"settings": settings, "scores": scores}]})


def is_evaluation(row: Any) -> bool:
    """Whether this is a row as `Run.save_evaluation` writes it."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), dict) for name in ("settings", "scores")):
        return False
    return all(isinstance(score, (int, float)) for score in row["scores"].values())


def same_evaluation(kept: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a row of metrics.json was measured with these settings.

    The same weights are the same under any name. Rows of earlier versions say nothing about the content of weights and
    reference; the checkpoint's and the reference's name have to do.
    """
    ignored = {name for name in CONTENTS if kept.get(name) is None}
    if kept.get("model_content") is not None and kept["model_content"] == settings.get("model_content"):
        ignored.add("checkpoint")
    return all(difference.name in ignored for difference in differences(kept, settings))
