"""The detector of shapes: correct on true drawings, and it says what is wrong with false ones."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torchvision.transforms.functional import gaussian_blur

from pixnerd import InputError
from pixnerd.cli import main
from pixnerd.data import to_float
from pixnerd.data.shapes import COLOURS, INVERSE, SHAPES, TASKS, Group, Scene, coverage, make_scene, render
from pixnerd.metrics import scenes
from pixnerd.metrics.scenes import PARTS, Found, Verdict, check, find_objects, score_scenes, stands, true_score
from pixnerd.model_config import TEXT_SIZES
from pixnerd.runs import Run
from pixnerd.training import train

from ..training.test_training import CPU, config_for

TRUE = [make_scene(split, index) for split in ("train", "held-out") for index in range(280)]
SOME = [make_scene("train", index) for index in range(210)]  # 30 of every task


def drawn(things, size=32):
    return torch.stack([render(scene, size) for scene in things])


def verdicts(images, things):
    return [check(scene, found) for scene, found in zip(things, find_objects(images), strict=True)]


@pytest.mark.parametrize("size", [32, 64])
def test_true_drawings_are_read_without_a_mistake(size):
    for scene, found in zip(TRUE, find_objects(drawn(TRUE, size)), strict=True):
        assert len(found) == len(scene.objects)
        for thing in scene.objects:
            [same] = [one for one in found if abs(one.x - thing.x) + abs(one.y - thing.y) < 0.01]
            assert (same.shape, same.colour) == (thing.shape, thing.colour)
            assert same.radius == pytest.approx(thing.radius, rel=0.005)
            assert same.misfit < 0.001
    assert true_score(TRUE, size).overall == 1


def test_a_slightly_noisy_or_soft_picture_is_still_read():
    images, g = drawn(SOME), torch.Generator().manual_seed(0)
    noisy = (images + 8 * torch.randn(images.shape, generator=g)).clamp(0, 255).to(torch.uint8)
    for worse in (noisy, gaussian_blur(images, 7, 0.7), (0.9 * images.double() + 12).to(torch.uint8)):
        assert score_scenes(worse, SOME).overall >= 0.99
    # and one that is far too noisy or soft is not recognised
    noisy = (images + 60 * torch.randn(images.shape, generator=g)).clamp(0, 255).to(torch.uint8)
    for gone in (noisy, gaussian_blur(images, 15, 3.0)):
        score = score_scenes(gone, SOME)
        assert score.overall < 0.2  # one large object can be recognised by its blurred outline
        assert score.tasks["composition"] == 0


def test_floats_are_read_as_bytes_are():
    images = drawn(SOME[:35])
    assert find_objects(to_float(images)) == find_objects(images)


def test_what_holds_no_objects_shows_no_caption():
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (210, 3, 32, 32), generator=g, dtype=torch.uint8)
    clouds = ((gaussian_blur(noise.double(), 9, 2) - 127) * 6 + 127).clamp(0, 255).to(torch.uint8)
    grey_noise = (128 + 40 * torch.randn(210, 3, 32, 32, generator=g)).clamp(0, 255).to(torch.uint8)
    blank = torch.full((210, 3, 32, 32), 255, dtype=torch.uint8)
    red = blank * torch.tensor([220, 20, 40]).view(3, 1, 1).div(255)
    ramp = torch.arange(32).mul(8).to(torch.uint8).expand(210, 3, 32, 32)
    for images in (noise, clouds, grey_noise, blank, red.to(torch.uint8), ramp):
        score = score_scenes(images, SOME)
        assert score.tasks == dict.fromkeys(TASKS, 0.0)
        assert score.parts["count"] == score.parts["position"] == score.parts["binding"] == 0
        assert score.parts["object"] < 0.05  # clouds sometimes look like circles


def another(used, options):
    return next(option for option in options if option not in used)


def recoloured(scene, colours):
    return dataclasses.replace(scene, objects=tuple(dataclasses.replace(o, colour=colours(o)) for o in scene.objects))


def expect(changed, scenes_asked, **parts):
    """Check what each changed drawing shows of its caption; parts that are not named are right."""
    for scene, verdict in zip(scenes_asked, verdicts(drawn(changed), scenes_asked), strict=True):
        names, related, pair = scene.names_colours, scene.relation, len(scene.groups) == 2
        asked = {"object": True, "count": True, "colour": names, "position": related, "binding": names and pair}
        for part in PARTS:
            right = parts.get(part, True)
            assert getattr(verdict, part) is (right if asked[part] else None), (part, scene)
        assert verdict.satisfied == all(parts.get(part, True) for part in PARTS if asked[part])


def test_swapped_colours_are_a_wrong_binding_alone():
    asked = [scene for scene in SOME if len(scene.groups) == 2]
    colours = [
        {group.colour: other.colour for group, other in zip(s.groups, s.groups[::-1], strict=True)} for s in asked
    ]
    swapped = [
        recoloured(scene, lambda o, swap=swap: swap[o.colour]) for scene, swap in zip(asked, colours, strict=True)
    ]
    expect(swapped, asked, binding=False)
    assert any(not verdict.satisfied for verdict in verdicts(drawn(swapped), asked))


def test_another_colour_is_wrong_where_colours_are_named():
    used = [{group.colour for group in scene.groups} for scene in SOME]
    changed = [recoloured(scene, lambda o, u=u: another(u, COLOURS)) for scene, u in zip(SOME, used, strict=True)]
    expect(changed, SOME, colour=False, binding=False)


def test_one_object_of_another_colour_breaks_the_binding():
    asked = [scene for scene in SOME if scene.task == "composition" and scene.groups[0].count == 2]
    changed = []
    for scene in asked:
        first, *rest = scene.objects
        first = dataclasses.replace(first, colour=another({o.colour for o in scene.objects}, COLOURS))
        changed.append(dataclasses.replace(scene, objects=(first, *rest)))
    assert len(asked) > 5
    expect(changed, asked, binding=False)  # the other one still has the colour


def test_an_object_more_or_less_is_a_wrong_count():
    several = [scene for scene in SOME if scene.groups[0].count > 1]
    fewer = [dataclasses.replace(scene, objects=scene.objects[1:]) for scene in several]
    expect(fewer, several, count=False)
    single = [scene for scene in SOME if len(scene.objects) == 1]
    more = []
    for scene in single:
        [thing] = scene.objects
        x, y = (0.22 if place > 0.5 else 0.78 for place in (thing.x, thing.y))
        small = dataclasses.replace(thing, radius=0.14)  # so that the two do not touch
        more.append(dataclasses.replace(scene, objects=(small, dataclasses.replace(small, x=x, y=y))))
    expect(more, single, count=False)
    other = [
        dataclasses.replace(
            s, objects=(s.objects[0], dataclasses.replace(s.objects[1], shape=another({t.shape}, SHAPES)))
        )
        for s, t in ((scene, scene.objects[0]) for scene in more)
    ]
    expect(other, single, count=False)  # everything requested is there, and something else


def test_a_missing_group_is_a_missing_object():
    pairs = [scene for scene in SOME if len(scene.groups) == 2]
    alone = [dataclasses.replace(scene, objects=scene.objects[: scene.groups[0].count]) for scene in pairs]
    expect(alone, pairs, object=False, count=False, colour=False, position=False, binding=False)
    nothing = [dataclasses.replace(scene, objects=()) for scene in SOME]
    expect(nothing, SOME, **dict.fromkeys(PARTS, False))


def test_another_shape_is_a_wrong_object():
    asked = [scene for scene in SOME if len(scene.groups) == 1]
    other = [
        dataclasses.replace(
            scene,
            objects=tuple(dataclasses.replace(o, shape=another({o.shape}, SHAPES[::-1])) for o in scene.objects),
        )
        for scene in asked
    ]
    expect(other, asked, object=False, count=False)


def test_mirrored_scenes_have_the_wrong_position():
    asked = [scene for scene in SOME if scene.relation]
    moved = []
    for scene in asked:
        axis = "x" if scene.relation in ("left of", "right of") else "y"
        mirrored = [dataclasses.replace(o, **{axis: 1 - getattr(o, axis)}) for o in scene.objects]
        moved.append(dataclasses.replace(scene, objects=tuple(mirrored)))
    expect(moved, asked, position=False)
    opposite = [dataclasses.replace(scene, relation=INVERSE[scene.relation]) for scene in asked]
    expect(moved, opposite)  # as the opposite caption asks


def thing(x, y, radius=0.1, shape="circle", colour="red"):
    return Found(shape, colour, x, y, radius, 0.0)


@pytest.mark.parametrize("relation", INVERSE)
def test_relations_are_between_boxes(relation):
    slack = 1 / 32
    for gap, expected in ((0.1, True), (0, True), (-slack + 1e-6, True), (-slack - 1e-6, False), (-0.4, False)):
        near, far = 0.3, 0.3 + 0.1 + 0.15 + gap
        for across in (0.1, 0.9):
            places = ((near, across), (far, across)) if "of" in relation else ((across, near), (across, far))
            first, second = thing(*places[0]), thing(*places[1], radius=0.15)
            if relation in ("right of", "below"):
                first, second = second, first
            assert stands(first, relation, second) is expected
            assert stands(second, INVERSE[relation], first) is expected
            assert not stands(second, relation, first)


def test_every_object_has_to_stand_where_it_is_asked_to():
    groups = (Group(2, "red", "circle"), Group(2, "blue", "square"))
    scene = Scene("composition", groups, "left of", (), "white")
    circles = [thing(0.2, 0.2), thing(0.2, 0.8)]
    squares = [thing(x, 0.5, shape="square", colour="blue") for x in (0.5, 0.8)]
    assert check(scene, [*circles, *squares]) == Verdict(True, True, True, True, True)
    assert check(scene, [circles[0], thing(0.6, 0.8), *squares]) == Verdict(True, True, True, False, True)
    # an unnamed object is one too many, and an extra object is wrong anywhere
    assert check(scene, [*circles, *squares, thing(0.9, 0.1, shape=None)]) == Verdict(True, False, True, True, True)
    assert check(scene, [*circles, *squares, thing(0.1, 0.5)]) == Verdict(True, False, True, True, True)
    assert check(scene, [*circles, squares[0], thing(0.9, 0.1, shape="square", colour=None)]).binding is False
    assert not check(scene, []).satisfied
    single = Scene("single object", (Group(1, "red", "circle"),), None, (), "white")
    assert check(single, [thing(0.5, 0.5, colour=None)]) == Verdict(True, True, None, None, None)
    assert check(single, [thing(0.5, 0.5, colour="blue")]).satisfied


def draw_by_hand(inside, colour=(25, 50, 225), background=(255, 255, 255), size=32, fine=16):
    """uint8 [1, 3, S, S]: the points that are `inside` by x and y from the centre, as fractions of the side."""
    points = (np.arange(size * fine) + 0.5) / (size * fine) - 0.5
    mask = inside(points[None, :], points[:, None]).reshape(size, fine, size, fine).mean((1, 3))
    colour, background = (np.array(value, dtype=float)[:, None, None] for value in (colour, background))
    return torch.from_numpy(np.rint(background + mask * (colour - background)).astype(np.uint8))[None]


def test_other_drawings_are_no_shape():
    others = {
        "rectangle": lambda x, y: (abs(x) < 0.26) & (abs(y) < 0.18),
        "ellipse": lambda x, y: (x / 1.6) ** 2 + y**2 < 0.03,
        "triangle upside down": lambda x, y: (abs(x) < (0.2 - y) / 2) & (abs(y) < 0.2),
        "ring": lambda x, y: (x**2 + y**2 < 0.04) & (x**2 + y**2 > 0.01),
        "half a disc": lambda x, y: (x**2 + y**2 < 0.04) & (y < 0),
        "x": lambda x, y: ((abs(x + y) < 0.09) | (abs(x - y) < 0.09)) & (abs(x) < 0.2) & (abs(y) < 0.2),
        "two discs that touch": lambda x, y: (abs(x) - 0.14) ** 2 + y**2 < 0.0225,
    }
    for name, inside in others.items():
        [found] = find_objects(draw_by_hand(inside))[0]
        assert (found.shape, found.colour) == (None, "blue"), name
    disc = lambda x, y: x**2 + y**2 < 0.04
    [found] = find_objects(draw_by_hand(disc, (200, 110, 60)))[0]  # brown, 83 from orange
    assert (found.shape, found.colour) == ("circle", None)
    [found] = find_objects(draw_by_hand(disc, (200, 40, 60), (225, 235, 250)))[0]  # nearly red on nearly white
    assert (found.shape, found.colour) == ("circle", "red")
    assert (found.x, found.y, found.radius) == pytest.approx((0.5, 0.5, 0.2), abs=0.004)


def test_a_disc_with_a_lump_or_a_bite_fits_less_and_less():
    def misfit(size):
        [lump] = find_objects(
            draw_by_hand(lambda x, y: (x**2 + y**2 < 0.04) | ((x > 0) & (x < 0.2 + size) & (abs(y) < 0.05)))
        )[0]
        [bite] = find_objects(draw_by_hand(lambda x, y: (x**2 + y**2 < 0.04) & ((x < 0.2 - size) | (abs(y) > 0.05))))[0]
        return [lump.misfit, bite.misfit]

    sizes = np.array([misfit(size) for size in (0, 0.05, 0.1, 0.2)])
    assert (np.diff(sizes, axis=0) > 0).all()
    assert (sizes[0] < 0.001).all()
    assert (sizes[1] < scenes.MISFIT).all()  # a small lump does not make it another shape
    assert (sizes[3] > scenes.MISFIT).all()


def test_misfit_is_what_its_formula_says():
    """A square of side 12 with a hole of side 4: its area, 128 pixels, fits a centred square of side √128 best."""
    image = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    image[:, :, 10:22, 10:22] = torch.tensor([25, 50, 225], dtype=torch.uint8).view(3, 1, 1)
    image[:, :, 14:18, 14:18] = 255
    [found] = find_objects(image)[0]
    seen = (image[0, 0] == 25).double().numpy()
    edges = np.arange(33)
    errors = {}
    for shape, area in {"square": 4.0, "circle": np.pi, "diamond": 2.0, "cross": 20 / 9}.items():
        exact = coverage(shape, 16, 16, (128 / area) ** 0.5, edges, edges)[8:24, 8:24]
        errors[shape] = ((seen[8:24, 8:24] - exact) ** 2).sum() / (exact**2).sum()
    assert found.shape is None
    assert min(errors, key=errors.get) == "square"
    assert found.misfit == pytest.approx(errors["square"], rel=1e-9)
    assert found.radius == pytest.approx(128**0.5 / 2 / 32, rel=1e-9)


def test_specks_are_nothing_and_blots_are_something():
    scene = make_scene("train", 0)
    image = render(scene, 32)
    for side, extra in ((2, 0), (3, 1)):
        marked = image.clone()
        marked[:, 28 : 28 + side, 2 : 2 + side] = torch.tensor([220, 20, 40], dtype=torch.uint8).view(3, 1, 1)
        found = find_objects(marked[None])[0]
        assert len(found) == 1 + extra
        assert check(scene, found).satisfied is not bool(extra)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_connected_pixels_have_one_number(seed, share):
    mask = torch.rand(3, 17, 17, generator=torch.Generator().manual_seed(seed)) < share
    for found, one in zip(scenes._label(mask), mask, strict=True):
        expected, count = ndimage.label(one.numpy(), np.ones((3, 3)))
        pairs = set(zip(found.flatten().tolist(), expected.flatten().tolist(), strict=True))
        assert len(pairs) == count + (not one.all())  # a one-to-one mapping
        assert found.bool().equal(one)


@pytest.mark.parametrize("shape", SHAPES)
def test_areas_and_middles_of_areas(shape):
    covered = coverage(shape, 32, 32, 20, np.arange(65), np.arange(65))
    area, below = scenes.MOMENTS[shape]
    assert covered.sum() == pytest.approx(area * 400, rel=1e-9)
    centre = covered.sum(1) @ (np.arange(64) + 0.5) / covered.sum()
    assert centre == pytest.approx(32 + below * 20, abs=0.005)  # a pixel's share counts at its centre
    assert covered.sum(0) @ (np.arange(64) + 0.5) / covered.sum() == pytest.approx(32, abs=1e-9)


def test_a_score_is_of_tasks_and_of_parts():
    asked = [SOME[0], SOME[7], SOME[14], SOME[4], SOME[5], SOME[6]]  # three single objects, position, binding, all
    blank = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    images = drawn(asked)
    images[1] = images[5] = blank
    images[4] = render(recoloured(asked[4], lambda o: asked[4].objects[0].colour), 32)
    score = score_scenes(images, asked)
    assert score.tasks == {"single object": 2 / 3, "position": 1, "binding": 0, "composition": 0}
    assert score.overall == pytest.approx((2 / 3 + 1) / 4)
    assert score.parts == {"object": 4 / 6, "count": 4 / 6, "colour": 0, "position": 1 / 2, "binding": 0}
    assert score.to_dict() == {
        "overall": score.overall,
        **score.tasks,
        **{f"{part} right": share for part, share in score.parts.items()},
    }


def test_what_cannot_be_scored_is_named():
    images = drawn(SOME[:2])
    for wrong, words in (
        (images[:1], "there are 1 images and 2 scenes"),
        (images[:, :1], r"images have shape \(2, 1, 32, 32\); \[B, 3, S, S\] is needed"),
        (images[:, :, :16], r"images have shape \(2, 3, 16, 32\)"),
    ):
        with pytest.raises(InputError, match=words):
            score_scenes(wrong, SOME[:2])
    with pytest.raises(InputError, match="0 images and 0 scenes"):
        score_scenes(images[:0], [])


# --- on the command line -------------------------------------------------------------------------------------------


TEXT_MODEL = dataclasses.replace(TEXT_SIZES["text-nano/8"], width=16, blocks=1, field_width=4, text_features=12)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("scenes") / "run"
    config = config_for(folder, data="shapes", model=TEXT_MODEL, text_encoder=str(tiny_folder), cache_text=False)
    sampling = dataclasses.replace(config.sampling, steps=2, guidance=2.0)
    config = dataclasses.replace(config, steps=1, sampling=sampling)
    list(train(config, CPU))
    return Run(folder)


def evaluate(*arguments):
    main(["evaluate", *map(str, arguments)])


def test_a_text_run_samples_captions_and_is_scored_once(text_run, monkeypatch, capsys):
    command = (text_run.folder, "--reference", "shapes:held-out", "--network", "scenes", "--draw", 9, "--batch-size", 4)
    evaluate(*command)
    [row] = text_run.metrics()["evaluations"]
    assert row["settings"]["reference"] == "shapes:held-out"
    assert row["scores"]["overall"] == 0
    assert row["scores"]["true drawings"] == 1
    assert set(row["scores"]) == {
        *("overall", "colour", "position", "binding", "composition", "true drawings"),
        *(f"{part} right" for part in PARTS),
    }
    monkeypatch.setattr("pixnerd.evaluation.Samples", None)
    capsys.readouterr()
    evaluate(*command)
    assert "9 images against shapes:held-out, captions shown: overall 0, colour 0," in capsys.readouterr().out
    assert text_run.metrics()["evaluations"] == [row]


@pytest.mark.parametrize("classes", ["equal", "random"])
def test_each_caption_is_compared_with_its_own_sample(text_run, monkeypatch, capsys, classes):
    """A model that renders the caption it is given, recognised by its features, is right every time."""
    asked = []

    class Encoder:
        name, content, features, length = "asked", "", 12, 16

        def __call__(self, captions):
            asked.extend(captions)
            return torch.tensor([float(len(asked) - len(captions) + i) for i in range(len(captions))]).view(-1, 1, 1)

    by_caption = {scene.captions[0]: scene for scene in (make_scene("train", index) for index in range(20_000))}

    def draw(model, text, sampling, *, unconditional, **options):
        assert unconditional.flatten().tolist() == [0.0]  # the empty caption is encoded first
        assert asked[0] == ""
        return to_float(drawn([by_caption[asked[int(number)]] for number in text.flatten()]))

    monkeypatch.setattr("pixnerd.conditions.caption_encoder", lambda config, device: Encoder())
    monkeypatch.setattr("pixnerd.evaluation.sample", draw)
    evaluate(text_run.folder, "--network", "scenes", "--draw", 30, "--batch-size", 7, "--classes", classes)
    row = text_run.metrics()["evaluations"][-1]
    assert row["settings"]["classes"] == classes
    assert row["scores"]["overall"] == 1
    assert len(asked) == 31
    spread = [make_scene("train", image * 20_000 // 30).captions[0] for image in range(30)]
    assert (asked[1:] == spread) == (classes == "equal")


def test_evaluate_refuses_what_shows_no_scenes(text_run, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            evaluate(*arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    scored = ("--network", "scenes", "--draw", 4)
    assert "use --draw alone" in refused(text_run.folder, "--network", "scenes")
    assert "use --draw alone" in refused(text_run.folder, *scored, "--weights", "x")
    assert "against 'synthetic': it needs a text model" in refused(text_run.folder, *scored, "--reference", "synthetic")
    assert "'digits' has none: choose another --reference" in refused(text_run.folder, *scored, "--reference", "digits")
    list(train(config_for(tmp_path / "run", steps=1), CPU))
    assert "it needs a text model" in refused(tmp_path / "run", *scored, "--reference", "shapes")
