"""Kept paths: that a step's intervals lie on the teacher's paths, whoever followed these, and whenever."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pixnerd import InputError
from pixnerd.checkpoints import save_model
from pixnerd.conditions import Captions, Labels
from pixnerd.config import STUDENT_SAMPLING, SamplingConfig, TrainConfig
from pixnerd.data import Synthetic
from pixnerd.distributed import ALONE, World
from pixnerd.files import WriteError
from pixnerd.model import PixNerd
from pixnerd.model_source import find_model, student_config
from pixnerd.sampling import trajectory
from pixnerd.training import paths as module
from pixnerd.training import train
from pixnerd.training.batches import SHORTCUTS, shuffled
from pixnerd.training.distillation import ShortcutLoss, Teacher, path_passes
from pixnerd.training.loop import StoppedEarly
from pixnerd.training.losses import Networks
from pixnerd.training.paths import PER_FILE, KeptPaths, StepIntervals, path_bytes

from ..conftest import randomised
from .test_training import MODEL, final_files

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path / "data"))
    return tmp_path / "data/paths"


def config_with(**changes):
    given = {
        "distil": "shortcut",
        "teacher": "t",
        "teacher_content": "abc",
        "teacher_guidance": 2.0,
        "teacher_interval": (0.1, 0.6),
        "teacher_last": 0.7,
        "data": "synthetic",
        "model": MODEL,
        "paths": 2 * PER_FILE,
        "batch_size": 32,
        "steps": 50,
        "sampling": STUDENT_SAMPLING,
    }
    return TrainConfig(**(given | changes))


def kept_paths(config, world=ALONE):
    dataset = Synthetic(16)
    conditions = Labels(dataset.num_classes)
    teacher = Teacher(randomised(PixNerd(MODEL, dataset.num_classes)), config, conditions.nothing)
    return KeptPaths(config, world, dataset, conditions, teacher)


def complete_paths(config):
    """Kept paths with all their files, and the teacher, which they then no longer have."""
    kept = kept_paths(config)
    teacher = kept.teacher
    kept.complete(compiled=False)
    assert kept.teacher is None
    return kept, teacher


def test_files_are_as_large_as_the_plan_says():
    kept, _ = complete_paths(config_with())
    assert kept.file(0).stat().st_size == pytest.approx(PER_FILE * path_bytes(MODEL), rel=0.02)  # and the header


def world_of(rank, size, listed=()):
    """A process's place among others that are not there to wait for; `listed`: what the leading one would send."""

    class Place(World):
        def any(self, flag):
            return flag

        def from_leader(self, value):
            return listed if value is None else value

    return Place(rank, size, CPU)


# --- the teacher's path ----------------------------------------------------------------------------------------------


def test_a_path_is_straight_from_the_teachers_last_step_on():
    config = config_with()  # 0.7 is nearest to 11/16
    model = randomised(PixNerd(MODEL, 10))
    noise, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 4])
    path = Teacher(model, config, torch.tensor(10)).path(noise, labels, None)
    even = SamplingConfig(16, guidance=2.0, interval=(0.1, 0.6))
    states = list(trajectory(model, labels, even, noise=noise))
    assert len(path) == 17
    assert path[0].equal(noise)
    for step in range(1, 12):
        torch.testing.assert_close(path[step], states[step - 1].x)
    v = model(path[11], torch.full((2,), 11 / 16), labels)  # unguided there
    for step in range(12, 17):
        torch.testing.assert_close(path[step], path[11] + (step - 11) / 16 * v, atol=1e-5, rtol=1e-4)
    whole = Teacher(model, config_with(teacher_last=1.0), torch.tensor(10)).path(noise, labels, None)
    torch.testing.assert_close(whole[-1], states[-1].x)


def test_the_passes_of_a_path_are_counted_as_they_happen():
    images = []
    model = randomised(PixNerd(MODEL, 10))
    model.register_forward_pre_hook(lambda module, inputs: images.append(len(inputs[0])))
    for changes in ({}, {"teacher_last": 1.0}, {"teacher_interval": None}, {"teacher_guidance": 1.0}):
        config = config_with(**changes)
        Teacher(model, config, torch.tensor(10)).path(torch.randn(1, 3, 16, 16), torch.tensor([3]), None)
        assert path_passes(config) == sum(images), changes
        images.clear()
    assert path_passes(config_with()) == 12 + 8  # of the steps from 0 to 11/16, those from 2/16 to 9/16 are guided


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_every_interval_of_a_step_lies_on_a_path_of_its_own():
    config = config_with()
    kept, teacher = complete_paths(config)
    batches = [batch for batch, _ in zip(kept.batches(0), range(3), strict=False)]
    order = shuffled(len(kept.dataset), config.seed, 0)
    for batch in batches:
        assert torch.stack((batch.t, batch.r), 1).equal(torch.tensor(SHORTCUTS).float().repeat(2, 1))
        assert len(batch.indices.unique()) > 24  # of 32 draws from 128
        assert batch.condition.equal(kept.dataset.labels[order[batch.indices]])
    batch = batches[0]
    for file in range(2):
        x = load_file(kept.file(file))["x"].float()
        assert x.shape == (PER_FILE, 9, 3, 16, 16)
        again = teacher.path(x[:, 0], load_file(kept.file(file))["condition"], None)[::2].transpose(0, 1)
        torch.testing.assert_close(x, again, atol=2e-2, rtol=0)  # the noise was rounded to float16 as well
        for place, number in enumerate(batch.indices.tolist()):
            if number // PER_FILE == file:
                t, r = (round(8 * time) for time in SHORTCUTS[place % 16])
                assert batch.noise[place].equal(x[number % PER_FILE, t])
                assert batch.image[place].equal(x[number % PER_FILE, r])
    numbers = torch.cat([batch.indices for batch in batches])
    assert (numbers < PER_FILE).any()
    assert (numbers >= PER_FILE).any()
    noise = torch.cat([load_file(kept.file(file))["x"][:, 0] for file in range(2)]).float()
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02
    assert len({row.sum().item() for row in noise}) == len(noise)


def test_files_and_batches_are_the_same_for_any_number_of_processes(cache):
    config = config_with(paths=3 * PER_FILE)
    alone = kept_paths(config)
    alone.complete(compiled=False)
    expected, batch = [alone.file(number).read_bytes() for number in range(3)], next(alone.batches(7))
    shutil.rmtree(cache)
    shares = [kept_paths(config, world_of(rank, 2, [0, 1, 2])) for rank in range(2)]  # as it was when both began
    shares[0].complete(compiled=False)
    assert [shares[0].file(number).exists() for number in range(3)] == [True, False, True]
    shares[1].complete(compiled=False)
    assert [alone.file(number).read_bytes() for number in range(3)] == expected
    halves = [next(share.batches(7)) for share in shares]
    for whole, *parts in zip(batch, *halves, strict=True):
        assert torch.cat(parts).equal(whole)


def test_only_what_is_missing_is_followed(monkeypatch):
    kept = kept_paths(config_with())
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_tensors", fail_at_second(module.save_tensors))
        with pytest.raises(WriteError, match="No space left"):
            kept.complete(compiled=False)
    assert [kept.file(number).exists() for number in range(2)] == [True, False]
    first = kept.file(0).stat().st_mtime_ns
    followed = []
    follow = kept._follow
    monkeypatch.setattr(kept, "_follow", lambda numbers: followed.append(numbers) or follow(numbers))
    kept.complete(compiled=False)
    assert followed == [range(PER_FILE, 2 * PER_FILE)]
    assert kept.file(0).stat().st_mtime_ns == first
    kept_paths(config_with()).complete(compiled=False)  # a second student finds them
    assert len(followed) == 1
    assert {path.name for path in kept.folder.iterdir()} == {"about.json", "00000.safetensors", "00001.safetensors"}


def fail_at_second(save):
    calls = iter(range(9))

    def saving(*arguments):
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        save(*arguments)

    return saving


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_content": "other"},
        {"teacher_guidance": 3.0},
        {"teacher_interval": None},
        {"teacher_last": 1.0},
        {"seed": 1},
    ],
    ids=str,
)
def test_paths_of_other_settings_are_others(changes):
    mine, other = kept_paths(config_with()), kept_paths(config_with(**changes))
    assert mine.folder != other.folder
    assert mine.folder == kept_paths(config_with(steps=7, learning_rate=1.0, paths=5 * PER_FILE)).folder
    assert json.loads((mine.folder / "about.json").read_text())["teacher"] == "abc"


def test_what_cannot_be_kept_is_refused_at_once(monkeypatch):
    with pytest.raises(InputError, match="paths is 100; 64 are kept in a file, so it has to be a multiple of it"):
        kept_paths(config_with(paths=100))
    usage = type("Usage", (), {"free": 2**20})
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(InputError, match=r"paths is 6400, for which .* needs 0.1 GiB, but it has 0.0 GiB free"):
            kept_paths(config_with(paths=100 * PER_FILE))
    with pytest.raises(InputError, match="paths is 64; it belongs to distil=shortcut, not to meanflow"):
        config_with(paths=64, distil="meanflow")
    with pytest.raises(InputError, match="paths are kept of one size and decode_sizes asks for several"):
        config_with(decode_sizes=(16, 32))
    kept = kept_paths(config_with())
    kept.complete(compiled=False)
    kept.file(1).write_bytes(b"\0" * 100)
    assert isinstance(StepIntervals(kept, range(32))[0], InputError)  # a worker's would come with its traceback
    with pytest.raises(InputError, match=r"00001.safetensors is damaged, and the same command follows its paths again"):
        list(kept.batches(0))
    again = kept_paths(config_with())
    assert again.complete(compiled=False)
    assert len(load_file(again.file(1))["x"]) == PER_FILE


def test_paths_of_images_with_other_labels_or_captions_are_followed_again():
    config = config_with()
    kept = kept_paths(config)
    assert kept.complete(compiled=False)
    before = load_file(kept.file(1))["condition"]
    changed = kept_paths(config)
    assert changed.folder == kept.folder
    changed.dataset.labels = (changed.dataset.labels + 1) % 10
    assert changed._missing() == [0, 1]
    assert changed.complete(compiled=False)
    assert load_file(kept.file(1))["condition"].equal((before + 1) % 10)
    assert kept._missing() == [0, 1]
    told = Captions(OneToken(), [(f"image {i}",) for i in range(len(kept.dataset))])
    teacher = Teacher(randomised(PixNerd(MODEL, 10)), config, torch.tensor(10))
    captioned = KeptPaths(config, ALONE, Synthetic(16), told, teacher)
    assert captioned.folder != kept.folder
    captioned.dataset.captions = told.captions
    first = captioned._images(range(PER_FILE))
    captioned.dataset.captions = [("another",), *told.captions[1:]]
    assert (captioned._images(range(PER_FILE)) != first) == (0 in shuffled(len(told.captions), 0, 0)[:PER_FILE])


class OneToken:
    name, content, features, length = "one", "", 2, 1

    def __call__(self, captions):
        return torch.zeros(len(captions), 1, 2)


def test_following_stops_between_files_when_it_is_asked_to(tmp_path):
    """And so does the run: no checkpoint, no lost file, its own exit code, and the same command goes on."""
    kept = kept_paths(config_with())
    asked = iter([False, True])
    assert not kept.complete(compiled=False, stop_asked=lambda: next(asked))
    assert [kept.file(number).exists() for number in range(2)] == [True, False]
    assert kept.teacher is not None
    list(train(TrainConfig(out=str(tmp_path / "teacher"), data="synthetic", model=MODEL, steps=1, batch_size=2), CPU))
    config = student_config(str(tmp_path / "teacher"), out=str(tmp_path / "student"), paths=PER_FILE, steps=2)
    with pytest.raises(StoppedEarly, match="^0$"):
        next(train(config, CPU, stop_asked=lambda: True))
    assert [record.step for record in train(config, CPU)] == [1, 2]


# --- the loss and the run --------------------------------------------------------------------------------------------


def test_the_loss_of_kept_intervals_is_that_of_the_same_intervals_followed_anew():
    config = config_with()
    kept, teacher = complete_paths(config)
    batch = next(kept.batches(0))
    student = randomised(PixNerd(dataclasses.replace(MODEL, student=True), 10), 1)
    found = ShortcutLoss(config, None)(Networks(student, student), batch, None)
    for place in (0, 1, 5, 15, 20):
        path, (t, r) = int(batch.indices[place]), SHORTCUTS[place % 16]
        stored = load_file(kept.file(path // PER_FILE))
        noise, condition = stored["x"][path % PER_FILE, :1].float(), stored["condition"][path % PER_FILE][None]
        points = teacher.path(noise, condition, None)
        x, u = points[round(16 * t)], (points[round(16 * r)] - points[round(16 * t)]) / (r - t)
        error = (student(x, torch.tensor([t]).float(), condition, r=torch.tensor([r]).float()) - u).square().mean()
        assert found.per_image[place].item() == pytest.approx((r - t) * error.item(), rel=2e-2)


def test_a_run_with_kept_paths_repeats_resumes_and_takes_its_teachers_last_step(tmp_path, cache):
    save_model(randomised(PixNerd(MODEL, 10)), tmp_path / "teacher.safetensors")
    teacher = str(tmp_path / "teacher.safetensors")

    def config(name, **changes):
        given = {"data": "synthetic", "model": MODEL, "teacher_guidance": 1.0, "paths": PER_FILE, "steps": 12}
        return student_config(teacher, None, out=str(tmp_path / name), checkpoint_every=5, **(given | changes))

    expected = [float(record.loss) for record in train(config("straight"), CPU)]
    losses = []
    for stop in (7, None):
        for record in train(config("resumed"), CPU):
            losses.append(float(record.loss))
            if record.step == stop:
                break
    assert losses == expected
    assert final_files(tmp_path / "resumed") == final_files(tmp_path / "straight")
    assert len(list(cache.iterdir())) == 1  # one folder for both
    own = find_model(teacher).sampling
    assert config("x").teacher_last == pytest.approx((own.steps - 1) / own.steps)
    for changes in ({"distil": "fd"}, {"decode_sizes": (16, 32)}):  # for which none can be kept
        assert student_config(teacher, None, data="synthetic", model=MODEL, **changes).paths == 0
    learned = [float(record.loss) for record in train(config("learns", steps=80, learning_rate=1e-2), CPU)]
    assert sum(learned[-10:]) < 0.7 * sum(learned[:10])
