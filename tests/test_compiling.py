"""Sampling with a compiled network: when, how many graphs, and the same images."""

import functools

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from pixnerd import PixNerd, compiling, evaluation, sample
from pixnerd.checkpoints import save_model
from pixnerd.cli import main
from pixnerd.compiling import WORTH_COMPILING, compile_to_sample, pays
from pixnerd.config import EvaluationConfig, SamplingConfig
from pixnerd.distributed import World
from pixnerd.explore.demo import Request, open_run, states
from pixnerd.model import ModelConfig
from pixnerd.model_source import find_model
from pixnerd.sampling import sample_batches

from .conftest import randomised

MODEL = ModelConfig(width=16, heads=2, blocks=3, patch_size=8, image_size=16, field_width=4, field_blocks=2)
CONFIG = SamplingConfig(steps=3)  # the first step is not guided, the others are


@pytest.fixture
def compiled(monkeypatch):
    """Compiles for a backend that counts its graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiling, "check_compiler", lambda device: None)  # its trial is a graph of its own
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    counters.clear()
    return counter


@pytest.fixture
def file(tmp_path):
    save_model(randomised(PixNerd(MODEL, 10)), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("setting", "device", "flops", "expected"),
    [
        ("on", "cpu", 0, True),
        ("off", "cuda", 1e20, False),
        ("auto", "cuda", WORTH_COMPILING, True),
        ("auto", "cuda", 0.9 * WORTH_COMPILING, False),
        ("auto", "cpu", 1e20, False),
    ],
)
def test_auto_compiles_large_jobs_of_a_gpu(setting, device, flops, expected):
    counted = []
    assert pays(setting, device, lambda: counted.append(flops) or flops) == expected
    assert bool(counted) == (setting == "auto" and device == "cuda")  # counting takes a forward pass


def test_the_work_is_that_of_all_passes_for_all_images(monkeypatch):
    """Three images, each with 1 + 2 + 2 passes: the first step is not guided."""
    seen = []
    monkeypatch.setattr(compiling, "pays", lambda setting, device, flops: seen.append((setting, device, flops())))
    model = PixNerd(MODEL, 10)
    compile_to_sample("auto", model, None, 3, CONFIG)
    assert seen == [("auto", "cpu", 15 * compiling.forward_flops(model, 16))]


def test_four_graphs_serve_every_batch(compiled):
    """Guided and unguided, whole batches and a smaller last one; a single image takes one more graph."""
    model = randomised(PixNerd(MODEL, 10)).eval()
    labels = torch.arange(11) % 10
    expected = torch.cat(list(sample_batches(model, labels, CONFIG, batch_size=4)))
    compile_to_sample("on", model, None, 11, CONFIG)
    found = torch.cat(list(sample_batches(model, labels, CONFIG, batch_size=4)))  # 4, 4 and 3 images
    assert compiled.frame_count == counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    sample(model, labels[:7], CONFIG)
    assert compiled.frame_count == 4
    sample(model, labels[:1], CONFIG)
    assert compiled.frame_count == 5


def test_a_guide_is_compiled_too(compiled):
    model, guide = (randomised(PixNerd(MODEL, 10)).eval() for _ in range(2))
    config = SamplingConfig(steps=2, interval=None, guide="another")
    expected = sample(model, [1, 2], config, weaker=guide)
    compile_to_sample("on", model, guide, 2, config)
    assert guide.head.decode is not type(guide.head).decode
    torch.testing.assert_close(sample(model, [1, 2], config, weaker=guide), expected, rtol=0, atol=1e-5)
    assert all(block._compiled_call_impl is not None for network in (model, guide) for block in network.blocks)


def test_the_commands_and_the_demo_compile_when_asked(compiled, file, tmp_path, capsys):
    images = {}
    for setting in ("off", "on"):
        before, out = compiled.frame_count, tmp_path / setting
        main(["sample", str(file), "--count", "3", "--steps", "3", "--compile", setting, "--out", str(out)])
        images[setting] = np.load(out / "samples.npz")["arr_0"].astype(int)
        assert (compiled.frame_count > before) == (setting == "on")
    assert np.abs(images["on"] - images["off"]).max() <= 1
    before = compiled.frame_count
    for setting in ("auto", "on"):
        torch._dynamo.reset()
        request = Request(subject=1, size=16, steps=2)
        assert len(list(states(open_run(file, setting), request))) == 2
        assert (compiled.frame_count > before) == (setting == "on")


def test_an_evaluation_compiles_when_asked(compiled, file, tmp_path, monkeypatch, capsys):
    source = find_model(str(file))
    pixels = {}
    for setting in ("off", "on"):
        config = EvaluationConfig(
            str(file), reference="synthetic", draw=3, sampling=CONFIG, batch_size=2, compile=setting
        )
        model = source.load()
        samples = evaluation.Samples(config, source, World(0, 1, torch.device("cpu")), model)
        pixels[setting] = torch.cat([batch for _, batch in samples.batches()]).int()
        assert (compiled.frame_count > 0) == (setting == "on")
    assert (pixels["on"] - pixels["off"]).abs().max() <= 1
