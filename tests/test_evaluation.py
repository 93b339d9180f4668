import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from pixnerd import InputError, data, load, sample
from pixnerd.cli import main
from pixnerd.config import EvaluationConfig, SamplingConfig
from pixnerd.data.pictures import read_pixels
from pixnerd.distributed import World
from pixnerd.evaluation import Samples
from pixnerd.evaluation import evaluate as measure
from pixnerd.frozen.efficientnet import EfficientNet
from pixnerd.frozen.inception import Inception
from pixnerd.metrics import features
from pixnerd.metrics.features import collect, compare, own_batches
from pixnerd.metrics.images import BatchReader, open_images
from pixnerd.model_source import find_model
from pixnerd.runs import Run
from pixnerd.training import train

from .training.test_training import CPU, config_for

ALONE = World(0, 1, CPU)


def pictures(count, side=8, seed=0):
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def write_npz(path, images, **arrays):
    np.savez_compressed(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)
    return path


class Corners(nn.Module):
    """Features that are easy to check: pixels of two corners."""

    def forward(self, images):
        pool = images[:, :, 0, :2].flatten(1).float()
        return {"pool": pool, "logits": pool / 100, "spatial": images[:, :, -1, -1].float()}


def test_images_are_the_same_from_every_kind_of_source(tmp_path):
    images = pictures(7)
    write_npz(tmp_path / "samples.npz", images)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "folder" / f"{i}.png")
    for source in (tmp_path / "samples.npz", tmp_path, tmp_path / "folder"):
        found = open_images(source)
        assert found.count == 7
        batches = list(found.batches(3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        assert torch.equal(torch.cat(batches), images)
    digits = open_images("digits", 32)
    grey = next(digits.batches(2))
    assert digits.count == 5000
    assert grey.shape == (2, 3, 32, 32)
    assert torch.equal(grey[:, 0], data.load("digits", 32).batch([0, 1])[0][:, 0])


def test_what_holds_no_images_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "wrong.npz", arr_0=np.zeros((2, 3)))
    np.savez(tmp_path / "other.npz", labels=np.zeros(2))
    (tmp_path / "broken.npz").write_bytes(b"PK broken")
    np.savez(tmp_path / "none.npz", arr_0=np.zeros((0, 8, 8, 3), np.uint8))
    np.savez_compressed(tmp_path / "spoilt.npz", arr_0=pictures(4).permute(0, 2, 3, 1).numpy())
    content = (tmp_path / "spoilt.npz").read_bytes()
    (tmp_path / "spoilt.npz").write_bytes(content[:60] + b"\xff" * 40 + content[100:])
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "0.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "empty" / "1.png")
    for name, words in {
        "wrong.npz": r"arr_0 is float64 of shape \(2, 3\); it has to be uint8",
        "other.npz": "no readable arr_0",
        "broken.npz": "no readable arr_0",
        "none.npz": r"arr_0 is uint8 of shape \(0, 8, 8, 3\)",
        "spoilt.npz": "no readable arr_0",
        "nothing.npz": "does not exist",
        "nothing": "nothing does not exist; images come from",
    }.items():
        with pytest.raises(InputError, match=words):
            open_images(tmp_path / name)
    with pytest.raises(InputError, match=r"1.png has \(9, 8\) pixels, those before it \(8, 8\)"):
        list(open_images(tmp_path / "empty").batches(2))


def test_photographs_of_any_size_are_a_reference_but_not_samples(tmp_path):
    sizes = [(40, 24), (24, 24), (100, 70)]
    for number, size in enumerate(sizes):
        noise = pictures(1, 100)[0].permute(1, 2, 0).numpy()
        Image.fromarray(noise).resize(size).save(tmp_path / f"{number}.png")
    found = torch.cat(list(open_images(tmp_path, 16).batches(2)))
    expected = [read_pixels(tmp_path / f"{number}.png", "", 16) for number in range(3)]
    assert torch.equal(found, torch.stack(expected))
    whole = data.pictures.center_crop(Image.open(tmp_path / "1.png"), 16)
    assert torch.equal(found[1].permute(1, 2, 0), torch.tensor(np.array(whole)))
    with pytest.raises(InputError, match=r"1.png has \(24, 24\) pixels, those before it \(24, 40\); .* --reference"):
        open_images(tmp_path)


def test_a_process_that_dies_while_it_loads_is_one_sentence(tmp_path, monkeypatch):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    monkeypatch.setattr(BatchReader, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="loads images has died .* --shm-size, or take --workers 0$"):
        list(open_images(tmp_path, 16).batches(1, workers=1))


def test_a_run_whose_data_has_other_classes_now_is_not_measured(tmp_path):
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / name / "0.png")
    config = config_for(tmp_path / "run", data=f"folder:{tmp_path / 'data'}", steps=1)
    list(train(config, torch.device("cpu")))
    (tmp_path / "data/a").rename(tmp_path / "data/c")
    with pytest.raises(InputError, match="its data had label 0 for 'a', now it is 'b'"):
        measure(EvaluationConfig(str(tmp_path / "run"), draw=2, sampling=SamplingConfig(steps=1)))


def test_a_file_that_was_cut_off_is_named_when_its_end_is_reached(tmp_path):
    images = pictures(40, 32)
    np.savez(tmp_path / "whole.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut.npz is not a file of images"):
        open_images(tmp_path / "cut.npz")


def test_features_in_batches_are_those_of_all_at_once(monkeypatch, tmp_path):
    images = pictures(23)
    source = open_images(write_npz(tmp_path / "a.npz", images))
    found = collect(Corners(), own_batches(source, 4, ALONE), 23, ALONE)
    expected = Corners()(images)
    assert found.count == 23
    for name in ("pool", "spatial"):
        values = expected[name].double().numpy()
        np.testing.assert_allclose(found.gaussians[name][0], values.mean(0))
        np.testing.assert_allclose(found.gaussians[name][1], np.cov(values, rowvar=False))
    assert torch.equal(found.rows["pool"], expected["pool"])
    assert torch.equal(found.rows["logits"], expected["logits"])
    some = collect(Corners(), own_batches(source, 4, ALONE), 23, ALONE, keep=9)
    place = (some.rows["pool"][:, None] == expected["pool"]).all(2).long().argmax(1)
    assert len(place.unique()) == 9  # nine different images of 23, in order, with the moments of all
    assert (place.diff() > 0).all()
    assert torch.equal(some.gaussians["pool"][0], found.gaussians["pool"][0])


def test_moments_of_a_reference_file_are_used(tmp_path):
    images = pictures(12)
    mean, covariance = np.full(6, 3.0), np.eye(6)
    mean_s, covariance_s = np.full(3, 2.0), 2 * np.eye(3)
    path = str(write_npz(tmp_path / "r.npz", images, mu=mean, sigma=covariance, mu_s=mean_s, sigma_s=covariance_s))
    found = features.reference_features(Corners(), "inception", path, 8, 5, ALONE)
    assert found.gaussians["pool"][0].tolist() == mean.tolist()
    assert found.gaussians["spatial"][1].tolist() == covariance_s.tolist()
    assert torch.equal(found.rows["pool"], Corners()(images)["pool"])
    own = features.reference_features(Corners(), "dinov2", path, 8, 5, ALONE)  # the file's moments are for Inception
    assert own.gaussians["pool"][0].tolist() != mean.tolist()


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("mu", np.full(5, 3.0)),
        ("sigma", np.full((6, 6), np.nan)),
        ("mu_s", np.full(3, "x")),
        ("sigma_s", np.zeros((3, 3), int)),
    ],
)
def test_moments_that_do_not_fit_the_features_are_refused(tmp_path, name, array):
    moments = {"mu": np.full(6, 3.0), "sigma": np.eye(6), "mu_s": np.full(3, 2.0), "sigma_s": np.eye(3), name: array}
    path = str(write_npz(tmp_path / "r.npz", pictures(12), **moments))
    with pytest.raises(InputError, match=rf"r.npz: {name} is .*; finite numbers \(.+\) are needed"):
        features.reference_features(Corners(), "inception", path, 8, 5, ALONE)


def test_a_set_against_itself_and_too_few_images():
    few = collect(Corners(), [(0, pictures(6))], 6, ALONE)
    with pytest.warns(UserWarning, match="6 images are fewer than 7, which 6 features need"):
        compare(few, few, Inception.measure)
    found = collect(Corners(), [(0, pictures(40))], 40, ALONE)
    scores = compare(found, found, Inception.measure)
    assert list(scores) == ["FID", "sFID", "IS", "KID", "precision", "recall"]
    assert scores["FID"] == pytest.approx(0, abs=1e-6)
    assert scores["sFID"] == pytest.approx(0, abs=1e-6)
    assert scores["KID"] <= 0
    assert scores["precision"] == scores["recall"] == 1


@pytest.mark.filterwarnings("ignore:.* images are fewer")
def test_efficientnet_distances_grow_with_noise_and_blur():
    pytest.importorskip("efficientnet_lite_pytorch")
    network = EfficientNet()
    real, held_out = data.load("digits", 32).batch(range(0, 5000, 40))[0].expand(-1, 3, -1, -1).chunk(2)
    reference = collect(network.pooled, [(0, real)], len(real), ALONE)

    def measured(images):
        sampled = collect(network.pooled, [(0, images)], len(images), ALONE)
        return compare(reference, sampled, network.measure)

    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
    noisy = [measured((held_out + level * noise).clamp(0, 255).to(torch.uint8)) for level in (0, 20, 60, 120)]
    blurred = [measured(gaussian_blur(held_out, 9, sigma) if sigma else held_out) for sigma in (0, 0.7, 1.5, 3)]
    for scores in (noisy, blurred):
        for name in ("FD-EffLite0", "KID-EffLite0"):
            values = [score[name] for score in scores]
            assert values == sorted(values), name
        assert scores[-1]["precision"] < scores[0]["precision"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    config = config_for(folder, steps=3, checkpoint_every=3)
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, steps=2))
    list(train(config, CPU))
    return Run(folder)


@pytest.fixture
def reference(tmp_path):
    gratings = data.load("synthetic", 32).batch(range(40))[0].expand(-1, 3, -1, -1)
    return str(write_npz(tmp_path / "real.npz", gratings))


def evaluate(*arguments):
    main(["evaluate", *map(str, arguments)])


def test_samples_are_measured_once_and_can_be_kept(run, reference, tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    command = (run.folder, "--reference", reference, "--draw", 9, "--batch-size", 4, "--guidance", 2)
    evaluate(*command, "--out", tmp_path / "sampled.npz")
    assert "warning: 9 images are fewer than 1281, which 1280 features need" in capsys.readouterr().err
    with np.load(tmp_path / "sampled.npz") as file:
        kept, labels = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(file["labels"])
    model = load(run.folder)
    assert labels.tolist() == [i % model.num_classes for i in range(9)]
    options = dataclasses.asdict(config_for("unused").sampling) | {"steps": 2, "guidance": 2.0}
    expected = data.to_uint8(sample(model, labels, indices=range(9), **options))
    assert (kept.int() - expected.int()).abs().max() <= 1
    [row] = run.metrics()["evaluations"]
    assert row["settings"]["sampling"]["guidance"] == 2
    assert row["settings"]["images"] == 9
    assert set(row["scores"]) == {"FD-EffLite0", "KID-EffLite0", "precision", "recall"}

    monkeypatch.setattr("pixnerd.frozen.load", None)  # the same settings need no network
    capsys.readouterr()
    evaluate(*command)
    assert f"KID-EffLite0 {row['scores']['KID-EffLite0']:.4g}" in capsys.readouterr().out
    assert run.metrics()["evaluations"] == [row]


def test_fewer_images_than_classes_are_spread_over_them(run):
    """Neighbours may be alike: the first hundred emoji are faces."""
    source = find_model(run.folder).settled()
    model = source.load()
    known = model.num_classes

    def labels(draw):
        return Samples(EvaluationConfig(str(run.folder), draw=draw), source, ALONE, model).labels.tolist()

    assert labels(2 * known + 1) == [*range(known), *range(known), 0]
    assert labels(known) == list(range(known))
    few = labels(known // 2)
    assert few == list(range(0, known, 2))
    assert len(few) > 1


def test_features_of_the_reference_are_computed_once(run, reference, tmp_path, monkeypatch):
    network = Corners()
    found = features.reference_features(network, "inception", reference, 32, 7, ALONE, tmp_path)
    monkeypatch.setattr(features, "collect", None)  # now there must be nothing to collect
    again = features.reference_features(network, "inception", reference, 32, 5, ALONE, tmp_path)
    assert again.count == found.count == 40
    assert again.rows.keys() == found.rows.keys()
    assert all(torch.equal(again.rows[name], found.rows[name]) for name in found.rows)
    for name, (mean, covariance) in found.gaussians.items():
        assert torch.equal(again.gaussians[name][0], mean)
        assert torch.equal(again.gaussians[name][1], covariance)
    with pytest.raises(TypeError, match="NoneType"):  # other images are computed, and so is a truncated file
        features.reference_features(network, "inception", "synthetic", 32, 5, ALONE, tmp_path)
    kept = tmp_path / "reference-inception.safetensors"
    content = kept.read_bytes()
    without_metadata = content.replace(b"__metadata__", b"__metadatb__", 1)
    for damaged in (content[:-100], without_metadata, content.replace(b'"covariance.pool"', b'"covariance.pond"', 1)):
        assert damaged != content
        kept.write_bytes(damaged)
        with pytest.raises(TypeError, match="NoneType"):
            features.reference_features(network, "inception", reference, 32, 5, ALONE, tmp_path)


def test_two_processes_find_what_one_finds(run, reference):
    pytest.importorskip("efficientnet_lite_pytorch")
    flags = ["--reference", reference, "--draw", "11", "--batch-size", "3", "--classes", "random", "--seed"]
    evaluate(run.folder, *flags, 5)
    [alone] = [row for row in run.metrics()["evaluations"] if row["settings"]["seed"] == 5]
    kept = run.metrics()
    run.save_metrics({"evaluations": []})
    (run.folder / "reference-efficientnet.safetensors").unlink()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pixnerd"]
    command = [*torchrun, "evaluate", str(run.folder), *flags, "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [together] = run.metrics()["evaluations"]
    assert together["settings"] == alone["settings"]
    assert together["scores"] == pytest.approx(alone["scores"], rel=1e-4, abs=1e-6)
    run.save_metrics(kept)


def test_evaluate_refuses_what_it_cannot_measure(run, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *map(str, arguments)])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "has no samples.npz: run `pixnerd sample" in refused(run.folder)
    assert "holds no run: name the real images with --reference" in refused(tmp_path)
    for weights in (find_model(run.folder).settled().pinned, next(run.checkpoints.glob("*/ema.safetensors"))):
        assert f"{weights} is a trained model: say with --draw how many images" in refused(weights)
    assert "draw is -1" in refused(run.folder, "--draw", -1)
    assert "weights is 'x'; EfficientNet has its own" in refused(run.folder, "--draw", 4, "--weights", "x")
    assert "nothing.pth do not exist" in refused(
        run.folder, "--draw", 4, "--network", "inception", "--weights", "nothing.pth"
    )


def test_metrics_of_a_run_are_kept_side_by_side(tmp_path):
    run = Run(tmp_path)
    run.save_metrics({"images": 3})
    run.save_evaluation({"interval": (0.1, 1.0)}, {"FID": 2.0})
    run.save_evaluation({"interval": None}, {"FID": 3.0})
    run.save_evaluation({"interval": (0.1, 1.0)}, {"FID": 1.0})
    assert run.evaluation({"interval": (0.1, 1.0)}) == {"FID": 1.0}
    assert run.evaluation({"interval": (0.2, 1.0)}) is None
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["images"] == 3
    assert len(written["evaluations"]) == 2
