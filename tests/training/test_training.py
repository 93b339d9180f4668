import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pixnerd import InputError, ModelConfig, checkpoints, data, flow, load, plots, training
from pixnerd.averages import exponent
from pixnerd.checkpoints import newest_checkpoint
from pixnerd.conditions import Labels, training_conditions
from pixnerd.config import STUDENT_SAMPLING
from pixnerd.cost import forward_flops
from pixnerd.distributed import ALONE, World
from pixnerd.errors import WriteError
from pixnerd.model import PixNerd
from pixnerd.plain import network
from pixnerd.planning import plan_run
from pixnerd.randomness import Purpose, derived_seed, generator, normal, permuted, random_bits
from pixnerd.runs import Run
from pixnerd.text import TextModelConfig
from pixnerd.training import NonFiniteLoss, TrainConfig, draw_step, interruptible, step_indices, step_size, train
from pixnerd.training.batches import out_of_reach_of_signals, step_batches
from pixnerd.training.loop import Job, build_models
from pixnerd.training.losses import VelocityLoss
from pixnerd.training.meters import LossWindow, StepPart

CPU = torch.device("cpu")
MODEL = ModelConfig(width=16, heads=2, blocks=1, patch_size=8, image_size=16, field_width=4, field_blocks=1)


def config_for(folder, **changes):
    defaults = {
        "out": str(folder),
        "data": "synthetic",
        "model": MODEL,
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "log_every": 4,
        "checkpoint_every": 5,
        "horizontal_flip": True,
        "clip": 1.0,
    }
    return TrainConfig(**{**defaults, **changes})


def final_files(folder):
    checkpoint = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def logged(folder):
    """The lines of a run's log without what depends on the machine's speed."""
    speeds = {"images_per_second", "tflops", "utilisation"}
    return [{name: value for name, value in entry.items() if name not in speeds} for entry in Run(folder).read_log()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run: its folder and its losses."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return folder, [float(record.loss) for record in train(config_for(folder), CPU)]


@pytest.mark.parametrize("stops", [(7,), (1, 2, 11)], ids=["once", "often"])
def test_stopped_and_resumed_is_the_same_run(tmp_path, straight, stops):
    folder, losses = tmp_path / "run", []
    for stop in (*stops, None):
        for record in train(config_for(folder), CPU):
            losses.append(float(record.loss))
            if record.step == stop:
                break
    assert losses == straight[1]
    assert final_files(folder) == final_files(straight[0])  # model, EMA and optimiser, bit for bit
    assert logged(folder) == logged(straight[0])
    assert [entry["step"] for entry in logged(folder)] == [4, 8, 12]


def test_a_crash_between_checkpoints_loses_only_what_came_after(tmp_path, straight):
    """A killed process writes nothing more: the disk has the last checkpoint and a longer log."""
    folder = tmp_path / "run"
    records = train(config_for(folder), CPU)
    for record in records:
        if record.step == 9:
            break
    killed = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    records.close()
    for path in folder.rglob("*"):
        if path.is_file() and path not in killed:
            path.unlink()
    for path, content in killed.items():
        path.write_bytes(content)
    for path in (folder / "checkpoints").iterdir():
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    assert [record.step for record in train(config_for(folder), CPU)] == list(range(6, 13))
    assert final_files(folder) == final_files(straight[0])
    assert [entry["step"] for entry in Run(folder).read_log()] == [4, 8, 12]


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("optimizer", lambda t: t.pop("step:head.out.bias"), r"missing \['optimizer:step:head.out.bias'\]"),
        ("optimizer", lambda t: t.update(x=torch.zeros(1)), r"surplus \['optimizer:x'\]"),
        (
            "model",
            lambda t: t.update({"head.out.bias": torch.zeros(1)}),
            r"model:head.out.bias has shape \(1,\)",
        ),
        ("ema", lambda t: t.pop("head.out.bias"), r"missing \['ema:head.out.bias'\]"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_and_the_log_kept(tmp_path, straight, file, change, sentence):
    """What is missing would otherwise stay random, and one number would be copied to all places."""
    shutil.copytree(straight[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-12" / f"{file}.safetensors"
    with safe_open(path, "pt") as opened:
        about = opened.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, about)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(InputError, match=sentence):
        list(train(config_for(tmp_path / "run"), CPU))
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_a_finished_run_has_nothing_to_do(straight):
    assert list(train(config_for(straight[0]), CPU)) == []


def test_training_learns(tmp_path):
    losses = [float(r.loss) for r in train(config_for(tmp_path / "run", steps=150, checkpoint_every=150), CPU)]
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])


def test_one_step_is_adamw_on_the_loss(tmp_path):
    """The first step by hand: the loss from the random noise, times and labels; AdamW's first step is lr·sign(g)."""
    config = config_for(tmp_path / "run", steps=1, clip=None, label_dropout=0.5)
    record = next(iter(train(config, CPU)))
    after = load(tmp_path / "run", weights="model")
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(0, Purpose.INITIAL_WEIGHTS))
        before = PixNerd(MODEL, 10)
    dataset = data.load("synthetic", 16)
    indices = step_indices(len(dataset), config, 0, range(8))
    draws = draw_step(config, 0, range(8), (3, 16, 16), CPU)
    images = torch.stack([dataset[i][0].flip(-1) if f else dataset[i][0] for i, f in zip(indices, draws.flipped)])  # noqa: B905
    labels = torch.tensor([10 if d else dataset[i][1] for i, d in zip(indices, draws.dropped)])  # noqa: B905
    t = draws.t.view(-1, 1, 1, 1)
    x_t = t * images + (1 - t) * draws.noise
    v = network(dict(before.named_parameters()), MODEL, x_t, draws.t, labels)
    loss = (v - (images - draws.noise)).square().mean()
    torch.testing.assert_close(record.loss, loss.detach())
    (gradient,) = torch.autograd.grad(loss, before.head.out.weight)
    torch.testing.assert_close(after.head.out.weight, -config.learning_rate * gradient.sign(), atol=1e-5, rtol=1e-3)
    assert 0 < draws.dropped.sum() < 8
    assert 0 < draws.flipped.sum() < 8


def test_ema_is_the_weighted_sum_of_all_weights(tmp_path):
    list(train(config_for(tmp_path / "run", steps=6, checkpoint_every=1, keep_checkpoints=6), CPU))
    weights = [load(tmp_path / "run" / "checkpoints" / f"step-{step}", weights="model") for step in range(1, 7)]
    expected = weights[0].patch_embed.weight
    for model in weights[1:]:
        expected = 0.9 * expected + 0.1 * model.patch_embed.weight
    averaged = load(tmp_path / "run").patch_embed.weight
    torch.testing.assert_close(averaged, expected)
    assert not torch.allclose(averaged, weights[-1].patch_embed.weight, atol=1e-4)
    assert averaged.dtype == torch.float32


@pytest.mark.parametrize("recompute", ["none", "head", "all"])
def test_the_trained_network_recomputes_what_is_configured(tmp_path, monkeypatch, recompute):
    built, build = [], training.loop.build_network
    monkeypatch.setattr(training.loop, "build_network", lambda *given: built.append(build(*given)) or built[-1])
    list(train(config_for(tmp_path / "run", recompute=recompute, steps=1), CPU))
    assert {model.recompute for model in built} == {recompute}


def test_every_average_begins_with_the_weights_after_the_first_step(tmp_path):
    """Whatever it held before: neither the initial weights nor zeros have a share in it."""
    config = config_for(tmp_path / "run", extra_ema_decays=(0.5,), checkpoint_every=1, keep_checkpoints=2, steps=2)
    models = build_models(Job(config, Run(config.out), {}, Labels(10), VelocityLoss(config), [], World(0, 1, CPU)))
    for name in ("ema", "ema-0.5"):
        assert all(a.equal(b) for a, b in zip(models[name].parameters(), models["model"].parameters(), strict=True))
    list(train(config, CPU))
    first, second = (
        {name: load_file(tmp_path / f"run/checkpoints/step-{step}/{name}.safetensors") for name in models}
        for step in (1, 2)
    )
    for name, decay in {"ema": 0.9, "ema-0.5": 0.5}.items():
        for key, weight in first["model"].items():
            assert first[name][key].equal(weight)
            expected = decay * weight + (1 - decay) * second["model"][key]
            torch.testing.assert_close(second[name][key], expected)
    start = models["model"].state_dict()
    assert not any(weight.equal(start[key]) for key, weight in first["model"].items() if key.startswith("head.out"))


def test_averages_of_every_third_step(tmp_path):
    """Updates after steps 1, 3 and 6, by the decay of the steps since the last; the weights are those of any run."""
    options = {"extra_ema_decays": (0.5,), "power_averages": (0.1,), "checkpoint_every": 1, "keep_checkpoints": 7}
    list(train(config_for(tmp_path / "run", average_every=3, steps=7, **options), CPU))
    list(train(config_for(tmp_path / "other", steps=7, **options), CPU))

    def kept(run, step, name):
        return load_file(tmp_path / f"{run}/checkpoints/step-{step}/{name}.safetensors")

    gamma = exponent(0.1) + 1
    expected = {"ema": {3: 0.9**2, 6: 0.9**3}, "ema-0.5": {3: 0.5**2, 6: 0.5**3}}
    expected["power-0.1"] = {3: (1 / 3) ** gamma, 6: (1 / 2) ** gamma}
    for name, decays in expected.items():
        average = kept("run", 1, "model")
        for step in range(1, 8):
            weights, found = kept("run", step, "model"), kept("run", step, name)
            decay = decays.get(step, 1.0)
            average = {key: decay * average[key] + (1 - decay) * weights[key] for key in weights}
            for key, weight in weights.items():
                assert weight.equal(kept("other", step, "model")[key])
                torch.testing.assert_close(found[key], average[key])


noises = pytest.mark.parametrize("noise", ["torch", "philox"])


@noises
def test_draws_belong_to_positions_of_the_global_batch(noise):
    config = config_for("unused", noise=noise)
    whole = draw_step(config, 3, range(8), (3, 4, 4), CPU)
    halves = [draw_step(config, 3, positions, (3, 4, 4), CPU) for positions in (range(4), range(4, 8))]
    for name in whole._fields:
        joined = torch.cat([getattr(half, name) for half in halves])
        assert getattr(whole, name).equal(joined), name
    later = draw_step(config, 4, range(8), (3, 4, 4), CPU)
    assert not torch.isclose(whole.noise, later.noise).any()
    assert not torch.isclose(whole.t, later.t).any()


@noises
def test_draws_have_the_stated_distributions(noise):
    config = config_for("unused", label_dropout=0.1, noise=noise)
    draws = [draw_step(config, step, range(64), (1, 4, 4), CPU) for step in range(60)]
    noise, t, dropped, flipped, caption, r = (torch.cat(parts) for parts in zip(*draws, strict=True))
    assert r.equal(t)  # an empty interval: this is no student
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert torch.logit(t).mean().abs() < 0.06
    assert torch.logit(t).std() == pytest.approx(1, abs=0.05)
    assert dropped.double().mean() == pytest.approx(0.1, abs=0.02)
    assert flipped.double().mean() == pytest.approx(0.5, abs=0.04)
    assert caption.mean() == pytest.approx(0.5, abs=0.02)


@noises
def test_all_that_is_drawn_for_an_image_is_independent(noise):
    """Of each other, and of what the next image and the same place in the next step draw."""
    config = config_for("unused", label_dropout=0.3, noise=noise)
    steps = [draw_step(config, step, range(64), (1, 2, 2), CPU) for step in range(100)]
    pixels, t, dropped, flipped, caption, _ = (
        torch.stack(parts) for parts in zip(*steps, strict=True)
    )  # [steps, 64, …]
    normals = torch.stack((*pixels.flatten(2).unbind(2), torch.logit(t)))
    # and of the sizes of the normal numbers: what shares a random number with one may depend on its size alone
    drawn = torch.cat((normals, normals.abs(), torch.stack((dropped.float(), flipped.float(), caption))))
    drawn = torch.cat((drawn[:, :-1, :-1], drawn[:, :-1, 1:], drawn[:, 1:, :-1])).flatten(1)  # [39, 99 · 63]
    limit = 5 / math.sqrt(drawn.shape[1])  # five standard deviations
    assert (torch.corrcoef(drawn) - torch.eye(39)).abs().max() < limit
    together = (dropped & flipped).float().mean()
    assert together == pytest.approx(0.3 * 0.5, abs=0.03)


def test_philox_draws_are_those_of_its_numbers():
    """Each image has a stream of four numbers, for t, dropout, mirror and caption, and a stream of noise."""
    config = config_for("unused", noise="philox", seed=4, time_shift=2.0, label_dropout=0.4)
    draws = draw_step(config, 9, range(16, 24), (3, 4, 4), CPU)
    few, noise = (random_bits(4, Purpose.TRAINING_STEP, 9, s, torch.arange(16, 24), n) for s, n in ((0, 4), (1, 48)))
    shares = few[:, 1:].double() / 2**32
    assert draws.noise.equal(normal(noise).view(8, 3, 4, 4))
    u = torch.sigmoid(normal(few[:, 0]))
    torch.testing.assert_close(draws.t, u / (u + (1 - u) * 2))
    assert draws.dropped.equal(shares[:, 0] < 0.4)
    assert draws.flipped.equal(shares[:, 1] < 0.5)
    torch.testing.assert_close(draws.caption, shares[:, 2].float(), rtol=0, atol=2**-24)
    assert {draw.dtype for draw in (draws.noise, draws.t, draws.caption)} == {torch.float32}


def test_torch_draws_are_one_after_another_from_the_generator_of_an_image():
    """Joined or in another order they would be other numbers, and a resumed run another run."""
    config = config_for("unused", seed=4, time_shift=2.0, label_dropout=0.4, horizontal_flip=True)
    draws = draw_step(config, 9, range(16, 24), (3, 4, 4), CPU)
    for row, position in enumerate(range(16, 24)):
        g = generator(CPU, 4, Purpose.TRAINING_STEP, 9, position)
        u = torch.sigmoid(torch.randn((), generator=g))
        drop, flip = torch.rand(2, generator=g)
        assert draws.noise[row].equal(torch.randn(3, 4, 4, generator=g))
        assert draws.caption[row] == torch.rand(1, generator=g)
        torch.testing.assert_close(draws.t[row], u / (u + (1 - u) * 2))
        assert (draws.dropped[row], draws.flipped[row]) == (drop < 0.4, flip < 0.5)


@pytest.mark.parametrize("cached", [1, 100, 2**17])
def test_how_many_images_are_drawn_at_once_changes_nothing(monkeypatch, cached):
    """None whole, two of 48 numbers, all eight."""
    monkeypatch.setattr("pixnerd.training.batches.CACHED", cached)
    noise = draw_step(config_for("unused", noise="philox", seed=4), 9, range(16, 24), (3, 4, 4), CPU).noise
    one_by_one = [random_bits(4, Purpose.TRAINING_STEP, 9, 1, torch.tensor([place]), 48) for place in range(16, 24)]
    assert noise.equal(normal(torch.cat(one_by_one)).view(8, 3, 4, 4))


def test_every_image_once_an_epoch_and_resuming_keeps_the_order():
    config = config_for("unused", batch_size=7, steps=40)
    order = [i for step in range(40) for i in step_indices(20, config, step, range(7))]
    epochs = [order[i : i + 20] for i in range(0, 280, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    halves = [step_indices(20, config, 11, part) for part in (range(0, 3), range(3, 7))]  # two devices share a step
    assert halves[0] + halves[1] == order[77:84]


@pytest.mark.parametrize("size", [2, 20, 64, 1000, 1025])
def test_an_order_computed_image_by_image_is_a_permutation_too(size):
    orders = [[permuted(index, size, seed) for index in range(size)] for seed in (1, 2)]
    assert [sorted(order) for order in orders] == [list(range(size))] * 2
    if size > 2:
        assert orders[0] != orders[1] != list(range(size))


def test_an_order_computed_image_by_image_looks_random():
    """Where an image lands is uniform and independent of its neighbour's place and of its place in another epoch."""
    size = 45_000_000
    seeds = [derived_seed(0, Purpose.DATA_ORDER, epoch) for epoch in (0, 1)]
    places = torch.tensor([[permuted(index, size, seed) for index in range(4000)] for seed in seeds]) / size
    assert (torch.histc(places, 20, 0, 1) / 400 - 1).abs().max() < 0.2  # five standard deviations
    pairs = torch.stack((places[0, :-1], places[0, 1:], places[1, :-1], torch.arange(3999.0)))
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 0.08


def test_large_data_sets_are_visited_once_an_epoch_in_constant_memory(monkeypatch):
    config = config_for("unused", batch_size=7)
    small = step_indices(2**22, config, 5, range(7))
    assert small == training.shuffled(2**22, 0, 0)[35:42].tolist()  # as ever, since runs go on
    monkeypatch.setattr("pixnerd.training.batches.shuffled", None)
    assert max(step_indices(45_000_000, config, 10**6, range(7))) < 45_000_000
    monkeypatch.setattr("pixnerd.training.batches.LISTED", 19)
    order = [i for step in range(40) for i in step_indices(20, config, step, range(7))]
    epochs = [order[i : i + 20] for i in range(0, 280, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 14


def folder_of(root, names):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(3):
            Image.new("RGB", (16, 16), (80 * index, 0, 0)).save(root / name / f"{index}.png")
    return f"folder:{root}"


def test_a_run_records_its_classes_and_refuses_others(tmp_path):
    config = config_for(tmp_path / "run", data=folder_of(tmp_path / "data", "ab"), steps=2)
    list(train(config, CPU))
    assert json.loads((tmp_path / "run/classes.json").read_text()) == {"classes": ["a", "b"], "words": ["a", "b"]}
    before = final_files(tmp_path / "run")
    longer = dataclasses.replace(config, steps=4)
    (tmp_path / "data/a").rename(tmp_path / "data/z")  # b is label 0 now
    with pytest.raises(
        InputError, match=r"run began, its data had label 0 for 'a', now it is 'b'; labels have to keep"
    ):
        train(longer, CPU)
    (tmp_path / "data/z").rename(tmp_path / "data/a")
    folder_of(tmp_path / "data", "c")
    with pytest.raises(InputError, match="run began, its data had 2 classes, now it has 3; labels have to keep"):
        train(longer, CPU)
    assert Run(tmp_path / "run").config().steps == 2
    assert final_files(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "data/c")
    assert [record.step for record in train(longer, CPU)] == [3, 4]


def test_a_run_without_recorded_classes_goes_on_unless_their_number_changed(tmp_path):
    config = config_for(tmp_path / "run", data=folder_of(tmp_path / "data", "ab"), steps=2)
    list(train(config, CPU))
    (tmp_path / "run/classes.json").unlink()  # as an earlier version left it
    folder_of(tmp_path / "data", "c")
    longer = dataclasses.replace(config, steps=4)
    with pytest.raises(InputError, match="the model in .*run has 2 classes and the data has 3 now"):
        train(longer, CPU)
    assert not (tmp_path / "run/classes.json").exists()
    shutil.rmtree(tmp_path / "data/c")
    assert [record.step for record in train(longer, CPU)] == [3, 4]
    assert Run(tmp_path / "run").classes() == ["a", "b"]


def test_learning_rate_schedule():
    config = config_for("unused", learning_rate=2.0, warmup_steps=4, steps=10, decay="linear")
    assert [training.learning_rate(config, step) for step in (0, 1, 5, 9)] == pytest.approx([0.5, 0.9, 1.0, 0.2])
    cosine = dataclasses.replace(config, decay="cosine", warmup_steps=0, steps=6)
    expected = [2.0, 1 + 0.75**0.5, 1.5, 1.0, 0.5, 1 - 0.75**0.5]
    assert [training.learning_rate(cosine, step) for step in range(6)] == pytest.approx(expected)
    constant = dataclasses.replace(config, decay="constant", warmup_steps=0)
    assert {training.learning_rate(constant, step) for step in range(10)} == {2.0}


def test_speed_is_that_since_the_last_reading(tmp_path, monkeypatch):
    clock = iter([10.0, 12.0, 16.0])
    monkeypatch.setattr(training.meters, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(training.meters.time, "perf_counter", lambda: next(clock))
    meter = training.meters.SpeedMeter(config_for(tmp_path), 10, torch.float32, World(0, 1, CPU))
    first, second = (meter.read(8) for _ in range(2))
    assert (first["images_per_second"], second["images_per_second"]) == (4, 2)
    utilisation = 4 * meter.flops / 1e9
    assert first["utilisation"] == round(utilisation, 4) != round(utilisation, 5)


def test_a_system_without_signal_masks_loads_with_workers_too(monkeypatch):
    monkeypatch.delattr(signal, "pthread_sigmask")  # as on Windows
    with out_of_reach_of_signals(2):
        pass


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_utilisation_is_the_share_of_the_best_in_the_precision_that_computes(tmp_path, monkeypatch, precision):
    bests = {torch.float32: 1e9, torch.bfloat16: 4e9}
    monkeypatch.setattr(training.meters, "matmul_rate", lambda device, dtype: bests[dtype])
    list(train(config_for(tmp_path / "run", precision=precision, steps=4), CPU))
    (entry,) = Run(tmp_path / "run").read_log()
    model = PixNerd(MODEL, 10)
    done = 3 * forward_flops(model, 16) * entry["images_per_second"]  # FLOP/s
    assert entry["tflops"] == pytest.approx(done / 1e12, abs=5e-5)
    best = bests[torch.float32 if precision == "float32" else torch.bfloat16]
    assert entry["utilisation"] == pytest.approx(done / best, abs=1e-4, rel=1e-3)


def test_tensorboard_shows_the_log_also_of_a_run_that_went_on(tmp_path):
    config = config_for(tmp_path / "run")
    stopped = train(config, CPU)
    for record in stopped:
        if record.step == 10:
            stopped.close()
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    list(train(config, CPU))
    log = Run(tmp_path / "run").read_log()
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("loss", "gradient_norm", "learning_rate", "images_per_second"):
        found = [(event.step, event.value) for event in shown.Scalars(name)]
        assert found == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in log]
    for tenth in range(10):
        known = {entry["step"]: entry["loss_by_t"][tenth] for entry in log if entry["loss_by_t"][tenth] is not None}
        if name := known and f"loss_by_t/{tenth / 10:.1f}":
            found = {event.step: event.value for event in shown.Scalars(name)}
            assert found == pytest.approx(known, rel=1e-6)


def test_log_holds_the_mean_loss_and_the_loss_by_t(tmp_path, straight):
    folder, losses = straight
    log = Run(folder).read_log()
    assert [entry["loss"] for entry in log] == pytest.approx([sum(losses[i : i + 4]) / 4 for i in (0, 4, 8)], rel=1e-5)
    config = config_for(folder)
    times = torch.cat([draw_step(config, step, range(8), (3, 16, 16), CPU).t for step in range(4)])
    counts = torch.bincount((10 * times).long(), minlength=10)
    by_t = log[0]["loss_by_t"]
    assert [entry is None for entry in by_t] == [n == 0 for n in counts]
    total = sum(float(n) * (entry or 0) for n, entry in zip(counts, by_t, strict=True))
    assert total / 32 == pytest.approx(log[0]["loss"], rel=1e-4)
    assert all(entry["images_per_second"] > 0 for entry in log)


def test_a_window_means_every_tenth_of_t_and_only_counts_skipped_steps():
    window = LossWindow()
    steps = ((1.0, [0.05, 1.0]), (1 / 3, [0.0, 0.95]), (math.nan, [0.5, 0.5]), (math.nan, [0.5, 0.5]))
    for loss, t in steps:
        part = StepPart(torch.tensor([loss, loss + 1]), {"repa": torch.tensor(2 * loss)})
        window.add_step(torch.tensor(loss), torch.tensor(3 * loss), [part], torch.tensor(t))
        if math.isnan(loss):
            window.skip_step()
    assert (window.steps, window.skipped) == (4, 2)
    found = window.summary(ALONE)
    assert found.pop("loss_by_t") == [0.666667, *[None] * 8, 1.666667]  # t = 1 belongs to the last tenth
    known = {"loss": 2 / 3, "gradient_norm": 2.0, "largest_gradient_norm": 3.0, "repa": 4 / 3}
    assert found == pytest.approx(known, rel=1e-6)


def test_non_finite_loss_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    calls = 0
    true_loss = flow.loss

    def loss(*args):
        nonlocal calls
        calls += 1
        losses = true_loss(*args)
        return losses._replace(mean=losses.mean * math.nan) if calls == 8 else losses

    monkeypatch.setattr(flow, "loss", loss)
    with pytest.raises(NonFiniteLoss, match="loss of step 8 is not finite; step 5 is kept"):
        list(train(config_for(tmp_path / "run"), CPU))
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-5\n"
    assert load(tmp_path / "run").patch_embed.weight.isfinite().all()


def test_unreadable_image_is_named_and_completed_steps_are_kept(tmp_path, monkeypatch):
    def batch(self, indices):
        if 3 in indices:
            raise InputError("image 3 cannot be read")
        return original(self, indices)

    original = data.Synthetic.batch
    monkeypatch.setattr(data.Synthetic, "batch", batch)
    config = config_for(tmp_path / "run", steps=200, checkpoint_every=200)
    fatal = next(step for step in range(200) if 3 in step_indices(1000, config, step, range(8)))
    with pytest.raises(InputError, match="image 3 cannot be read"):
        list(train(config, CPU))
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{fatal}\n"


def test_bfloat16_stays_near_float32(tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        config = config_for(tmp_path / precision, precision=precision, steps=20)
        losses[precision] = [float(record.loss) for record in train(config, CPU)]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"] != losses["float32"]
    assert load(tmp_path / "bfloat16").patch_embed.weight.dtype == torch.float32


def test_fields_are_trained_at_every_decode_size_and_resume_exactly(tmp_path, monkeypatch):
    """The loss of a step by hand: images at the chosen size, and a transformer that sees the model's own size."""
    config = config_for(tmp_path / "run", decode_sizes=(16, 24, 48), steps=9, horizontal_flip=False, label_dropout=0)
    sizes = [step_size(config, step) for step in range(9)]
    assert set(sizes) == {16, 24, 48}
    first = [float(record.loss) for record in train(config, CPU)]
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(0, Purpose.INITIAL_WEIGHTS))
        model = PixNerd(MODEL, 10)
    dataset = data.load("synthetic", sizes[0])
    images, labels = map(
        torch.stack, zip(*((x, torch.tensor(y)) for x, y in batch_of(dataset, config, 0)), strict=True)
    )
    draws = draw_step(config, 0, range(8), (3, sizes[0], sizes[0]), CPU)
    expected = flow.loss(model, images, labels, draws.noise, draws.t, base_resolution=(16, 16)).mean
    assert first[0] == pytest.approx(expected.item(), rel=1e-6)
    again = dataclasses.replace(config, out=str(tmp_path / "again"))
    losses = []
    for stop in (4, None):
        for record in train(again, CPU):
            losses.append(float(record.loss))
            if record.step == stop:
                break
    assert losses == first


def batch_of(dataset, config, step):
    return [dataset[i] for i in step_indices(len(dataset), config, step, range(config.batch_size))]


class Means:
    """A teacher whose features are the mean colour of each token's patch, and that counts the images it sees."""

    name, features, seen = "means", 3, 0

    def tokens(self, images, grid):
        Means.seen += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2)


def test_alignment_teaches_a_block_the_teachers_features(tmp_path, monkeypatch):
    """The angle shrinks; a resumed run is identical; a cached teacher sees every image once."""
    monkeypatch.setattr("pixnerd.frozen.load", lambda *_: Means())
    options = {"align": "means", "align_block": 1, "steps": 60, "log_every": 20, "clip": None, "batch_size": 40}
    config = config_for(tmp_path / "run", **options, checkpoint_every=25)
    records = train(config, CPU)
    next(records)
    records.close()  # stopped and resumed: the projector and its moments are part of the state
    list(train(config, CPU))
    aligned = [entry["alignment"] for entry in Run(tmp_path / "run").read_log()]
    assert aligned[-1] < 0.85 * aligned[0]
    straight = dataclasses.replace(config, out=str(tmp_path / "straight"))
    list(train(straight, CPU))
    assert final_files(tmp_path / "run") == final_files(tmp_path / "straight")
    assert "projector.safetensors" in final_files(tmp_path / "run")
    assert logged(tmp_path / "run") == logged(tmp_path / "straight")

    Means.seen = 0
    cached = dataclasses.replace(config, out=str(tmp_path / "cached"), cache_teacher=True, horizontal_flip=False)
    list(train(cached, CPU))
    assert Means.seen == 1000  # images of the data set, although 60 · 40 were trained on


class Pooled(torch.nn.Module):
    """Two layers of features as a user's own network."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 5, 3)

    def forward(self, images):
        return [self.layer(images), torch.nn.functional.avg_pool2d(images, 4)]


def test_perceptual_loss_of_an_exported_network_joins_the_loss(tmp_path, perceptual_network):
    """It is logged, affects the weights in proportion to its own weight, and a resumed run is identical."""
    config = config_for(tmp_path / "run", perceptual=str(perceptual_network), perceptual_weight=0.5)
    records = train(config, CPU)
    for _ in range(7):
        next(records)
    records.close()
    list(train(config, CPU))
    log = Run(tmp_path / "run").read_log()
    assert all(0 < entry["perceptual"] < 4 for entry in log)

    weights = {}
    for weight in (0.0, 0.5):
        changed = dataclasses.replace(config, out=str(tmp_path / f"weight {weight}"), perceptual_weight=weight)
        list(train(changed, CPU))
        weights[weight] = final_files(tmp_path / f"weight {weight}")
    plain = config_for(tmp_path / "plain")
    list(train(plain, CPU))
    assert final_files(tmp_path / "run") == weights[0.5]
    assert final_files(tmp_path / "plain")["model.safetensors"] == weights[0.0]["model.safetensors"]
    assert weights[0.0]["model.safetensors"] != weights[0.5]["model.safetensors"]
    assert "perceptual" not in Run(tmp_path / "plain").read_log()[0]


def test_perceptual_loss_lowers_what_it_measures(tmp_path, perceptual_network):
    def last(weight):
        config = config_for(
            tmp_path / str(weight), perceptual=str(perceptual_network), perceptual_weight=weight, steps=60, log_every=60
        )
        list(train(config, CPU))
        return Run(tmp_path / str(weight)).read_log()[0]["perceptual"]

    assert last(100.0) < last(0.0)


@pytest.fixture(scope="module")
def perceptual_network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "pooled.pt2"
    torch.manual_seed(0)
    example = torch.zeros(2, 3, 16, 16)
    batch = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    torch.export.save(torch.export.export(Pooled(), (example,), dynamic_shapes=batch), path)
    return path


def test_a_perceptual_network_that_cannot_be_read_is_refused_before_there_is_a_run(tmp_path):
    with pytest.raises(InputError, match="perceptual is 'inception'; it has to be efficientnet or a file that"):
        train(config_for(tmp_path / "run", perceptual="inception"), CPU)
    with pytest.raises(InputError, match=r"perceptual is 'nothing.pt2'; it has to be efficientnet or a file that"):
        train(config_for(tmp_path / "run", perceptual="nothing.pt2"), CPU)
    wrong = tmp_path / "wrong.pt2"
    wrong.write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"wrong.pt2 is not a network that torch.export.save wrote"):
        train(config_for(tmp_path / "run", perceptual=str(wrong)), CPU)
    with pytest.raises(InputError, match="perceptual_weight is -1; it cannot be negative"):
        config_for(tmp_path / "run", perceptual_weight=-1)
    assert not (tmp_path / "run").exists()


def test_one_norm_clips_all_that_is_trained(tmp_path, monkeypatch):
    """After one step AdamW's first moment is (1 − β₁) times the gradient that it was given; the log has its length."""
    monkeypatch.setattr("pixnerd.frozen.load", lambda *_: Means())
    gradients, logged = {}, {}
    for clip in (None, 1e6, 0.01):
        folder = tmp_path / str(clip)
        list(train(config_for(folder, align="means", align_block=1, steps=1, clip=clip), CPU))
        saved = load_file(folder / "checkpoints/step-1/optimizer.safetensors")
        moments = {name.removeprefix("exp_avg:"): m for name, m in saved.items() if name.startswith("exp_avg:")}
        gradients[clip] = {name: moment / 0.1 for name, moment in moments.items()}
        logged[clip] = Run(folder).read_log()[0]["gradient_norm"]
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients[None].values()))
    assert norm > 0.1
    assert logged == pytest.approx(dict.fromkeys(logged, norm), rel=1e-5)
    assert any(g.any() for name, g in gradients[None].items() if name.startswith("projector."))
    for name, gradient in gradients[None].items():
        assert gradients[1e6][name].equal(gradient)
        torch.testing.assert_close(gradients[0.01][name], gradient * (0.01 / norm), rtol=1e-4, atol=1e-9)


def test_alignment_ends_at_the_given_step(tmp_path, monkeypatch):
    monkeypatch.setattr("pixnerd.frozen.load", lambda *_: Means())
    Means.seen = 0
    config = config_for(tmp_path / "run", align="means", align_block=1, align_until=4)
    list(train(config, CPU))
    assert Means.seen == 4 * config.batch_size
    assert ["alignment" in entry for entry in Run(tmp_path / "run").read_log()] == [True, False, False]
    with pytest.raises(InputError, match="align_block is 8; the model has blocks 1 … 1"):
        config_for("unused", align="means", align_block=8)


def test_a_disk_that_is_too_full_for_tensorboard_is_one_sentence(tmp_path, monkeypatch):
    """Its thread writes later, so the error may come with another entry, or when all is closed, which costs nothing."""
    config = config_for(tmp_path / "run", log_every=1, steps=3)
    with monkeypatch.context() as patched:
        patched.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", no_room)
        patched.setattr("torch.utils.tensorboard.SummaryWriter.close", no_room)
        with pytest.raises(WriteError, match=r"run/tensorboard cannot be written \(No space left on device\)"):
            list(train(config, CPU))
    with monkeypatch.context() as patched:
        patched.setattr("torch.utils.tensorboard.SummaryWriter.close", no_room)
        assert len(list(train(config, CPU))) == 3


def no_room(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_frequency_weights_replace_the_plain_mean_square(tmp_path):
    """Quality 100 has equal weights and gives the plain loss; quality 50 does not."""
    first = {}
    for quality in (None, 100, 50):
        config = config_for(tmp_path / str(quality), frequency_quality=quality, steps=1)
        first[quality] = float(next(train(config, CPU)).loss)
    assert first[100] == pytest.approx(first[None], rel=1e-5)
    assert first[50] != pytest.approx(first[None], rel=1e-2)
    with pytest.raises(InputError, match="frequency_quality is 0; it has to lie between 1 and 100, or None"):
        config_for("unused", frequency_quality=0)
    with pytest.raises(InputError, match="frequency_quality is 50 and images have 20 pixels along a side; it needs"):
        config_for("unused", frequency_quality=50, decode_sizes=(16, 20))


def test_decode_sizes_have_to_fit_the_tokens():
    with pytest.raises(InputError, match="image height 25 cannot be shared by the 2 patches of base height 16"):
        config_for("unused", decode_sizes=(16, 25))
    with pytest.raises(InputError, match="a linear head decodes only at its base resolution"):
        config_for("unused", decode_sizes=(32,), model=dataclasses.replace(MODEL, head="linear"))


def test_start_from_takes_the_moving_average_of_another_run(tmp_path, straight):
    """With a vanishing learning rate the weights stay the same, even at another image size."""
    larger = dataclasses.replace(MODEL, image_size=32)
    config = config_for(
        tmp_path / "run", steps=2, learning_rate=1e-30, start_from=str(straight[0]), model=larger, ema_decay=0.5
    )
    list(train(config, CPU))
    for name, weight in load(straight[0]).state_dict().items():
        assert load(tmp_path / "run", weights="model").state_dict()[name].equal(weight)
        assert load(tmp_path / "run").state_dict()[name].equal(weight)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start_from": "nothing"}, "nothing does not exist"),
        ({"model": dataclasses.replace(MODEL, width=32)}, "is another network: width 16 → 32"),
        ({"model": dataclasses.replace(MODEL, prediction="x")}, "is another network: prediction v → x"),
        ({"data": "digits", "model": dataclasses.replace(MODEL, image_size=32)}, "channels 3 → 1"),
    ],
    ids=["missing", "width", "prediction", "channels"],
)
def test_bad_start_is_refused_before_a_folder_is_made(tmp_path, straight, changes, sentence):
    config = config_for(tmp_path / "run", **{"start_from": str(straight[0]), **changes})
    with pytest.raises(InputError, match=sentence):
        train(config, CPU)
    assert not (tmp_path / "run").exists()


def test_a_model_of_captions_does_not_start_from_one_of_classes(tmp_path, straight, tiny_folder):
    shape = {"width": 16, "heads": 2, "blocks": 1, "patch_size": 8, "image_size": 16, "field_width": 4}
    model = TextModelConfig(**shape, field_blocks=1, text_blocks=1, text_features=12, text_length=4)
    options = {"model": model, "text_encoder": str(tiny_folder), "start_from": str(straight[0])}
    with pytest.raises(InputError, match="is a PixNerd; this run trains a TextPixNerd$"):
        train(config_for(tmp_path / "run", **options), CPU)
    assert not (tmp_path / "run").exists()


def test_config_survives_json(tmp_path):
    config = config_for(tmp_path, decode_sizes=(16, 32), sampling=training.SamplingConfig(steps=3, interval=None))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"label_dropout": 1.5}, "label_dropout is 1.5"),
        ({"ema_decay": -0.1}, "ema_decay is -0.1"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        (
            {"data": "cifar"},
            "data set 'cifar' is unknown; known: digits, cifar10, cifar10:test, emoji, emoji:WORDS, synthetic",
        ),
        ({"data": "folder:/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_bad_configuration_is_refused_before_anything_is_written(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        train(config_for(tmp_path / "run", **changes), CPU)
    assert not (tmp_path / "run").exists()


def test_another_runs_folder_is_refused(tmp_path, straight):
    with pytest.raises(InputError, match="already holds another run .*learning_rate 0.01 there, 0.5 asked for"):
        train(config_for(straight[0], learning_rate=0.5), CPU)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        train(config_for(tmp_path), CPU)
    with pytest.raises(InputError, match="is a file"):
        train(config_for(tmp_path / "letter.txt"), CPU)


def test_text_models_train_on_captions_through_the_same_loop(tmp_path, monkeypatch, tiny_folder):
    """Resumed bit for bit; each image shows the caption chosen at random, or an empty one if it is dropped."""
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path / "data"))

    def captioned(name, image_size):
        gratings = original(name, image_size)
        gratings.captions = [("a cat", "a red cat") if i % 2 else ("a blue dog",) for i in range(len(gratings))]
        return gratings

    original = data.load
    monkeypatch.setattr(data, "load", captioned)
    model = TextModelConfig(
        width=16,
        heads=2,
        blocks=1,
        patch_size=8,
        image_size=16,
        field_width=4,
        field_blocks=1,
        text_blocks=1,
        text_features=12,
        text_length=6,
    )
    options = {"model": model, "text_encoder": str(tiny_folder), "label_dropout": 0.3}
    straight = [float(r.loss) for r in train(config_for(tmp_path / "a", **options), CPU)]
    losses = []
    for stop in (5, None):
        for record in train(config_for(tmp_path / "b", **options), CPU):
            losses.append(float(record.loss))
            if record.step == stop:
                break
    assert losses == straight
    assert final_files(tmp_path / "a") == final_files(tmp_path / "b")

    shown = []
    conditions = training_conditions(config_for(tmp_path / "c", **options), captioned("synthetic", 16), CPU)
    encode = conditions.encode_text
    conditions.encode_text = lambda captions: shown.extend(captions) or encode(captions)
    draws = draw_step(config_for("unused", label_dropout=0.3), 0, range(200), (3, 2, 2), CPU)
    assert conditions.of_images(torch.zeros(200), torch.arange(200), draws.dropped, draws.caption).shape == (200, 6, 12)
    assert [caption == "" for caption in shown] == draws.dropped.tolist()
    odd = [caption for caption in shown[1::2] if caption]
    assert {caption for caption in shown[::2] if caption} == {"a blue dog"}
    assert 0.3 < odd.count("a red cat") / len(odd) < 0.7

    wider = config_for(tmp_path / "d", **{**options, "model": dataclasses.replace(model, text_features=384)})
    with pytest.raises(InputError, match="gives 12 features per token; the model reads 384"):
        train(wider, CPU)
    monkeypatch.setattr(data, "load", original)
    options["model"] = dataclasses.replace(model, image_size=32)
    with pytest.raises(InputError, match="data set 'digits' has no captions"):
        train(config_for(tmp_path / "e", data="digits", **options), CPU)


@contextlib.contextmanager
def overflowing(*steps):
    """Make the gradient infinite at these forward passes of training, counted from 1; the loss stays finite."""

    def overflow(module, inputs, output):
        if isinstance(module, PixNerd) and output.requires_grad and next(calls) in steps:
            output.register_hook(lambda gradient: gradient * math.inf)

    calls = itertools.count(1)
    with torch.nn.modules.module.register_module_forward_hook(overflow):
        yield


def test_an_overflowed_gradient_of_a_finite_loss_stops_before_it_reaches_the_weights(tmp_path):
    config = config_for(tmp_path / "run", checkpoint_every=2, log_every=100)
    with (
        overflowing(3),
        pytest.raises(NonFiniteLoss, match="the gradient of step 3 is not finite; step 2 is kept"),
    ):
        list(train(config, CPU))
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-2\n"
    for weights in ("model", "ema"):
        assert all(tensor.isfinite().all() for tensor in load(tmp_path / "run", weights=weights).state_dict().values())
    assert [record.step for record in train(config, CPU)] == list(range(3, 13))  # and the run can go on


def plain_training(config, skipped):
    """Weights and moving average of a run with constant learning rate that leaves out the updates of `skipped`."""
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(config.seed, Purpose.INITIAL_WEIGHTS))
        model = PixNerd(MODEL, 10)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, config.betas, weight_decay=0.1, fused=True)
    datasets, first = {16: data.load("synthetic", 16)}, True
    batches = step_batches(config, datasets, Labels(10), 0, World(0, 1, CPU))
    for number, batch in enumerate(batches, start=1):
        if number in skipped:
            continue
        optimizer.zero_grad()
        flow.loss(model, batch.image, batch.condition, batch.noise, batch.t).mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(average, model.parameters(), strict=True):
                mean.lerp_(parameter, 1.0 if first else 1 - config.ema_decay)
        first = False
    return list(model.parameters()), average


def test_a_skipped_step_changes_nothing_and_is_counted(tmp_path):
    """Two of twelve steps overflow: weights and average are those of a plain loop without these two updates."""
    config = config_for(tmp_path / "run", non_finite="skip", weight_decay=0.1)
    with overflowing(3, 6):
        records = list(train(config, CPU))
    assert [record.step for record in records] == list(range(1, 13))
    for name, expected in zip(("model", "ema"), plain_training(config, {3, 6}), strict=True):
        for found, wanted in zip(load(tmp_path / "run", weights=name).parameters(), expected, strict=True):
            torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=1e-4)
    log = Run(tmp_path / "run").read_log()
    assert [entry["skipped"] for entry in log] == [1, 1, 0]
    assert all(math.isfinite(entry["gradient_norm"]) for entry in log)
    means = [sum(float(r.loss) for r in records[i : i + 4] if r.step not in (3, 6)) for i in (0, 4, 8)]
    assert [entry["loss"] * (4 - entry["skipped"]) for entry in log] == pytest.approx(means)


def test_a_run_with_skipped_steps_resumes_bit_for_bit(tmp_path):
    straight, resumed = (config_for(tmp_path / name, non_finite="skip") for name in ("straight", "resumed"))
    with overflowing(3, 9):
        list(train(straight, CPU))
    with overflowing(3):
        records = train(resumed, CPU)
        while next(records).step < 4:
            pass
        records.close()
    with overflowing(9 - 4):
        list(train(resumed, CPU))
    assert final_files(tmp_path / "resumed") == final_files(tmp_path / "straight")
    assert logged(tmp_path / "resumed") == logged(tmp_path / "straight")


@pytest.mark.parametrize("changes", [{"non_finite": "skip"}, {"align": "means", "align_block": 1, "align_until": 0}])
def test_a_run_resumes_that_has_weights_without_a_gradient_so_far(tmp_path, monkeypatch, changes):
    """All of them after a first step that was skipped; the projector of an arm that is never aligned."""
    monkeypatch.setattr("pixnerd.frozen.load", lambda *_: Means())
    straight, resumed = (config_for(tmp_path / name, **changes) for name in ("straight", "resumed"))
    first = [1] if "non_finite" in changes else []
    with overflowing(*first):
        list(train(straight, CPU))
    with overflowing(*first):
        records = train(resumed, CPU)
        next(records)
        records.close()
    list(train(resumed, CPU))
    assert final_files(tmp_path / "resumed") == final_files(tmp_path / "straight")
    assert logged(tmp_path / "resumed") == logged(tmp_path / "straight")


def test_the_speed_after_an_interruption_is_of_the_steps_since_then(tmp_path, monkeypatch):
    records, read = train(config_for(tmp_path / "run", log_every=12), CPU), []
    while next(records).step < 7:
        pass
    records.close()
    monkeypatch.setattr("pixnerd.training.meters.SpeedMeter.read", lambda _, images: read.append(images) or {})
    list(train(config_for(tmp_path / "run", log_every=12), CPU))
    assert read == [5 * 8]


def test_fewer_steps_than_were_made_are_refused(tmp_path):
    list(train(config_for(tmp_path / "run"), CPU))
    with pytest.raises(InputError, match="steps is 4; .*run has made 12 already"):
        train(config_for(tmp_path / "run", steps=4), CPU)
    assert Run(tmp_path / "run").config().steps == 12


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sampling": STUDENT_SAMPLING}, "sampling.solver is map"),
        ({"paths": 64}, "paths is 64"),
        ({"fd_weight": 0.1}, "fd_weight is 0.1"),
    ],
)
def test_a_students_settings_without_a_teacher_are_refused(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=f"{sentence}, which only a few-step student has: name its teacher"):
        train(config_for(tmp_path / "run", **changes), CPU)
    with pytest.raises(InputError, match=sentence):
        plan_run(config_for(tmp_path / "run", **changes))


def test_the_bar_of_a_resumed_run_shows_the_speed_of_this_program(tmp_path, monkeypatch):
    records, bars = train(config_for(tmp_path / "run"), CPU), []
    while next(records).step < 9:
        pass
    records.close()

    class Kept(interruptible.tqdm):
        def close(self):
            bars.append((self.initial, self.n, self.last_print_n))
            super().close()

    monkeypatch.setattr(interruptible, "tqdm", Kept)
    monkeypatch.setattr(interruptible, "on_stop_signals", lambda _: None)
    assert interruptible.train_until_stopped(config_for(tmp_path / "run"), ALONE) == 12
    assert bars[0][:2] == (9, 12)


def test_only_a_row_of_skipped_steps_stops_a_run(tmp_path):
    config = config_for(tmp_path / "run", steps=40, non_finite="skip", log_every=1)
    alternating = [*range(2, 11), *range(12, 21), *range(22, 32)]  # 9, 9 and 10 in a row
    sentence = "the gradient of step 31 is not finite, and the 9 steps before it were skipped; step 30 is kept"
    with overflowing(*alternating), pytest.raises(NonFiniteLoss, match=sentence):
        list(train(config, CPU))
    log = Run(tmp_path / "run").read_log()
    assert [entry["skipped"] for entry in log] == [int(step in alternating) for step in range(1, 31)]
    assert log[1]["loss"] is log[1]["gradient_norm"] is None
    plots.loss_curve(log)
    with warnings.catch_warnings(action="error"):
        plots.loss_curve(log[1:2])  # nothing finite at all
    assert list(train(dataclasses.replace(config, steps=31, non_finite="stop"), CPU))[-1].step == 31  # may change


def test_a_loss_that_is_not_a_number_is_skipped_too(tmp_path, monkeypatch):
    true_loss, calls = flow.loss, itertools.count(1)

    def loss(*args):
        losses = true_loss(*args)
        return losses._replace(mean=losses.mean * math.nan) if next(calls) == 2 else losses

    monkeypatch.setattr(flow, "loss", loss)
    list(train(config_for(tmp_path / "run", non_finite="skip"), CPU))
    assert [entry["skipped"] for entry in Run(tmp_path / "run").read_log()] == [1, 0, 0]
    assert all(weight.isfinite().all() for weight in load(tmp_path / "run", weights="model").parameters())


@pytest.mark.parametrize("weight", [1e39, 0.5])
def test_a_term_that_overflows_never_reaches_a_checkpoint(tmp_path, perceptual_network, weight):
    config = config_for(tmp_path / "run", perceptual=str(perceptual_network), perceptual_weight=weight, steps=2)
    if weight == 0.5:
        assert len(list(train(config, CPU))) == 2
        return
    with pytest.raises(NonFiniteLoss, match="the gradient of step 1 is not finite; there was no checkpoint yet"):
        list(train(config, CPU))
    assert not list((tmp_path / "run/checkpoints").iterdir())


# --- machines that lack something ------------------------------------------------------------------------------------


def test_a_changed_working_directory_changes_nothing(tmp_path, monkeypatch):
    """A notebook's %cd between two steps: data and run stay where they were."""
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        (tmp_path / "pictures" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "pictures" / "a" / f"{i}.png")
    (tmp_path / "elsewhere").mkdir()
    for record in train(config_for("run", data="folder:pictures"), CPU):
        if record.step == 1:
            monkeypatch.chdir(tmp_path / "elsewhere")
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-12"
    assert not list((tmp_path / "elsewhere").iterdir())
    assert Run(tmp_path / "run").config().out == "run"


def test_without_a_compiler_there_is_no_run(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler called g++\nmany more lines")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        InputError, match=r"does not work on this machine \(no compiler called g\+\+\): .* --compile off$"
    ):
        train(config_for(tmp_path / "run", compile="on"), CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_a_gpus_images_are_loaded_ahead_into_pinned_memory(monkeypatch, device, pinned):
    """Only from there does the CPU go on while they are copied."""
    seen = {}
    monkeypatch.setattr("pixnerd.training.batches.DataLoader", lambda *_, **options: seen.update(options) or ())
    config = config_for("unused", workers=2)
    assert not list(step_batches(config, {}, Labels(10), 0, World(0, 1, torch.device(device))))
    assert (seen["pin_memory"], seen["num_workers"], seen["prefetch_factor"]) == (pinned, 2, 2)


def test_too_little_shared_memory_is_said_before_the_run(tmp_path, monkeypatch):
    """2 workers with 2 batches each and the one in use, 8 images of 3 · 16² bytes: 30 KiB."""
    needed = (2 * 2 + 1) * 8 * 3 * 16**2
    free = lambda size: monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=size))
    free(needed - 1)
    with pytest.raises(InputError, match="workers is 2, for which /dev/shm needs .* --shm-size=1g, or .* --workers 0"):
        train(config_for(tmp_path / "run", workers=2), CPU)
    assert not (tmp_path / "run").exists()
    free(needed)
    train(config_for(tmp_path / "run", workers=2), CPU).close()
    free(0)
    train(config_for(tmp_path / "alone"), CPU).close()
    free(100 * 2**20)
    config = config_for(tmp_path / "large", workers=2, batch_size=2**20)  # 3,840 MiB; twice that is 7.5 GiB
    with pytest.raises(InputError, match=r"needs 3840 MiB, but it has 100 MiB free: .* --shm-size=8g,"):
        train(config, CPU)


def test_no_worker_outlives_an_image_that_cannot_be_read(monkeypatch):
    """One that did would be waited for at the end of the program, for ever: it is out of reach of signals."""
    dataset = data.load("synthetic", 16)

    def unreadable(indices):
        raise InputError("this image is damaged")

    monkeypatch.setattr(dataset, "batch", unreadable)
    config = config_for("unused", workers=1)
    gc.disable()  # the error, its traceback and the frames in it refer to one another
    try:
        with pytest.raises(InputError, match="this image is damaged"):
            list(step_batches(config, {16: dataset}, Labels(dataset.num_classes), 0, ALONE))
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_a_loader_that_is_killed_is_one_sentence_and_keeps_the_steps(tmp_path, monkeypatch):
    """As by the kernel, where memory runs out."""
    whole = training.batches.StepImages.__getitem__

    def die_at_the_fourth(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, step)

    monkeypatch.setattr(training.batches.StepImages, "__getitem__", die_at_the_fourth)
    done = []
    with pytest.raises(InputError, match="loads images has died .* --shm-size, or take --workers 0$"):
        done.extend(record.step for record in train(config_for(tmp_path / "run", workers=1), CPU))
    kept = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert (kept and kept.name) == (f"step-{done[-1]}" if done else None)


def test_a_full_disk_ends_the_run_at_its_last_checkpoint(tmp_path, monkeypatch):
    """And no second attempt to save follows the first."""
    attempts = []

    def fail(*arguments):
        attempts.append(arguments[1])
        raise WriteError("no room")

    records = train(config_for(tmp_path / "run"), CPU)
    while next(records).step < 6:
        pass
    monkeypatch.setattr(training.loop, "save_checkpoint", fail)
    with pytest.raises(WriteError, match="no room"):
        list(records)
    assert attempts == [10]
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-5"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """And what is written is the state after the checkpoint's step, whatever later steps change."""
    list(train(config_for(tmp_path / "waits", keep_checkpoints=3), CPU))
    go, write = threading.Event(), checkpoints.save_tensors
    monkeypatch.setattr(checkpoints, "save_tensors", lambda *arguments: (go.wait(5), write(*arguments)))
    records = train(config_for(tmp_path / "goes on", keep_checkpoints=3), CPU)
    while next(records).step < 9:
        pass
    assert newest_checkpoint(tmp_path / "goes on" / "checkpoints") is None
    go.set()
    list(records)
    for name in ("step-5", "step-10", "step-12"):
        waited, went_on = (tmp_path / run / "checkpoints" / name for run in ("waits", "goes on"))
        assert {p.name: p.read_bytes() for p in waited.iterdir()} == {p.name: p.read_bytes() for p in went_on.iterdir()}


def test_a_checkpoint_that_could_not_be_written_ends_the_run_at_its_next_log_entry(tmp_path, monkeypatch):
    write = checkpoints.save_tensors

    def fill(tensors, path, about):
        if "step-10" in str(path):
            raise OSError(errno.ENOSPC, "full")
        write(tensors, path, about)

    monkeypatch.setattr(checkpoints, "save_tensors", fill)
    folder, steps = tmp_path / "run" / "checkpoints", []

    def step_of(record):
        while (folder / ".partial-step-10").exists():
            time.sleep(0.01)
        return record.step

    with pytest.raises(WriteError, match="step-10 cannot be written .No space left on device.: make room there"):
        steps.extend(step_of(record) for record in train(config_for(tmp_path / "run", log_every=1), CPU))
    assert steps[-1] == 10
    assert [path.name for path in folder.glob("*step*")] == ["step-5"]


def test_deterministic_lasts_as_long_as_the_run(tmp_path):
    seen = []
    for _ in train(config_for(tmp_path / "run", deterministic=True, steps=2), CPU):
        seen.append(torch.are_deterministic_algorithms_enabled())
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
