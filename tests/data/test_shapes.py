import hashlib
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pixnerd import InputError, data
from pixnerd.data import shapes
from pixnerd.data.shapes import BACKGROUNDS, COLOURS, SHAPES, TASKS, Group, Object, Scene, coverage, make_scene, render

# the same shapes again, each as a test of whether a point in the box from −1 to 1 is inside
INSIDE = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": lambda x, y: (abs(x) <= (y + 1) / 2) & (y <= 1),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,
    "star": lambda x, y: _in_star(x, y),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 1 / 3) & (np.maximum(abs(x), abs(y)) <= 1),
}
AREAS = {
    "circle": math.pi,
    "square": 4,
    "triangle": 2,
    "diamond": 2,
    "star": 10 * 0.45 * math.sin(math.pi / 5) / 2,
    "cross": 4 - 4 * (2 / 3) ** 2,
}
places = st.floats(6, 10, allow_subnormal=False)
radii = st.floats(0.3, 5, allow_subnormal=False)


def _in_star(x, y):
    """Folded into a tenth of the circle, from a tip to a notch, the star is one side of a straight line."""
    turn = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)  # from the nearest tip, 0 … 36°
    along, across = np.hypot(x, y) * np.cos(turn), np.hypot(x, y) * np.sin(turn)
    notch_along, notch_across = 0.45 * np.cos(np.pi / 5), 0.45 * np.sin(np.pi / 5)
    return across * (1 - notch_along) <= (1 - along) * notch_across


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=25, deadline=None)
@given(x=places, y=places, radius=radii)
def test_coverage_is_the_share_of_points_inside(shape, x, y, radius):
    fine = 50  # points along a side of a pixel
    points = (np.arange(16 * fine) + 0.5) / fine
    inside = INSIDE[shape]((points - x) / radius, (points[:, None] - y) / radius)
    expected = np.broadcast_to(inside, (16 * fine,) * 2).reshape(16, fine, 16, fine).mean((1, 3))
    found = coverage(shape, x, y, radius, np.arange(17), np.arange(17))
    assert np.abs(found - expected).max() < 2.1 / fine  # points misjudge a length by less than one, along x and along y


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=50, deadline=None)
@given(x=places, y=places, radius=radii)
def test_coverage_adds_up_to_the_area_around_its_middle(shape, x, y, radius):
    covered = coverage(shape, x, y, radius, np.arange(17), np.arange(17))
    assert covered.min() >= 0
    assert covered.max() <= 1
    assert covered.sum() == pytest.approx(AREAS[shape] * radius**2, rel=1e-9)
    # exact areas: a pixel has the mean of its four quarters, and another window sees the same
    quarters = coverage(shape, 2 * x, 2 * y, 2 * radius, np.arange(33), np.arange(33))
    assert np.allclose(quarters.reshape(16, 2, 16, 2).mean((1, 3)), covered, atol=1e-9)
    assert np.allclose(coverage(shape, x, y, radius, np.arange(5, 12), np.arange(7, 9)), covered[7:8, 5:11], atol=1e-9)
    mirrored = coverage(shape, 16 - x, y, radius, np.arange(17), np.arange(17))
    assert np.allclose(mirrored[:, ::-1], covered, atol=1e-9)


def test_no_radius_makes_a_disc_of_nothing():
    """Squares of some numbers round differently in arrays and alone; the root of their difference was NaN."""
    with np.errstate(all="raise"):
        for radius in np.random.default_rng(0).uniform(3, 7.5, 2000):
            for value in (radius, float(radius)):
                covered = coverage("circle", 8.0, 8.25, value, np.arange(17), np.arange(17))
                assert covered.sum() == pytest.approx(math.pi * radius**2, rel=1e-9)


def test_colours_are_far_apart_and_far_from_every_background():
    pairs = itertools.combinations([*COLOURS.values(), *BACKGROUNDS.values()], 2)
    assert min(math.dist(a, b) for a, b in pairs) >= 115


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rendering_is_the_background_and_the_colour_in_proportion(shape):
    thing = Object(shape, "orange", 0.45, 0.55, 0.22)
    scene = Scene("colour", (Group(1, "orange", shape),), None, (thing,), "grey")
    for size in (32, 45):
        image = render(scene, size)
        assert image.dtype == torch.uint8
        assert image.shape == (3, size, size)
        corner, middle = image[:, 0, 0].tolist(), image[:, round(0.55 * size), round(0.45 * size)].tolist()
        assert (corner, middle) == ([120, 120, 120], [255, 125, 0])
        share = (image.double() - 120).mean((1, 2)) / (torch.tensor([255, 125, 0]) - 120)
        assert torch.allclose(share, torch.full_like(share, AREAS[shape] * 0.22**2), atol=0.005)


def test_a_rendering_of_twice_the_size_is_the_same_picture():
    for index in range(40):
        scene = make_scene("train", index)
        halved = F.avg_pool2d(render(scene, 64).double(), 2)
        assert (halved - render(scene, 32).double()).abs().max() <= 1  # both are rounded


NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# (shape, its colour) and (first, relation, second) as in the book's sentence about the split
KEPT_COLOURS = {"green circle", "pink square", "blue triangle", "yellow diamond", "red star", "cyan cross"}
KEPT_RELATIONS = {
    "circle left of square",
    "triangle left of star",
    "cross left of diamond",
    "square above circle",
    "star above triangle",
    "diamond above cross",
}


def read(caption):
    """A caption parsed independently: [(count, colour or None, shape), …] and the relation or None."""
    groups = []
    assert not re.search(r"\ba orange|\ban (?!orange)", caption)
    words = re.sub(r"^a single ", "a ", re.sub(r"^exactly ", "", caption))
    words = re.sub(r"^a (\w+) in (\w+)$", r"a \2 \1", words).replace(" to the ", " ")
    found = re.fullmatch(r"(.+?)(?: (left of|right of|above|below|and) (.+))?", words)
    for phrase in filter(None, found.group(1, 3)):
        number, *colour, noun = phrase.split()
        shape = noun if noun in SHAPES else noun.removesuffix("s") if noun[:-1] in SHAPES else noun.removesuffix("es")
        assert shape in SHAPES, caption
        assert (NUMBERS[number] == 1) == (noun == shape), caption
        groups.append((NUMBERS[number], colour[0] if colour else None, shape))
    return groups, found.group(2)


def holds(first, relation, second, gap):
    """Whether the boxes are in the relation, at least the gap apart."""
    if relation in ("right of", "below"):
        return holds(second, OPPOSITE[relation], first, gap)
    difference = second.x - first.x if relation == "left of" else second.y - first.y
    return difference - first.radius - second.radius >= gap


@settings(max_examples=300, deadline=None)
@given(split=st.sampled_from(["train", "held-out"]), index=st.integers(0, 19_999))
def test_every_caption_is_true_of_its_scene(split, index):
    scene = make_scene(split, index)
    assert len(set(scene.captions)) == len(scene.captions) >= 2
    for caption in scene.captions:
        groups, relation = read(caption)
        assert (len(groups), relation in OPPOSITE) == (len(scene.groups), scene.relation is not None)
        assert sum(count for count, _, _ in groups) == len(scene.objects)
        members = [[thing for thing in scene.objects if thing.shape == shape] for _, _, shape in groups]
        for things, (count, colour, _) in zip(members, groups, strict=True):
            assert len(things) == count
            assert len({thing.colour for thing in things}) == 1
            assert (colour is not None) == (scene.task in ("colour", "binding", "composition"))
            assert colour in (None, things[0].colour)
        if relation in OPPOSITE:
            assert all(holds(a, relation, b, 2 / 32 - 1e-9) for a in members[0] for b in members[1])


@settings(max_examples=300, deadline=None)
@given(split=st.sampled_from(["train", "held-out"]), index=st.integers(0, 19_999))
def test_objects_have_room(split, index):
    things = make_scene(split, index).objects
    assert len({(thing.shape, thing.colour) for thing in things}) == len({thing.shape for thing in things}) <= 2
    for thing in things:
        assert 0.14 <= thing.radius <= 0.24
        assert min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) >= thing.radius + 1.5 / 32 - 1e-9
    for a, b in itertools.combinations(things, 2):
        assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + 2 / 32 - 1e-9


def named(caption):
    """Every "colour shape" and every "shape relation shape" in a caption, in both orders of words."""
    groups, relation = read(caption)
    pairs = {f"{colour} {shape}" for _, colour, shape in groups if colour}
    if relation not in OPPOSITE:
        return pairs
    (_, _, first), (_, _, second) = groups
    return pairs | {f"{first} {relation} {second}", f"{second} {OPPOSITE[relation]} {first}"}


def test_training_never_shows_what_is_held_out():
    train, held_out = shapes.make_scenes("train"), shapes.make_scenes("held-out")
    assert (len(train), len(held_out)) == (20_000, 2_000)
    shown = {f"{thing.colour} {thing.shape}" for scene in train for thing in scene.objects}
    assert shown == {f"{c} {s}" for c in COLOURS for s in SHAPES} - KEPT_COLOURS  # and everything else is shown
    said = set().union(*(named(scene.captions[0]) for scene in train))
    assert not said & KEPT_RELATIONS
    relations = {f"{a} {r} {b}" for a, b in itertools.permutations(SHAPES, 2) for r in OPPOSITE}
    kept = KEPT_RELATIONS | {
        f"{b} {OPPOSITE[r]} {a}" for a, r, b in (re.split(r" (left of|above) ", words) for words in KEPT_RELATIONS)
    }
    assert {words for words in said if words in relations} == relations - kept
    for scene in held_out:
        for caption in scene.captions:
            assert named(caption) & (KEPT_COLOURS | KEPT_RELATIONS), caption
    train_captions, held_out_captions = (
        {caption for scene in scenes for caption in scene.captions} for scenes in (train, held_out)
    )
    assert not train_captions & held_out_captions
    assert len(train_captions) < 8_000  # the features of each take 12 KiB on disk


def test_tasks_alternate_and_choices_are_even():
    train = data.load("shapes", 32)
    assert train.classes == list(TASKS)
    assert train.labels[:14].tolist() == [*range(7), *range(7)]
    scenes = train.scenes
    for values, choices in (
        ([scene.background for scene in scenes], 3),
        ([scene.relation for scene in scenes if scene.relation], 4),
        ([scene.groups[0].count for scene in scenes if scene.task == "counting"], 4),
        ([scene.groups[0].shape for scene in scenes], 6),
    ):
        counts = Counter(values)
        assert len(counts) == choices
        expected = len(values) / choices
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values()), counts


PLACE = (0.41950350249945273, 0.31900192487794354, 0.1618184631905608)
PINNED = {
    "shapes": "debbf77fc56f0d88070ed41c6230a9a01c6e49ab29a60e91785b435188722828",
    "shapes:held-out": "363b4b38c3d7199ace87d9bc3bd58174f4a12cf543aba9a97a13538269bdfda6",
}


def test_the_data_set_never_changes():
    """Models trained on it, and their scores, are comparable only on the same scenes."""
    first = [make_scene("train", index).captions[0] for index in range(7)]
    assert first == [
        "a circle",
        "a triangle and a square",
        "three circles",
        "a red square",
        "a diamond left of a square",
        "a purple diamond and a green square",
        "two green triangles right of two orange circles",
    ]
    thing = make_scene("held-out", 2).objects[0]
    assert (thing.shape, thing.colour) == ("star", "red")
    assert (thing.x, thing.y, thing.radius) == pytest.approx(PLACE, abs=1e-12)
    for name, digest in PINNED.items():
        scenes = data.load(name, 32)
        content = hashlib.sha256()
        for index in range(0, len(scenes), 10):
            content.update("; ".join(scenes.captions[index]).encode())
            content.update(scenes.pixels(index).numpy().tobytes())
        assert content.hexdigest() == digest, name


def test_names_of_the_data_set():
    train, held_out = data.load("shapes", 16), data.load("shapes:held-out", 16)
    assert (len(train), len(held_out)) == (20_000, 2_000)
    image, label = held_out[5]
    assert (image.shape, TASKS[label]) == ((3, 16, 16), "position")
    assert train.captions[3] == ("a red square", "a square in red")
    with pytest.raises(InputError, match=r"'test' in data set 'shapes:test' is unknown; known words: train, held-out"):
        data.load("shapes:test", 16)
    with pytest.raises(InputError, match="shards:PATH, shapes, shapes:held-out"):
        data.load("forms", 16)
