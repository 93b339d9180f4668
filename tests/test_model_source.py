"""One name opens a model, wherever its weights lie; results belong to the weights."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pixnerd import InputError, data, load, load_released, model_source, released
from pixnerd.checkpoints import save_model
from pixnerd.cli import main, parse
from pixnerd.config import EvaluationConfig, SamplingConfig
from pixnerd.evaluation import row_settings
from pixnerd.explore.demo import open_run
from pixnerd.metrics.images import content_of, open_images
from pixnerd.model_source import each_checkpoint, find_model
from pixnerd.recipes import TEXT_256
from pixnerd.runs import Run
from pixnerd.training import train

from .training.test_training import CPU, config_for

GOLDEN = Path(__file__).with_name("golden")
HUB = "MCG-NJU/PixNerd-XL-P16-C2I"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps that keeps every second checkpoint besides the newest."""
    folder = tmp_path_factory.mktemp("named") / "run"
    config = config_for(folder, steps=6, checkpoint_every=1, keep_checkpoints=1, keep_every=2)
    list(train(dataclasses.replace(config, sampling=SamplingConfig(steps=2, guidance=1.0)), CPU))
    return folder


def test_every_so_many_checkpoints_are_kept_besides_the_newest(run, tmp_path):
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-2", "step-4", "step-6"]
    list(train(config_for(tmp_path / "run", steps=5, checkpoint_every=1, keep_checkpoints=2, keep_every=3), CPU))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-3", "step-4", "step-5"]


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))


def test_names_of_one_checkpoint_open_the_same_weights(run):
    checkpoint = run / "checkpoints" / "step-4"
    names = [f"{run}@4", f"{run}@step-4", checkpoint, checkpoint / "ema.safetensors"]
    sources = [find_model(name) for name in names]
    assert all(same(source.load(), load(checkpoint)) for source in sources)
    assert len({source.content() for source in sources}) == 1
    assert all(source.run.folder.samefile(run) and source.sampling.steps == 2 for source in sources)
    assert same(load(run), load(f"{run}@6"))
    assert not same(load(run), load(f"{run}@4"))
    assert find_model(f"{run}@4").content() != find_model(run).content()
    assert find_model(run).settled().label == "step-6"


def test_several_checkpoints_have_one_name(run):
    assert each_checkpoint(f"{run}@all") == [f"{run}@{step}" for step in (2, 4, 6)]
    assert each_checkpoint(f"{run}@6,2") == [f"{run}@6", f"{run}@2"]
    assert each_checkpoint(str(run)) == [str(run)]
    with pytest.raises(InputError, match="has no checkpoint @3; it has 2, 4, 6"):
        each_checkpoint(f"{run}@2,3")


def test_released_weights_come_with_the_published_sampling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, sampling in (("class_p4", SamplingConfig()), ("text_p4", TEXT_256.sampling)):
        file = tmp_path / f"{kind}.ckpt"
        shutil.copy(GOLDEN / file.name, file)
        model = load(file)
        assert same(model, load_released(file))
        save_model(model, tmp_path / f"{kind}.safetensors")
        for name in (file, tmp_path / f"{kind}.safetensors"):
            source = find_model(name)
            assert (source.sampling, source.run) == (sampling, None)
            assert source.config(model).model == model.config
            assert source.results.folder == Path("runs") / kind
            assert same(source.load(), model)
    assert find_model(HUB).sampling == SamplingConfig(100, "euler", 3.5, (0.1, 1.0), 1.0)
    text = find_model("MCG-NJU/PixNerd-XXL-P16-T2I/model.ckpt").sampling
    assert text == SamplingConfig(25, "adams2", 4.0, (0.0, 1.0), 3.0)
    assert parse(["sample", HUB]).sampling == SamplingConfig()
    assert parse(["sample", "MCG-NJU/PixNerd-XXL-P16-T2I", "--steps", "9"]).sampling == dataclasses.replace(
        text, steps=9
    )
    assert open_run(tmp_path / "class_p4.ckpt").conditions.num_classes == 10


def test_the_hub_is_asked_for_the_published_file(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *names: asked.append(names) or GOLDEN / "class_p4.ckpt"
    )
    assert load(HUB).num_classes == 10
    find_model(f"{HUB}/other.ckpt").load()
    assert asked == [(HUB, "epoch=319-step=1600000_emainit.ckpt"), (HUB, "other.ckpt")]


def test_the_size_of_the_512_pixel_weights_is_read_off_their_name(tmp_path):
    name = "res512_ft200k_epoch=325-step=1800000_emainit.ckpt"
    shutil.copy(GOLDEN / "class_p4.ckpt", tmp_path / name)
    assert load(tmp_path / name).config.image_size == 2 * load(GOLDEN / "class_p4.ckpt").config.image_size


def test_what_is_no_model_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="gone does not exist and holds no run; a run's folder, RUN@STEP"):
        find_model(tmp_path / "gone")
    with pytest.raises(InputError, match="holds one set of weights"):
        find_model(GOLDEN / "class_p4.ckpt").load("ema-0.5")
    with pytest.raises(InputError, match="has no checkpoint @5"):
        find_model(f"{run}@5")


@pytest.mark.parametrize("name", ["x" * 300, "\0", "loop", "loop/run"])
def test_a_name_that_no_file_can_have_is_one_sentence(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    doors = [find_model, load, load_released, Run, open_images, content_of]
    for kind in ("folder", "imagenet", "prepared", "captions", "shards"):
        doors.append(lambda name, kind=kind: data.load(f"{kind}:{name}", 16))
    for door in doors:
        with pytest.raises(InputError, match=r"cannot be opened: (File name too long|embedded null|Too many levels)"):
            door(name)
    with pytest.raises(InputError, match="cannot be opened: File name too long"):
        find_model(f"{run}@{'9' * 300}")


def test_the_same_weights_are_measured_once_under_any_name(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=images)
    flags = ["--reference", "real.npz", "--draw", "6", "--steps", "1"]
    main(["evaluate", f"{run}@2,4", *flags])
    said = capsys.readouterr().out
    assert f"{run}@2: 6 images against" in said
    assert f"{run}@4: 6 images against" in said
    rows = Run(run).metrics()["evaluations"]
    assert [row["settings"]["checkpoint"] for row in rows] == ["step-2", "step-4"]
    monkeypatch.setattr("pixnerd.frozen.load", None)  # now there must be nothing to measure
    main(["evaluate", str(run / "checkpoints" / "step-4" / "ema.safetensors"), *flags])
    assert Run(run).metrics()["evaluations"] == rows
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    shutil.copy(GOLDEN / "class_p4.ckpt", "mine.ckpt")
    main(["evaluate", "mine.ckpt", *flags])
    [row] = Run("runs/mine").metrics()["evaluations"]
    assert (row["settings"]["checkpoint"], row["settings"]["sampling"]["guidance"]) == ("mine.ckpt", 3.5)


def test_rows_tell_weights_and_references_apart(run, tmp_path):
    file = tmp_path / "real.npz"
    np.savez(file, arr_0=np.zeros((4, 8, 8, 3), np.uint8))

    def settings(**changes):
        return row_settings(EvaluationConfig(**{"source": str(run), "reference": str(file), "draw": 4, **changes}))

    kept = Run(tmp_path / "rows")
    kept.folder.mkdir()
    first = settings()
    kept.save_evaluation(first, {"FID": 1.0})
    assert kept.evaluation(settings(source=f"{run}@6")) == {"FID": 1.0}
    for other in ({"source": f"{run}@4"}, {"weights": "elsewhere"}, {"average": "model"}, {"draw": 5}):
        assert kept.evaluation(settings(**other)) is None
    np.savez(file, arr_0=np.ones((4, 8, 8, 3), np.uint8))
    assert kept.evaluation(settings()) is None
    old = {
        name: value for name, value in first.items() if name not in ("weights", "model_content", "reference_content")
    }
    kept.save_metrics({"evaluations": [{"settings": old, "scores": {"FID": 2.0}}]})
    assert kept.evaluation(settings()) == {"FID": 2.0}  # of an earlier version, which did not note contents
    assert kept.evaluation(settings(source=f"{run}@4")) is None


def test_the_defaults_of_flags_need_no_torch():
    assert "torch" not in vars(model_source)
    assert released.reads_text(GOLDEN / "text_p4.ckpt")
    assert not released.reads_text(GOLDEN / "class_p4.ckpt")
