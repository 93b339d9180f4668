"""A small study, its variations, and the command that makes it."""

import os
from pathlib import Path

import pytest
import yaml

from pixnerd.cli import main

ROOT = Path(__file__).parents[2]
TINY = {
    "base": "digits-cpu",
    "settings": {
        "data": "synthetic",
        "model.width": 16,
        "model.heads": 2,
        "model.blocks": 1,
        "model.image_size": 16,
        "model.field_width": 4,
        "steps": 4,
        "batch_size": 2,
        "log_every": 1,
        "sampling.steps": 1,
    },
    "axes": {
        "head": {"linear": {"model.head": "linear"}, "field": {}},
        "prediction": {"v": {"model.prediction": "v"}, "x": {"model.prediction": "x"}},
    },
    "seeds": [0, 5],
    "measure": {"samples": 0, "errors": 4},
}


def sweep(*arguments):
    """Exit code of `pixnerd sweep …`, 0 when it returns."""
    try:
        main(["sweep", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    """Writes the tiny study with other parts, None for a part to leave out, and returns its path; works in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def write(name="tiny", **parts):
        content = {key: value for key, value in (TINY | parts).items() if value is not None}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write
