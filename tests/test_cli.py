import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixnerd import InputError, data, load
from pixnerd.cli import main, parse
from pixnerd.config import SamplingConfig
from pixnerd.recipes import RECIPES
from pixnerd.runs import Run

ROOT = Path(__file__).parents[1]
TINY = ["--data", "synthetic", "--size", "nano/8", "--model.image-size", "16", "--batch-size", "4", "--log-every", "2"]


def run(*arguments):
    """Exit code of a command, 0 when it returns."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert run("train", "--out", folder, *TINY, "--steps", 4, "--sampling.steps", 2) == 0
    return folder


def test_train_then_sample(trained, tmp_path, capsys):
    assert (trained / "checkpoints" / "step-4" / "ema.safetensors").is_file()
    assert run("sample", trained, "--count", 12, "--labels", 7, 2, "--batch-size", 5, "--out", tmp_path) == 0
    assert str(tmp_path / "samples.png") in capsys.readouterr().out
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (12, 16, 16, 3)
        assert file["labels"].tolist() == [7] * 6 + [2] * 6
        whole = file["arr_0"]
    assert run("sample", trained, "--count", 12, "--labels", 7, 2, "--batch-size", 12, "--out", tmp_path) == 0
    for count, labels in ((12, [0, 0, 1, 1, *range(2, 10)]), (4, [0, 1, 2, 3])):  # ten classes
        assert run("sample", trained, "--count", count, "--out", tmp_path / "all") == 0
        with np.load(tmp_path / "all" / "samples.npz") as file:
            assert file["labels"].tolist() == labels
    with np.load(tmp_path / "samples.npz") as file:
        assert np.abs(file["arr_0"].astype(int) - whole).max() <= 1


def test_a_student_of_a_run_and_a_weaker_guide(trained, tmp_path, capsys):
    """From its teacher to measured samples: data, network and guidance are the teacher's, the rest the recipe's."""
    student, flags = tmp_path / "student", ["--batch-size", 16, "--steps", 2, "--compile", "off"]
    assert run("train", "--distil", "shortcut", "--teacher", trained, "--out", student, *flags) == 0
    config = Run(student).config()
    assert (config.data, config.distil, config.teacher) == ("synthetic", "shortcut", f"{trained}@4")
    assert (config.teacher_guidance, config.teacher_interval) == (3.5, (0.1, 1.0))
    assert config.model == dataclasses.replace(Run(trained).config().model, student=True)
    assert config.learning_rate == RECIPES["student-cpu"].learning_rate
    assert run("sample", student, "--count", 4, "--steps", 1) == 0
    assert run("sample", student, "--count", 4, "--solver", "euler") == 2
    assert "solver is 'euler'; this model is a few-step student" in capsys.readouterr().err
    assert run("sample", trained, "--count", 4, "--solver", "map", "--guidance", 1) == 2
    assert "this model is none" in capsys.readouterr().err
    assert run("train", "--distil", "shortcut", "--teacher", student, "--out", tmp_path / "second", *flags) == 2
    assert "is a few-step student" in capsys.readouterr().err
    assert run("train", "--distil", "shortcut", "--out", tmp_path / "second", *flags) == 2
    assert "teacher is empty; a student needs both" in capsys.readouterr().err
    assert run("sample", trained, "--count", 4, "--guide", f"{trained}@4", "--out", tmp_path / "guided") == 0
    assert run("sample", trained, "--count", 4, "--guide", tmp_path / "nowhere") == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_an_average_of_any_length_is_made_after_training(tmp_path, capsys):
    flags = ["--out", tmp_path / "run", *TINY, "--steps", 8, "--checkpoint-every", 2, "--keep-every", 2]
    assert run("train", *flags, "--power-averages", 0.05, 0.2, "--learning-rate", 0.01) == 0
    assert run("average", tmp_path / "run", "--width", 0.1) == 0
    assert "--average power-0.1" in capsys.readouterr().out
    found, short, long = (load(tmp_path / "run", weights=f"power-{w}").head.out.weight for w in (0.1, 0.05, 0.2))
    assert (found - short).abs().max() > 0
    assert (found - long).abs().max() < (short - long).abs().max()
    assert run("average", f"{tmp_path / 'run'}@4", "--width", 0.5) == 2
    assert "average's width is 0.5; it has to lie above 0" in capsys.readouterr().err
    assert run("average", tmp_path / "run" / "checkpoints" / "step-8" / "ema.safetensors", "--width", 0.1) == 2


def test_samples_land_in_the_run_and_are_measured(tmp_path, capsys):
    size = ["--model.image-size", "32", "--steps", 1, "--sampling.steps", 1]
    assert run("train", "--out", tmp_path / "run", *TINY, *size, "--data", "digits") == 0
    assert run("sample", tmp_path / "run", "--count", 10) == 0
    real = data.load("digits", 32).batch(range(0, 5000, 200))[0].expand(-1, 3, -1, -1)
    np.savez(tmp_path / "real.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    assert run("evaluate", tmp_path / "run", "--reference", tmp_path / "real.npz") == 0
    said = capsys.readouterr().out
    assert "of 10 samples" in said
    assert "10 images against" in said
    assert '"images": 10' in (tmp_path / "run" / "metrics.json").read_text()


def test_the_published_recipe_asks_for_its_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", "--out", tmp_path / "run") == 2
    assert f"folder {tmp_path}/data/imagenet/train does not exist" in capsys.readouterr().err


def test_text_runs_take_prompts_and_class_runs_labels(trained, tmp_path, capsys, monkeypatch, tiny_folder):
    assert run("sample", trained, "--prompts", "a cat") == 2
    assert "has a class-conditional model: it takes --labels" in capsys.readouterr().err

    def captioned(name, image_size):
        gratings = original(name, image_size)
        gratings.captions = [("a red cat",)] * len(gratings)
        return gratings

    original = data.load
    monkeypatch.setattr(data, "load", captioned)
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path / "data"))
    text = ["--size", "text-nano/8", "--model.text-features", 12, "--text-encoder", tiny_folder, "--steps", 1]
    flags = ["--sampling.steps", 2, "--sampling.guidance", 2]
    assert run("train", "--out", tmp_path / "run", *TINY, *text, *flags) == 0
    assert run("sample", tmp_path / "run") == 2
    assert "has a text model: it takes --prompts" in capsys.readouterr().err
    assert run("sample", tmp_path / "run", "--prompts", "a red cat", "a dog", "--count", 4) == 0
    with np.load(tmp_path / "run" / "samples.npz") as file:
        assert file["arr_0"].shape == (4, 16, 16, 3)
        assert file["labels"].tolist() == [0, 0, 1, 1]


def test_size_then_overrides(tmp_path):
    assert run("train", "--out", tmp_path / "r", *TINY, "--steps", 1, "--model.head", "linear", "--clip", "None") == 0
    config = (tmp_path / "r" / "config.json").read_text()
    assert '"head": "linear"' in config
    assert '"width": 64' in config


def test_data_shows_a_contact_sheet(tmp_path, capsys):
    assert run("data", "digits", "--show", "--out", tmp_path / "sheet.png") == 0
    out = capsys.readouterr().out
    assert "5000 images of 1x32x32" in out
    assert "  7: 500" in out
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def folder_with_text_image(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "text.png").write_text("I am a text")
    return tmp_path / "images"


BAD_TRAINING = {
    "image size": (["--model.image-size", "20"], "image size 20x20 does not fit patches of 8"),
    "steps": (["--steps", "0"], "steps is 0"),
    "data": (
        ["--data", "minst"],
        "data set 'minst' is unknown; known: digits, cifar10, cifar10:test, emoji, emoji:WORDS, synthetic",
    ),
    "size": (["--size", "Q/16"], "model size 'Q/16' is unknown; known sizes: nano/8"),
    "recipe": (["--recipe", "magic"], "recipe 'magic' is unknown; known recipes: imagenet-256"),
    "solver": (["--sampling.solver", "dopri5"], "solver 'dopri5' is unknown; known solvers: euler"),
    "interval": (["--sampling.interval", "0.9", "0.1"], "interval is (0.9, 0.1)"),
    "missing folder": (["--data", "folder:/nowhere"], "folder /nowhere does not exist"),
}


@pytest.mark.parametrize(("flags", "sentence"), BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_training_input(tmp_path, capsys, flags, sentence):
    assert run("train", "--out", tmp_path / "run", *TINY, *flags) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("pixnerd: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--recipe", "--teacher"])
def test_a_flag_without_its_value_is_no_traceback(capsys, flag):
    assert run("train", "--steps", 3, flag) == 2
    said = capsys.readouterr().err
    assert flag in said
    assert "Traceback" not in said


def test_a_text_named_png(tmp_path, capsys):
    images = folder_with_text_image(tmp_path)
    assert run("train", "--out", tmp_path / "run", *TINY, "--data", f"folder:{images}") == 2
    assert "text.png is not an image" in capsys.readouterr().err


def test_another_run_in_the_folder(trained, capsys):
    assert run("train", "--out", trained, *TINY, "--steps", 4, "--seed", 3) == 2  # sampling.steps differs, too: it may
    assert "already holds another run (seed 0 there, 3 asked for)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--labels", "11"], "label 11 is outside 0 … 10"),
        (["--steps", "0"], "steps is 0"),
        (["--interval", "0.5", "0.5"], "interval is (0.5, 0.5)"),
        (["--solver", "rk4"], "solver 'rk4' is unknown"),
        (["--count", "0"], "count is 0; it has to be at least 1"),
        (["--seed", "-1"], "seed is -1; it cannot be negative"),
        (["--labels", "-1"], "label -1 is outside 0 … 10"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--image-size", "0", "16"], "image_size is (0, 16); it has to be at least 1"),
        (["--guidance", "nan"], "guidance is nan; it has to be a finite number"),
        (["--shift", "inf"], "shift is inf; it has to be a finite number"),
    ],
)
def test_bad_sampling_input(trained, capsys, flags, sentence):
    assert run("sample", trained, *flags) == 2
    assert sentence in capsys.readouterr().err


def test_truncated_checkpoint(tmp_path, capsys):
    assert run("train", "--out", tmp_path / "run", *TINY, "--steps", 1) == 0
    path = tmp_path / "run/checkpoints/step-1/ema.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert run("sample", tmp_path / "run") == 2
    assert "ema.safetensors is damaged" in capsys.readouterr().err


def test_nothing_there(tmp_path, capsys):
    assert run("sample", tmp_path / "gone") == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "convert", "data", "prepare", "sweep"])
def test_every_command_explains_itself(command, capsys):
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    assert "usage: pixnerd" in out
    assert len(out) > 300


def test_as_a_module_without_traceback(tmp_path):
    command = [sys.executable, "-m", "pixnerd", "train", "--data", "minst", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert done.stderr.strip().startswith("pixnerd: data set 'minst' is unknown")


def test_a_reader_that_has_seen_enough_is_no_error():
    """As in `pixnerd … | head`, with a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    study = ROOT / "notebooks/studies/noise.yaml"
    command = [sys.executable, "-m", "pixnerd", "sweep", str(study), "--list"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_class_whose_name_is_no_text_can_be_looked_at(tmp_path, capsys):
    folder = tmp_path / "pictures" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    assert run("data", f"folder:{tmp_path / 'pictures'}", "--image-size", 16) == 0
    assert "caf\\udce9" in capsys.readouterr().out


def test_a_teacher_that_another_model_guides_is_taught_without_it(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "guided")
    config = Run(tmp_path / "guided").config()
    sampling = dataclasses.replace(config.sampling, guide="runs/weaker")
    changed = json.dumps(dataclasses.replace(config, sampling=sampling).to_dict())
    (tmp_path / "guided" / "config.json").write_text(changed)
    with pytest.warns(UserWarning, match="is guided by runs/weaker, which cannot be taught"):
        found = parse(["train", "--teacher", str(tmp_path / "guided")]).config
    assert (found.teacher_guidance, found.teacher_interval) == (1.0, None)
    with warnings.catch_warnings(action="error"):
        found = parse(["train", "--teacher", str(tmp_path / "guided"), "--teacher-guidance", "2"]).config
    assert (found.teacher_guidance, found.teacher_interval) == (2.0, None)


def test_none_and_flags_after_the_runs_own_settings(trained, tmp_path):
    """`--interval None` guides every step; flags that are not given are the run's: its 2 steps, not 100."""
    found = parse(["sample", str(trained), "--interval", "None"])
    assert found.sampling == SamplingConfig(steps=2, interval=None)
    assert parse(["evaluate", str(trained), "--guidance", "2"]).sampling == SamplingConfig(steps=2, guidance=2.0)


def test_a_checkpoint_with_a_foreign_object_is_named_and_not_loaded(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": argparse.Namespace(x=1)}, tmp_path / "m.ckpt")
    assert run("convert", tmp_path / "m.ckpt", tmp_path / "m.safetensors") == 2
    error = capsys.readouterr().err
    assert "m.ckpt is damaged or not a checkpoint: it holds an object of class argparse.Namespace, and only" in error
    assert error.count("\n") == 1


# --- the commands that the texts name --------------------------------------------------------------------------------


def texts():
    """README, the pages and the Markdown of the notebooks, by name."""
    for path in [ROOT / "README.md", ROOT / "data/README.md", *sorted((ROOT / "notebooks").glob("*.md"))]:
        yield path.name, path.read_text()
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        yield path.name, "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def commands(text):
    """The words of each `pixnerd …` in a text's blocks of code, alone or under torchrun, unless some are left out."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\||;", line.partition(" # ")[0]):
                found = re.search(r"(?:^\s*(?:\.venv/bin/)?|-m )pixnerd (.*)", part)
                if found and "…" not in found[1]:
                    yield shlex.split(found[1])


def refusal(words):
    """Why a command cannot be read, if it is not because a run is missing."""
    try:
        parse(words)
    except InputError as error:
        return "" if "does not exist and holds no run" in str(error) else str(error)
    except SystemExit:
        return "its flags are wrong"


def test_every_command_in_the_texts_can_be_read():
    """Runs that only a reader has may be missing."""
    named = [(name, words) for name, text in texts() for words in commands(text)]
    assert len(named) > 60
    refused = {name: (words, found) for name, words in named if (found := refusal(words))}
    assert not refused


def test_a_command_with_an_unknown_flag_would_be_found(capsys):
    text = "```\n.venv/bin/pixnerd sample runs/x --sampling.steps 1  # a sample\npixnerd train …\n```\n`pixnerd plan`"
    (words,) = commands(text)
    assert words == ["sample", "runs/x", "--sampling.steps", "1"]
    assert refusal(words) == "its flags are wrong"
