"""The plan of a run, against counts made in other ways."""

import dataclasses
import itertools
import re
from pathlib import Path

import nbformat
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pixnerd import SIZES, frozen
from pixnerd.cli import main
from pixnerd.config import STUDENT_SAMPLING, TrainConfig
from pixnerd.cost import forward_flops, saved_activation_bytes, step_flops
from pixnerd.errors import InputError
from pixnerd.planning import CARDS, GIB, POLICIES, advice, cards_table, encoder_cost, paths_line, plan_run, teacher_cost
from pixnerd.recipes import RECIPES
from pixnerd.text import build_network
from pixnerd.training.distillation import total_derivative

ROOT = Path(__file__).parents[1]


def counted(size, recompute):
    """The arithmetic of a step as torch counts it while it happens, on shapes alone."""
    with torch.device("meta"):
        model = build_network(SIZES[size], 10, recompute).train()
    x, t = torch.empty(1, 3, 32, 32, device="meta"), torch.empty(1, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(x, t, model.example_condition()).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("size", ["micro/8", "text-nano/8"])
def test_the_flops_of_a_step_have_what_is_recomputed(size):
    with torch.device("meta"):
        model = build_network(SIZES[size], 10)
    torch_counts = {policy: counted(size, policy) for policy in ("none", "head", "all")}
    ours = {policy: step_flops(model, 32, policy) for policy in torch_counts}
    assert ours["none"] == 3 * forward_flops(model, 32) == pytest.approx(torch_counts["none"], rel=0.06)
    for policy in ("head", "all"):  # torch may skip a last product again, whose value no derivative needs
        assert ours[policy] - ours["none"] == pytest.approx(torch_counts[policy] - torch_counts["none"], rel=0.06)


@pytest.fixture(scope="module")
def large():
    """XL/16 at 512 pixels, 32 images on each of eight GPUs, as the recipe for 256 pixels would have it."""
    model = dataclasses.replace(SIZES["XL/16"], image_size=512)
    return plan_run(dataclasses.replace(RECIPES["imagenet-256"], model=model), gpus=8)


def test_what_does_not_fit_is_told_with_what_does(large):
    fit = large.fit()
    assert (fit.recompute, fit.images) == ("head", 32)
    kept = 32 * saved_activation_bytes(large.model, 512, "head") / GIB
    assert fit.kept == pytest.approx(kept)
    assert fit.total == pytest.approx(22 * 700_589_219 / GIB + kept + fit.passing)
    assert not fit.fits(card=48)
    assert [(s.recompute, s.accumulate) for s in large.suggestions(card=48)] == [("all", 1), ("head", 2)]
    assert all(s.fits(card=48) for s in large.suggestions(card=48))
    assert "--recompute all --accumulate 1" in advice(large, card=48)
    assert "--recompute head --accumulate 2" in advice(large, card=48)
    assert large.suggestions(card=80) == []
    assert "fits" in advice(large, card=80)
    assert "more GPUs and --shard" in advice(large, card=10)


def test_sizes_that_the_head_decodes_count():
    """Arithmetic of their mean, memory of the largest; the transformer sees the same tokens for all."""
    one = plan_run(TrainConfig(model=SIZES["micro/8"]))
    many = plan_run(TrainConfig(model=SIZES["micro/8"], decode_sizes=(16, 32, 128)))
    counts = [step_flops(one.model, size, "head") for size in (16, 32, 128)]
    assert many.flops() == pytest.approx(sum(counts) / 3)
    assert counts[0] < one.flops() < counts[2]
    larger = plan_run(TrainConfig(model=SIZES["micro/8"], decode_sizes=(64,)))
    kept = [plan.kept["none"] - one.kept["none"] for plan in (many, larger)]
    assert kept[0] / kept[1] == pytest.approx((128**2 - 32**2) / (64**2 - 32**2), rel=0.01)  # by the pixel
    assert many.fit().total > larger.fit().total > one.fit().total
    teacher = student_plan(decode_sizes=(16, 32, 128)).frozen.flops / student_plan().frozen.flops
    forward = [forward_flops(student_plan().model, size) for size in (16, 32, 128)]
    assert teacher == pytest.approx(sum(forward) / 3 / forward[1])


def test_a_small_card_is_told_both_ways():
    """256 images on one card of 12 GB: two at once, or sixteen with all recomputed; the head alone gains nothing."""
    config = dataclasses.replace(RECIPES["imagenet-256"], model=SIZES["L/16"])
    found = plan_run(config, gpus=1)
    assert [(s.recompute, s.accumulate) for s in found.suggestions(CARDS[12])] == [("all", 16), ("head", 128)]
    nothing = dataclasses.replace(found, config=dataclasses.replace(config, recompute="none"))
    assert [(s.recompute, s.accumulate) for s in nothing.suggestions(CARDS[12])] == [("all", 16), ("none", 128)]


@pytest.mark.parametrize(("capability", "kernel", "none"), [(0, "torch", 718.17), (9, "fused", 459.29)])
def test_pieces_of_the_head_keep_the_same_with_both_kernels(capability, kernel, none):
    """MiB an image of XL/16: what all pieces together would keep is what "head" spares with torch's kernel."""
    found = plan_run(RECIPES["imagenet-256"], capability=capability)
    assert found.model.field_kernel == kernel
    assert [1024 * found.kept["none"], 1024 * found.head] == pytest.approx([none, none - 411.42], abs=0.01)


def test_the_most_images_are_the_last_that_the_counter_lets_pass():
    """Below a card's limit by the counter's own figures, and above it with one more."""
    found = plan_run(dataclasses.replace(RECIPES["imagenet-256"], model=SIZES["L/16"]), gpus=8)
    titles, *rows = cards_table(found)
    assert titles == ["images at once", "recompute none", "recompute head", "recompute all"]
    assert [row[0] for row in rows] == [f"card of {sold} GB" for sold in (8, 12, 16, 24, 80)]
    state = 22 * sum(p.numel() for p in found.model.parameters()) / GIB
    for row, card in zip(rows, CARDS.values(), strict=True):
        for policy, most in zip(POLICIES, map(int, row[1:]), strict=True):
            kept = saved_activation_bytes(found.model, 256, policy) / GIB
            total, one_more = (
                state + images * kept + found.fit(policy, images=images).passing for images in (most, most + 1)
            )
            assert most == 0 or total <= 0.92 * card
            assert one_more > 0.92 * card
    assert rows[0][1:] == ["0", "0", "0"]  # weights, gradients and moments take 9.3 GiB
    assert int(rows[-1][1]) < int(rows[-1][2]) < int(rows[-1][3])


def test_sharding_divides_the_state_and_nothing_else(large):
    sharded = dataclasses.replace(large, config=dataclasses.replace(large.config, shard=True))
    whole, part = large.fit(), sharded.fit()
    assert whole.state - part.state == pytest.approx(7 / 8 * 20 * 700_589_219 / GIB)
    assert (whole.kept, whole.passing) == (part.kept, part.passing)


def test_several_machines_hold_the_same_shards():
    """As distributed.sharding_mesh has it: weights are divided among the eight GPUs of one of them."""
    eight, sixteen = (plan_run(TrainConfig(model=SIZES["micro/8"], shard=True), gpus) for gpus in (8, 16))
    assert sixteen.fit().state == eight.fit().state < plan_run(TrainConfig(model=SIZES["micro/8"]), 8).fit().state / 2


def test_no_split_is_advised_that_training_refuses():
    """A path's 16 intervals stay together, and so do the images whose features FD-loss compares."""
    follows = student_plan(batch_size=96)
    allowed = (1, 2, 3, 6)
    cards = [follows.fit("all", n).total / 0.92 for n in allowed]
    assert all(a > b for a, b in itertools.pairwise(cards))
    for card in (*(card + 1e-6 for card in cards[1:]), *(card - 1e-6 for card in cards)):
        assert {way.accumulate for way in follows.suggestions(card)} <= set(allowed)
    assert follows.suggestions(cards[-1] + 1e-6)[0].accumulate == 6
    at_once = student_plan(distil="fd", batch_size=96)
    assert at_once.suggestions(at_once.fit("all", 2).total / 0.92 + 1e-6) == []
    with pytest.raises(InputError, match="distil=shortcut needs a multiple of 16"):
        student_plan(batch_size=24)


@pytest.mark.parametrize("recipe", ["text-256", "text-512", "text-tune"])
def test_the_published_text_recipe_fits_eight_cards_of_80_gb(recipe):
    found = plan_run(dataclasses.replace(RECIPES[recipe], align="facebook/dinov2-base"), gpus=8)
    assert found.fit().fits(), advice(found)


def test_a_teachers_size_is_that_of_the_network(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=14)
    config.save_pretrained(tmp_path)
    found = teacher_cost(TrainConfig(align=str(tmp_path)))
    network = transformers.Dinov2Model(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 16 * 14, 16 * 14))
    assert found.flops == counter.get_total_flops()
    matrices = [p for p in network.encoder.parameters() if p.ndim == 2]
    assert found.bytes == 4 * sum(p.numel() for p in matrices)
    assert teacher_cost(TrainConfig(align="facebook/dinov2-base")).flops == pytest.approx(46.3e9, rel=0.01)
    assert teacher_cost(TrainConfig(align="dinov2")) == teacher_cost(TrainConfig(align="facebook/dinov2-large"))
    assert teacher_cost(TrainConfig()).flops == 0


def test_an_encoder_whose_features_are_kept_takes_memory_alone():
    anew = RECIPES["text-256"]
    kept = dataclasses.replace(anew, cache_text=True)
    assert encoder_cost(anew).bytes == encoder_cost(kept).bytes == 3.4e9
    assert encoder_cost(anew).flops > 0 == encoder_cost(kept).flops


def student_plan(**changes):
    model = dataclasses.replace(SIZES["micro/8"], image_size=32)
    settings = {"distil": "shortcut", "teacher": "runs/teacher", "model": model, "sampling": STUDENT_SAMPLING}
    return plan_run(TrainConfig(**settings | {"batch_size": 16} | changes))


def test_a_students_plan_has_its_teacher():
    """Euler's 16 steps for every 16 images, guided ones twice, and a second network in memory."""
    plain, guided = (student_plan(teacher_guidance=w, teacher_interval=(0.3, 1.0)) for w in (1.0, 3.0))
    forward, own = forward_flops(plain.model, 32), step_flops(plain.model, 32)
    assert plain.flops() == own + forward
    assert guided.flops() == own + (16 + 11) / 16 * forward  # the steps that start at 5/16 … 15/16
    weights = sum(p.numel() for p in plain.model.parameters())
    assert plain.frozen.bytes == 4 * weights
    assert plain.fit().state == pytest.approx((20 + 2 + 4) * weights / GIB)


def test_a_plan_with_kept_paths_follows_them_once_and_says_what_they_take():
    anew, kept = student_plan(teacher_guidance=2.0), student_plan(teacher_guidance=2.0, paths=640, steps=100)
    a_path = anew.frozen.flops * 16
    assert kept.frozen.flops == pytest.approx(a_path * 640 / (100 * kept.config.batch_size))
    assert kept.frozen.bytes == 0  # the teacher has gone by the first step
    gib = 640 * 9 * 2 * 3 * 32**2 / GIB
    said = f"640 paths of the teacher, followed before the first step, take {gib:.3g} GiB on the disk"
    assert paths_line(kept.config) == said


def test_a_plan_of_meanflow_has_the_derivative():
    """As torch counts it while it happens."""
    found = student_plan(distil="meanflow", teacher_guidance=3.0)
    model = build_network(found.config.model, 10)
    x, t = torch.randn(1, 3, 32, 32), torch.rand(1)
    with FlopCounterMode(display=False) as counter:
        total_derivative(lambda x, t, r: model(x, t, model.example_condition(), r=r), x, x, t, t)
    forward = forward_flops(model, 32)
    assert found.frozen.flops == pytest.approx(counter.get_total_flops() + 2 * forward, rel=0.1)


def test_a_plan_of_fd_loss_has_its_networks_and_what_they_keep():
    alone, added = student_plan(distil="fd"), student_plan(fd_weight=0.1)
    network = frozen.load("efficientnet")
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        sum(of_map.sum() for of_map in network.maps(x)).backward()
    assert alone.frozen.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert alone.frozen.bytes == 4 * sum(p.numel() for p in network.parameters())  # of the student's teacher nothing
    teacher = student_plan()
    assert added.frozen.flops - teacher.frozen.flops == pytest.approx(5 / 16 * alone.frozen.flops)
    assert added.frozen.kept == pytest.approx(5 / 16 * alone.frozen.kept)
    maps = sum(of_map.numel() for of_map in network.maps(x))
    assert alone.frozen.kept > 4 * maps  # at the least the maps that are averaged
    assert alone.fit().kept == pytest.approx(16 * (alone.kept["head"] + alone.frozen.kept / GIB))


@pytest.mark.parametrize(("recipe", "distil"), [("student-imagenet", "shortcut"), ("student-imagenet-fd", "fd")])
@pytest.mark.parametrize("size", ["L/16", "XL/16"])
def test_the_students_of_imagenet_fit_eight_cards_of_80_gb(recipe, distil, size):
    """The teacher's guidance is the published one."""
    guided = {"teacher_guidance": 3.5, "teacher_interval": (0.1, 1.0)}
    config = dataclasses.replace(RECIPES[recipe], model=SIZES[size], distil=distil, teacher="runs/xl", **guided)
    found = plan_run(config, gpus=8)
    assert found.fit().fits(), advice(found)
    notebook = nbformat.read(ROOT / "notebooks" / "scale" / "train_imagenet.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells)
    column = 1 + ["L/16-shortcut", "L/16-fd", "XL/16-shortcut", "XL/16-fd"].index(f"{size}-{distil}")
    rows = [re.search(rf"^\| {title}.*", text, re.MULTILINE)[0] for title in ("GFLOP", "GiB", "hours")]
    numbers = [float(re.match(r"[\d,.]*\d", row.split(" | ")[column])[0].replace(",", "")) for row in rows]
    assert numbers == pytest.approx([found.flops() / 1e9, found.fit().total, found.hours()], rel=0.01)


def test_the_command_needs_no_data(capsys, monkeypatch):
    monkeypatch.setattr("pixnerd.planning.card_here", lambda: 33.0)
    main(["plan", "--size", "nano/8", "--data", "folder:/nowhere", "--gpus", "2", "--batch-size", "8", "--steps", "10"])
    said = capsys.readouterr().out
    assert "recompute head, accumulate 1" in said
    assert "10 steps take" in said
    assert "card of 8 GB" in said
    assert "of a card with 33 GiB" in said
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--size", "nano/8", "--gpus", "3", "--batch-size", "8"])
    assert stop.value.code == 2
    assert "batch_size 8 cannot be shared evenly by 3 GPUs" in capsys.readouterr().err
