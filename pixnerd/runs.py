"""A run is a folder: config.json, log.jsonl, checkpoints/, samples.png, samples.npz, metrics.json.

Everything that reports on a run reads this folder; nothing else is the truth.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from .checkpoints import write_atomically
from .data import to_uint8
from .errors import InputError

# entries of config.json that may differ when a run goes on: where, how long, how often, on what
CHANGEABLE = {"out", "steps", "log_every", "checkpoint_every", "keep_checkpoints"} | {
    "accumulate",
    "compile",
    "recompute",
    "shard",
    "workers",
}


class Run:
    """The files of one run; the folder need not exist yet."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config_path = self.folder / "config.json"
        self.log_path = self.folder / "log.jsonl"
        self.checkpoints = self.folder / "checkpoints"

    def begin(self, config: dict[str, Any]) -> None:
        """Make the folder for `config`, or take up the run that it holds.

        Raises:
            InputError: the folder holds something else, or a run that was configured differently.
        """
        config = json.loads(json.dumps(config))  # tuples become lists, as in the file
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; the output has to be a folder")
        if self.config_path.exists():
            different = _differences(self.config(), config)
            if different:
                raise InputError(
                    f"{self.folder} already holds another run ({'; '.join(different)}): "
                    "choose another output folder, or the same settings to go on with it"
                )
        elif self.folder.exists() and any(path.suffix != ".ipynb" for path in self.folder.iterdir()):
            # papermill writes the executing notebook there before the run begins
            raise InputError(f"{self.folder} is not empty and holds no run: choose another output folder")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_path, json.dumps(config, indent=2) + "\n")

    def config(self) -> dict[str, Any]:
        """What config.json says. Raises InputError when there is no run here."""
        if not self.config_path.is_file():
            raise InputError(f"{self.folder} holds no run: {self.config_path.name} is missing there")
        return json.loads(self.config_path.read_text())

    def log(self, entry: dict[str, Any]) -> None:
        """Append one object to log.jsonl."""
        with self.log_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The objects of log.jsonl, oldest first; a last line that a crash cut off is left out."""
        if not self.log_path.exists():
            return []
        entries = []
        for line in self.log_path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return entries

    def cut_log(self, step: int) -> None:
        """Drop what was logged after `step`: a training that resumes there logs it again."""
        kept = [json.dumps(entry) + "\n" for entry in self.read_log() if entry["step"] <= step]
        write_atomically(self.log_path, "".join(kept))

    def save_samples(self, images: Tensor, labels: Tensor, columns: int) -> None:
        """Write samples.npz (arr_0 uint8 [B, H, W, 3], labels [B]) and samples.png, a grid of all of them.

        images [B, C, H, W] in [−1, 1]; greyscale is written as three equal channels, as readers of such files expect.
        """
        pixels = to_uint8(images.cpu())
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        np.savez_compressed(
            self.folder / "samples.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy(), labels=labels.cpu().numpy()
        )
        grid = make_grid(pixels, nrow=columns, padding=2, pad_value=128)
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(self.folder / "samples.png")

    def load_samples(self) -> tuple[Tensor, Tensor]:
        """(uint8 [B, 3, H, W], labels [B]) from samples.npz. Raises InputError when there is none."""
        path = self.folder / "samples.npz"
        if not path.is_file():
            raise InputError(f"{path} does not exist: run `pixnerd sample {self.folder}` first")
        with np.load(path) as file:
            return torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(file["labels"])

    def metrics(self) -> dict[str, Any]:
        """What metrics.json says so far."""
        path = self.folder / "metrics.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Put these entries into metrics.json, beside what it has."""
        write_atomically(self.folder / "metrics.json", json.dumps(self.metrics() | metrics, indent=2) + "\n")

    def evaluation(self, settings: dict[str, Any]) -> dict[str, float] | None:
        """The scores in metrics.json that were measured with just these settings; None when there are none."""
        settings = json.loads(json.dumps(settings))  # tuples are lists there
        found = (row["scores"] for row in self.metrics().get("evaluations", []) if row["settings"] == settings)
        return next(found, None)

    def save_evaluation(self, settings: dict[str, Any], scores: dict[str, float]) -> None:
        """Put a row into the list `evaluations` of metrics.json: how it was measured, and what came out."""
        settings = json.loads(json.dumps(settings))
        rows = [row for row in self.metrics().get("evaluations", []) if row["settings"] != settings]
        self.save_metrics({"evaluations": [*rows, {"settings": settings, "scores": scores}]})


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """'name old → new' for every entry that differs and matters."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        if not prefix and key in CHANGEABLE:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} {json.dumps(before)} there, {json.dumps(after)} asked for")
    return found
