"""What is measured of a run: against plain loops, closed forms and repeated calls."""

import dataclasses
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixnerd import InputError, data, load, sample
from pixnerd.conditions import Labels
from pixnerd.config import SamplingConfig, TrainConfig
from pixnerd.metrics.nearest import digit_agreement
from pixnerd.model import PixNerd
from pixnerd.model_config import ModelConfig
from pixnerd.model_source import student_config
from pixnerd.runs import Run
from pixnerd.sampling import sample_noise
from pixnerd.studies import measures
from pixnerd.studies.wanted import Measures
from pixnerd.training import train

NANO = ModelConfig(16, heads=2, blocks=1, patch_size=8, image_size=32, field_width=4, field_blocks=1)


class Oracle(PixNerd):
    """The exact velocity plus a known error: the square root of 0.1 for a label 3, 2·t for any other."""

    def forward(self, x, t, labels, base_resolution=None, tap=None):
        exact = (self.clean - x) / (1 - t).view(-1, 1, 1, 1)
        error = torch.where(labels == 3, 0.1**0.5, 2 * t)
        return exact + error.view(-1, 1, 1, 1)


class OneImage(data.ImageDataset):
    """The same picture over and over, with labels 3 and 5."""

    def __init__(self, count):
        super().__init__(32, 3, [3, 5] * (count // 2), [str(i) for i in range(10)])

    def pixels(self, index):
        return torch.full((3, 32, 32), 100, dtype=torch.uint8)


def test_velocity_errors_are_the_mean_squares_in_each_tenth():
    model = Oracle(NANO, num_classes=10)
    model.clean = data.to_float(OneImage(2).pixels(0))
    found = measures.velocity_errors(model, OneImage(400), Labels(10), 400, 64)
    for tenth, error in enumerate(found):
        low, high = 0.096 * tenth, 0.096 * (tenth + 1)
        of_t = 4 * (high**3 - low**3) / (3 * (high - low))  # the mean of (2t)² over the tenth
        assert error == pytest.approx((0.1 + of_t) / 2, rel=0.03)


def test_velocity_errors_are_the_same_for_any_batch_size_and_call():
    torch.manual_seed(0)
    model = PixNerd(dataclasses.replace(NANO, channels=1), num_classes=10).double()
    torch.nn.init.normal_(model.head.out.weight)
    digits = data.load("digits", 32)
    first, again = (measures.velocity_errors(model.float(), digits, Labels(10), 20, size) for size in (20, 7))
    assert first == pytest.approx(again, rel=1e-5)
    assert first[0] != first[9]
    assert measures.velocity_errors(model, digits, Labels(10), 5, 20) != first


def test_images_of_other_classes_are_refused():
    with pytest.raises(InputError, match="knows 7 classes; the images of two have 10"):
        measures.check_images(OneImage(2), "two", 7)
    with pytest.raises(InputError, match="with captions, and those of two have none"):
        measures.check_images(OneImage(2), "two", None)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """Real images: four of each digit, as a folder."""
    folder, digits = tmp_path_factory.mktemp("real"), data.load("digits", 32)
    for index in range(0, 5000, 125):
        path = folder / str(int(digits.labels[index])) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(digits.pixels(index)[0].numpy()).save(path)
    return Measures(samples=20, unguided=10, errors=8, reference=f"folder:{folder}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve steps on digits."""
    config = TrainConfig(
        out=str(tmp_path_factory.mktemp("study") / "0000-run"),
        data="digits",
        model=dataclasses.replace(NANO, channels=1),
        steps=12,
        batch_size=4,
        log_every=1,
        ema_decay=0.5,
        sampling=SamplingConfig(steps=2, guidance=2.0),
    )
    for _ in train(config):
        pass
    return Run(config.out)


def test_a_student_is_measured_without_velocity_errors(run, wanted, tmp_path):
    config = student_config(str(run.folder), out=str(tmp_path / "student"), steps=2, batch_size=16)
    list(train(config))
    found = measures.measure_run(Run(config.out), dataclasses.replace(wanted, unguided=0))
    assert found["error_by_t"] == []
    assert "velocity_error" not in found["scores"]
    assert "agreement" in found["scores"]
    assert found["sampling"]["solver"] == "map"


def test_a_run_is_measured_and_the_result_kept(run, wanted):
    found = measures.measure_run(run, wanted)
    assert run.metrics()["study"] == json.loads(json.dumps(found))
    assert found["wanted"]["samples"] == 20
    scores = found["scores"]
    assert scores["velocity_error"] == pytest.approx(statistics.fmean(found["error_by_t"]), abs=1e-5)
    expected = {"kid", "fd", "precision", "recall"}
    assert expected | {f"softened_{name}" for name in expected} <= scores.keys()
    assert {"class_agreement", "softened_class_agreement", "agreement", "unguided_agreement"} <= scores.keys()
    assert scores["sharpness"] > 1  # two steps from noise
    with Image.open(run.folder / "sheet.webp") as sheet:
        assert sheet.size == (133, 133)
    assert measures.measure_run(run, wanted)["scores"] == scores


def test_a_run_on_images_of_one_class_is_measured_without_a_vote(wanted, tmp_path):
    (folder,) = (path for path in Path(wanted.reference.removeprefix("folder:")).iterdir() if path.name == "3")
    shutil.copytree(folder, tmp_path / "real" / "3")
    real = f"folder:{tmp_path / 'real'}"
    config = TrainConfig(out=str(tmp_path / "runs" / "one"), data=real, model=NANO, steps=1, batch_size=4)
    list(train(dataclasses.replace(config, sampling=SamplingConfig(steps=1, guidance=1.0))))
    scores = measures.measure_run(Run(config.out), Measures(samples=16, errors=4))["scores"]
    assert "kid" in scores
    assert not {name for name in scores if "class" in name}


def test_samples_come_from_noise_that_all_runs_share(run, wanted, monkeypatch):
    seen = {}

    class Watched(measures.Samples):
        def __init__(self, config, *others):
            seen["settings"] = config
            super().__init__(config, *others)

    monkeypatch.setattr(measures, "Samples", Watched)
    scores = measures.measure_run(run, dataclasses.replace(wanted, unguided=0))["scores"]
    assert "unguided_agreement" not in scores
    assert (seen["settings"].seed, seen["settings"].draw, seen["settings"].classes) == (0, 20, "equal")
    model, config = load(str(run.folder)), run.config().sampling
    noise = sample_noise((1, 32, 32), range(20), 0)
    pixels = data.to_uint8(sample(model, torch.arange(20) % 10, config, noise=noise))
    assert scores["agreement"] == digit_agreement(pixels, torch.arange(20) % 10)
    sheet = np.asarray(Image.open(run.folder / "sheet.webp").convert("L"))
    torch.testing.assert_close(torch.tensor(sheet[1:33, 1:33]), pixels[0, 0], atol=1, rtol=0)


def test_another_way_to_sample_is_kept_in_another_folder(run, wanted, tmp_path):
    into = Run(tmp_path / "study" / "0001-three-steps")
    into.folder.mkdir(parents=True)
    before = run.metrics()
    sampling = SamplingConfig(steps=3, guidance=1.0)
    found = measures.measure_run(run, dataclasses.replace(wanted, unguided=0), sampling, into)
    assert found["sampling"]["steps"] == 3
    assert into.metrics() == json.loads(json.dumps({"study": found}))
    assert run.metrics() == before
    assert (into.folder / "sheet.webp").is_file()


def test_what_the_log_says_of_training(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {}, "sampling": {}, "batch_size": 10}')
    for step in range(20):
        entry = {"step": step, "loss": 1.0 - step / 20, "gradient_norm": 1.0, "images_per_second": 50.0}
        run.log(entry | {"largest_gradient_norm": 3.5 if step in (4, 9) else 2.0})
    figures = measures.training_figures(run)
    assert figures == pytest.approx({"loss": 0.075, "gradient_norm": 1, "gradient_spikes": 2, "seconds_per_step": 0.2})


@pytest.mark.parametrize("fields", [{"samples": -1}, {"samples": 9}, {"errors": 0}, {"batch_size": 0}])
def test_wrong_wishes_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        Measures(**fields)
