"""The ablation explorer in a notebook: the page of `ablations.js`, with a kernel that trains runs that are missing."""

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from ..errors import InputError
from ..launch import LaunchError, launch
from .ablations import SOURCE, STYLE
from .index import RUNS, index

PERIOD = 0.5  # seconds between reports of a training run's progress


class Ablations(anywidget.AnyWidget):
    """The explorer of a project's studies and runs; show it as a cell's last line.

    Args:
        project: the folder that has data/ablations, runs and notebooks/studies.
    """

    _esm = SOURCE
    _css = STYLE
    found = traitlets.Dict().tag(sync=True)
    """the index"""
    progress = traitlets.Dict().tag(sync=True)
    """running; study, index and line, the last that the run which is trained has printed; error, a sentence"""
    in_address = traitlets.Bool(False).tag(sync=True)
    """whether the page's address says what is selected: under Voila, where the page shows nothing else"""

    def __init__(self, project: str | Path = "."):
        self.project = Path(project).resolve()
        self.training: threading.Thread | None = None
        self._stopped = threading.Event()
        alone = os.environ.get("SERVER_SOFTWARE", "").startswith("voila")
        super().__init__(found=index(self.project), progress={"running": False}, in_address=alone)
        self.on_msg(self._on_message)

    def _on_message(self, _: object, content: dict[str, Any], __: object) -> None:
        if content.get("do") == "train":
            self.train(content["study"], content["index"])
        elif content.get("do") == "stop":
            self.stop()

    def train(self, study: str, number: int) -> None:
        """Train a run of a study in a process of its own, unless another one is being trained; returns at once."""
        if self.training is None or not self.training.is_alive():
            self._stopped.clear()
            self.training = threading.Thread(target=self._train, args=(study, number), daemon=True)
            self.training.start()

    def stop(self) -> None:
        """Stop the training run, which saves its state; `train` goes on from there."""
        self._stopped.set()

    def _train(self, study: str, number: int) -> None:
        known = {"running": True, "study": study, "index": number}
        self.progress = known | {"line": "starting"}
        error, told = "", time.monotonic()
        try:
            with contextlib.closing(launch(self.command(study, number), folder=self.project)) as lines:
                for line in lines:
                    if self._stopped.is_set():
                        break
                    if time.monotonic() > told + PERIOD:
                        told = time.monotonic()
                        self.progress = known | {"line": line}
        except (InputError, LaunchError) as failure:
            error = str(failure)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            raise  # so that the kernel's log has the traceback
        finally:
            self.found = index(self.project)
            self.progress = {"running": False, "error": error}

    def command(self, study: str, number: int) -> list[str]:
        """The arguments of `pixnerd` that make a run of a study. Raises InputError if the study has no file."""
        file = next((entry["file"] for entry in self.found["studies"] if entry["name"] == study), "")
        if not file:
            raise InputError(f"study is {study!r}; its file is needed to train a run of it")
        out = self.project / RUNS / study
        return ["sweep", str(self.project / file), "--index", str(number), "--out", str(out), "--retry"]
