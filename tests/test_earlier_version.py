"""A run from before the package's redesign (commit a692dde): it loads and resumes, and its measurements are found."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixnerd import load
from pixnerd.config import EvaluationConfig, SamplingConfig, TrainConfig
from pixnerd.evaluation import evaluate, row_settings
from pixnerd.runs import Run
from pixnerd.training import train

MADE = Path(__file__).with_name("made_by_an_earlier_version")
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    return Run(shutil.copytree(MADE, tmp_path / "run"))


def test_it_resumes_where_it_stopped_with_the_losses_of_its_own_code(run):
    (run.folder / "losses.json").rename(run.folder.parent / "losses.json")
    expected = json.loads((run.folder.parent / "losses.json").read_text())
    config = replace(run.config(), out=str(run.folder))
    assert (config.steps, config.frequency_quality, config.extra_ema_decays) == (12, 85, (0.5,))
    records = list(train(config, CPU))
    assert [record.step for record in records] == list(range(7, 13))
    assert [float(record.loss) for record in records] == pytest.approx(expected, rel=1e-4)
    assert [entry["step"] for entry in run.read_log()] == [2, 4, 6, 8, 10, 12]
    for weights in ("ema", "ema-0.5", "model"):
        assert load(run.folder, weights=weights).patch_embed.weight.isfinite().all()


def test_what_it_measured_is_found_and_not_measured_again(run, monkeypatch):
    monkeypatch.setattr("pixnerd.frozen.load", None)
    config = EvaluationConfig(str(run.folder), draw=12, sampling=run.config().sampling)
    [row] = run.metrics()["evaluations"]
    settings = row_settings(config)
    new = {name: settings[name] for name in ("sampling", "weights", "reference_content", "model_content")}
    assert settings == row["settings"] | new
    assert (new["weights"], new["reference_content"]) == (None, None)  # the default network, and computed images
    assert evaluate(config).scores == row["scores"]


def test_settings_that_it_did_not_know_get_their_defaults():
    entries = json.loads((MADE / "config.json").read_text())
    for name in ("perceptual", "perceptual_weight", "extra_ema_decays"):
        del entries[name]
    config = TrainConfig.from_dict(entries)
    assert (config.perceptual, config.extra_ema_decays, config.noise) == ("", (), "torch")
    assert config.sampling == SamplingConfig(steps=2, solver="adams2")
