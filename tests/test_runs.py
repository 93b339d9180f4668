import errno
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pixnerd import SIZES, InputError
from pixnerd.config import SamplingConfig, TrainConfig
from pixnerd.errors import WriteError
from pixnerd.model_config import TEXT_SIZES
from pixnerd.runs import Run


def test_samples_are_written_as_uint8_nhwc_with_labels(tmp_path):
    images = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    run = Run(tmp_path)
    run.save_samples(images, torch.tensor([3, 1, 0, 2]), columns=2)
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_0"].shape == (4, 8, 8, 3)
    pixels, labels = run.load_samples()
    assert pixels.shape == (4, 3, 8, 8)
    assert pixels[:, 0, 0, 0].tolist() == [0, 128, 255, 255]
    assert labels.tolist() == [3, 1, 0, 2]
    grid = np.array(Image.open(tmp_path / "samples.png"))
    assert grid.shape == (2 * 10 + 2, 2 * 10 + 2, 3)
    assert grid[4, 14].tolist() == [128] * 3
    assert grid[14, 4].tolist() == [255] * 3


def test_grey_samples_become_three_equal_channels(tmp_path):
    run = Run(tmp_path)
    run.save_samples(torch.rand(2, 1, 4, 4) * 2 - 1, torch.tensor([0, 1]), columns=2)
    pixels, _ = run.load_samples()
    assert pixels.shape == (2, 3, 4, 4)
    assert (pixels[:, :1] == pixels).all()


def test_log_is_cut_at_a_step_and_a_half_line_is_left_out(tmp_path):
    run = Run(tmp_path)
    for step in (10, 20, 30):
        run.log({"step": step, "loss": 1 / step})
    with run.log_path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [entry["step"] for entry in run.read_log()] == [10, 20, 30]
    run.cut_log(20)
    run.log({"step": 25})
    assert [entry["step"] for entry in run.read_log()] == [10, 20, 25]


@pytest.mark.parametrize("line", ['{"step": 20, "lo', "7", '{"loss": 1}', '{"step": "20"}', "", "[" * 100_000, "\0"])
def test_a_damaged_line_amid_the_log_is_named_and_nothing_after_it_is_dropped(tmp_path, line):
    run = Run(tmp_path)
    content = f'{{"step": 10}}\n{line}\n{{"step": 30}}\n'
    run.log_path.write_text(content)
    for read in (run.read_log, lambda: run.cut_log(30)):
        with pytest.raises(InputError, match="line 2 of .*log.jsonl is damaged: mend or remove it"):
            read()
    assert run.log_path.read_text() == content
    run.log_path.write_text(f'{{"step": 10}}\n{line or "x"}')
    assert run.read_log() == [{"step": 10}]


@pytest.mark.parametrize(
    "rows", [7, [7], [{"settings": {}}], [{"settings": [], "scores": {}}], [{"settings": {}, "scores": {"FID": "low"}}]]
)
def test_damaged_metrics_are_named_and_not_overwritten(tmp_path, rows):
    run, content = Run(tmp_path), json.dumps({"evaluations": rows})
    (tmp_path / "metrics.json").write_text(content)
    for use in (run.metrics, lambda: run.evaluation({}), lambda: run.save_metrics({"images": 1})):
        with pytest.raises(InputError, match="metrics.json is damaged"):
            use()
    assert (tmp_path / "metrics.json").read_text() == content


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"labels": np.arange(2)}, "holds no samples"),
        ({"arr_0": np.zeros((2, 4, 4, 3)), "labels": np.arange(2)}, "holds no samples"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8), "labels": np.arange(2)}, "holds no samples"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.arange(3)}, "2 whole numbers are needed"),
        ({"arr_0": np.array([Run("x")]), "labels": np.arange(3)}, "is not a readable .npz: Object arrays cannot"),
    ],
)
def test_samples_of_another_kind_are_refused(tmp_path, arrays, sentence):
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(InputError, match=sentence):
        Run(tmp_path).load_samples()


def test_damaged_samples_are_one_sentence(tmp_path):
    run = Run(tmp_path)
    run.save_samples(torch.zeros(2, 3, 8, 8), torch.arange(2), columns=2)
    content = (tmp_path / "samples.npz").read_bytes()
    for damaged in (content[:-30], b"", b"text", content.replace(b"arr_0", b"arr_9", 1), content[:60] + content[90:]):
        (tmp_path / "samples.npz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"samples.npz (is not a readable .npz|holds no samples)"):
            run.load_samples()


def test_the_same_run_resumes_and_may_become_longer(tmp_path):
    run = Run(tmp_path / "run")
    run.begin(TrainConfig(steps=5, model=SIZES["nano/8"], betas=(0.9, 0.99)))
    run.log({"step": 1})
    run.begin(TrainConfig(steps=9, model=SIZES["nano/8"], betas=(0.9, 0.99)))
    assert run.config().steps == 9
    with pytest.raises(InputError, match="model.width 64 there, 128 asked for"):
        run.begin(TrainConfig(steps=9, model=SIZES["micro/8"], betas=(0.9, 0.99)))
    assert run.config().model == SIZES["nano/8"]


@pytest.mark.parametrize("work", ["log.jsonl", "checkpoints/step-1"])
def test_until_a_step_is_kept_or_logged_a_run_can_begin_with_other_settings(tmp_path, work):
    """Its first step may have failed because of them."""
    run = Run(tmp_path / "run")
    run.begin(TrainConfig(steps=5, seed=1), ["cat", "dog"])
    second = TrainConfig(steps=3, seed=2, decay="linear")
    run.begin(run.completed(second), ["fox"])
    assert (run.config(), run.classes()) == (second, ["fox"])
    if work == "log.jsonl":
        run.log({"step": 1})
    else:
        (run.folder / work).mkdir()
    with pytest.raises(InputError, match="seed 2 there, 3 asked for"):
        run.begin(TrainConfig(steps=3, seed=3, decay="linear"), ["fox"])
    with pytest.raises(InputError, match="label 0 for 'fox', now it is 'cat'"):
        run.begin(second, ["cat"])


def test_a_run_that_could_not_begin_on_a_full_disk_begins_later(tmp_path, monkeypatch):
    """Whatever the first try left: the folder, an empty one for checkpoints, half a file of a killed process."""
    run, config = Run(tmp_path / "run"), TrainConfig(steps=5)
    with monkeypatch.context() as patched:
        patched.setattr("pixnerd.files.sync", full_disk)
        with pytest.raises(WriteError, match="config.json cannot be written .*: make room there"):
            run.begin(config)
    run.checkpoints.mkdir(exist_ok=True)
    (run.folder / ".123.partial-config.json").write_text("{")
    run.begin(config)
    assert run.config() == config
    (tmp_path / "other" / "checkpoints" / "step-1").mkdir(parents=True)
    with pytest.raises(InputError, match="other is not empty and holds no run"):
        Run(tmp_path / "other").begin(config)


def full_disk(path):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_one_process_at_a_time_trains_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("pixnerd.files.PATIENCE", 0.2)
    code = "from pixnerd.runs import Run\nfrom pixnerd.training import TrainConfig\n"
    code += "lock = Run('run').begin(TrainConfig())\nprint('held', flush=True)\ninput()"
    command, options = [sys.executable, "-c", code], {"cwd": tmp_path, "text": True}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="run is being trained by another process: wait for its end"):
            Run(tmp_path / "run").begin(TrainConfig())
        other.kill()
    first, second = (Run(tmp_path / "run").begin(TrainConfig()) for _ in range(2))  # a notebook that begins again
    second.release()
    first.release()


def test_settings_that_only_later_commands_read_may_change(tmp_path):
    run = Run(tmp_path / "run")
    run.begin(TrainConfig(steps=5, sampling=SamplingConfig(interval=(0.1, 1.0))))
    later = TrainConfig(steps=5, sampling=SamplingConfig(9, "heun", 2.0, None, 1.5), deterministic=True)
    run.begin(later)
    assert run.config() == later


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_decay_keeps_its_number_of_steps(tmp_path, decay):
    """With another one the learning rate of every step that is left would change."""
    run = Run(tmp_path / "run")
    run.begin(TrainConfig(steps=5, decay=decay))
    run.log({"step": 1})
    run.begin(TrainConfig(steps=5, decay=decay, log_every=7))
    with pytest.raises(InputError, match=f"was planned for 5 steps, not 9: with decay={decay} .* --start-from"):
        run.begin(TrainConfig(steps=9, decay=decay))
    assert run.config().steps == 5


def test_a_full_disk_is_one_sentence(tmp_path):
    """/dev/full answers every write as a full disk does."""
    run = Run(tmp_path)
    run.log_path.symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"log.jsonl cannot be written \(No space left on device\): make room there"):
        run.log({"step": 1})


def test_a_running_notebook_may_be_in_the_folder_first(tmp_path):
    (tmp_path / "quickstart.ipynb").write_text("{}")
    Run(tmp_path).begin(TrainConfig(steps=5))


def test_missing_files_are_reported(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        Run(tmp_path).config()
    with pytest.raises(InputError, match="run `pixnerd sample"):
        Run(tmp_path).load_samples()


def test_the_aligned_block_is_the_published_one_and_a_runs_own_when_resumed(tmp_path):
    text = replace(TEXT_SIZES["text-nano/8"], blocks=8)
    assert TrainConfig(model=text, align="dinov2").aligned_block == 6
    assert TrainConfig(align="dinov2").aligned_block == 8
    assert TrainConfig(align="dinov2", align_block=3).aligned_block == 3
    run, asked = Run(tmp_path / "run"), TrainConfig(model=text, align="dinov2", steps=9)
    assert run.completed(asked) == asked
    run.begin(replace(asked, align_block=8))  # what an earlier version wrote
    run.log({"step": 1})
    run.begin(run.completed(asked))
    assert run.config().aligned_block == 8
    with pytest.raises(InputError, match="align_block 8 there, 6 asked for"):
        run.begin(run.completed(replace(asked, align_block=6)))


@pytest.mark.parametrize(("before", "asked", "kept"), [("torch", "auto", "torch"), ("auto", "fused", "fused")])
def test_a_resumed_run_keeps_its_field_kernel_unless_another_is_named(tmp_path, before, asked, kept):
    """Earlier versions wrote torch, which was the default, into every configuration."""
    run, config = Run(tmp_path / "run"), TrainConfig(data="synthetic", steps=9)
    run.begin(replace(config, field_kernel=before))
    run.log({"step": 1})
    assert run.completed(replace(config, field_kernel=asked)).field_kernel == kept
