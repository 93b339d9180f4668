"""Computed scenes of coloured shapes with captions and exact ground truth: a small text-to-image task.

"two red circles left of a blue square": captions like GenEval's (arXiv 2310.11513) for photographs, which
`metrics.scenes` checks without a network. Lengths are fractions of the image's side; x goes right, y down.

Dimension letters: S pixels along a side, E edges of a polygon, X columns and Y rows of the pixels around an object.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..randomness import Purpose, derived_seed
from .dataset import ImageDataset

Shape = Literal["circle", "square", "triangle", "diamond", "star", "cross"]
Relation = Literal["left of", "right of", "above", "below"]
Task = Literal["single object", "two objects", "counting", "colour", "position", "binding", "composition"]
Split = Literal["train", "held-out"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
TASKS: tuple[Task, ...] = get_args(Task)
COLOURS = {  # 0 … 255; any two are at least 115 apart, as is each from every background
    "red": (220, 20, 40),
    "orange": (255, 125, 0),
    "yellow": (255, 235, 40),
    "green": (20, 150, 50),
    "cyan": (60, 205, 230),
    "blue": (25, 50, 225),
    "purple": (140, 30, 190),
    "pink": (255, 130, 200),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (120, 120, 120), "black": (0, 0, 0)}
NUMBERS = ("no", "one", "two", "three", "four")
INVERSE: dict[Relation, Relation] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# what no training scene shows; for relations in either order of words
HELD_OUT_COLOURS: dict[Shape, str] = {
    "circle": "green",
    "square": "pink",
    "triangle": "blue",
    "diamond": "yellow",
    "star": "red",
    "cross": "cyan",
}
HELD_OUT_RELATIONS: set[tuple[Shape, Relation, Shape]] = {
    ("circle", "left of", "square"),
    ("triangle", "left of", "star"),
    ("cross", "left of", "diamond"),
    ("square", "above", "circle"),
    ("star", "above", "triangle"),
    ("diamond", "above", "cross"),
}
# only a caption that names a colour or a relation can name a held-out one
HELD_OUT_TASKS: tuple[Task, ...] = ("colour", "position", "binding", "composition")
IMAGES: dict[Split, int] = {"train": 20_000, "held-out": 2_000}

MARGIN = 1.5 / 32  # between an object and the image's edge
GAP = 2 / 32  # between the boxes of two objects
TRIES = 16  # positions tried for an object before the scene is started over
COUNTS = ((1, 1), (1, 2), (2, 1), (2, 2))  # of a composition's two groups; three would leave no room for the other


@dataclass(frozen=True)
class Object:
    """One shape, inside a square box with its centre at (x, y) and sides of 2·radius."""

    shape: Shape
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Group:
    """Objects that a caption names together, "two red circles"."""

    count: int
    colour: str
    shape: Shape


@dataclass(frozen=True)
class Scene:
    """The contents of an image: the objects, group by group, on a plain background."""

    task: Task
    groups: tuple[Group, ...]  # one or two, of different shapes and colours
    relation: Relation | None  # of each object in the first group to each in the second
    objects: tuple[Object, ...]
    background: str

    @property
    def names_colours(self) -> bool:
        """Whether the captions name the groups' colours; if not, any colours will do."""
        return self.task in ("colour", "binding", "composition")

    @property
    def captions(self) -> tuple[str, ...]:
        """Equivalent descriptions of the scene, the plainest first."""
        colours = [group.colour if self.names_colours else "" for group in self.groups]
        named = [_words(group, colour) for group, colour in zip(self.groups, colours, strict=True)]
        match self.task, self.relation:
            case "single object", _:
                return named[0], f"a single {self.groups[0].shape}"
            case "counting", _:
                number = NUMBERS[self.groups[0].count]
                shape = named[0].split()[-1]
                return f"{number} {shape}", f"exactly {number} {shape}"
            case "colour", _:
                return named[0], f"{_words(self.groups[0], '')} in {colours[0]}"
            case _, None:
                return " and ".join(named), " and ".join(reversed(named))
        first, second = named
        ways = (f"{first} {self.relation} {second}", f"{second} {INVERSE[self.relation]} {first}")
        if self.relation in ("left of", "right of"):
            ways += (f"{first} to the {self.relation} {second}",)
        return ways


def _words(group: Group, colour: str) -> str:
    """ "an orange circle", "two circles"."""
    noun = f"{colour} {group.shape}".strip()
    if group.count == 1:
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    return f"{NUMBERS[group.count]} {noun}{'es' if noun.endswith('s') else 's'}"


# --- composing a scene ---------------------------------------------------------------------------------------------


def has_held_out_colour(groups: Sequence[Group]) -> bool:
    """Whether a shape has the colour in which training never shows it."""
    return any(HELD_OUT_COLOURS[group.shape] == group.colour for group in groups)


def is_held_out_relation(groups: Sequence[Group], relation: Relation | None) -> bool:
    """Whether two shapes are in a relation that no training caption describes, in either order of words."""
    if relation is None:
        return False
    first, second = (group.shape for group in groups)
    return bool({(first, relation, second), (second, INVERSE[relation], first)} & HELD_OUT_RELATIONS)


def make_scene(split: Split, index: int) -> Scene:
    """Scene `index` of a split, always the same one; the tasks alternate."""
    # only random() is guaranteed to give the same numbers in every version of Python
    draw = random.Random(derived_seed(0, Purpose.SYNTHETIC_IMAGE, index, 1 + get_args(Split).index(split))).random
    tasks = TASKS if split == "train" else HELD_OUT_TASKS
    task = tasks[index % len(tasks)]
    while True:
        groups = _draw_groups(draw, task)
        relation = _pick(draw, RELATIONS) if task in ("position", "composition") else None
        colour, related = has_held_out_colour(groups), is_held_out_relation(groups, relation)
        if split == "train" and not (colour or related):
            break
        if split == "held-out" and (related or (colour and task != "position")):  # "position" names no colour
            break
    while (objects := _place(draw, groups, relation)) is None:
        pass
    return Scene(task, groups, relation, objects, _pick(draw, tuple(BACKGROUNDS)))


@functools.cache  # training at several sizes opens the data set once per size
def make_scenes(split: Split) -> tuple[Scene, ...]:
    """All scenes of a split; 20,000 take two seconds."""
    return tuple(make_scene(split, index) for index in range(IMAGES[split]))


T = TypeVar("T")


def _pick(draw: Callable[[], float], options: Sequence[T]) -> T:
    return options[int(draw() * len(options))]


def _draw_groups(draw: Callable[[], float], task: Task) -> tuple[Group, ...]:
    """One group, or two that differ in shape and colour."""
    shape, colour = _pick(draw, SHAPES), _pick(draw, tuple(COLOURS))
    if task in ("single object", "colour"):
        return (Group(1, colour, shape),)
    if task == "counting":
        return (Group(1 + int(draw() * 4), colour, shape),)
    other_shape = _pick(draw, [other for other in SHAPES if other != shape])
    other_colour = _pick(draw, [other for other in COLOURS if other != colour])
    first, second = _pick(draw, COUNTS) if task == "composition" else (1, 1)
    return Group(first, colour, shape), Group(second, other_colour, other_shape)


def _place(draw: Callable[[], float], groups: Sequence[Group], relation: Relation | None) -> tuple[Object, ...] | None:
    """Objects at random positions, GAP apart and in the relation; None if one finds no room in TRIES attempts."""
    members = [group for group in groups for _ in range(group.count)]
    smallest, largest = (0.15, 0.24) if len(members) <= 2 else (0.14, 0.18)
    axis = 1 if relation in ("above", "below") else 0
    placed: list[tuple[list[float], float]] = []  # centre and radius, as for "left of" and "above"
    for number, group in enumerate(members):
        radius = smallest + (largest - smallest) * draw()
        lowest, highest = [MARGIN + radius] * 2, [1 - MARGIN - radius] * 2
        if relation and group == groups[0]:
            highest[axis] -= 2 * smallest + GAP
        elif relation:
            lowest[axis] = max(centre[axis] + r for centre, r in placed[: groups[0].count]) + GAP + radius
        if lowest[axis] > highest[axis]:
            return None
        for _ in range(TRIES):
            centre = [low + (high - low) * draw() for low, high in zip(lowest, highest, strict=True)]
            if all(max(abs(centre[0] - x), abs(centre[1] - y)) >= radius + r + GAP for (x, y), r in placed):
                placed.append((centre, radius))
                break
        if len(placed) == number:
            return None
    if relation in ("right of", "below"):
        for centre, _ in placed:
            centre[axis] = 1 - centre[axis]
    return tuple(
        Object(group.shape, group.colour, *centre, radius)
        for group, (centre, radius) in zip(members, placed, strict=True)
    )


# --- drawing -------------------------------------------------------------------------------------------------------


def _star() -> list[tuple[float, float]]:
    """Five points on the unit circle, the notches at 0.45."""
    turns = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.45, 1.0)
    return list(zip(radii * np.sin(turns), -radii * np.cos(turns), strict=True))


ARM = 1 / 3  # half the width of a cross's arms
CORNERS: dict[Shape, np.ndarray] = {  # [E, 2] in the box from −1 to 1, clockwise on the screen; a circle has none
    shape: np.array(corners, dtype=np.float64)
    for shape, corners in {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
        "star": _star(),
        "cross": [
            *((-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM)),
            *((ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)),
        ],
    }.items()
}


def coverage(shape: Shape, x: float, y: float, radius: float, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape covers: exact areas, no sampling.

    Args:
        x, y, radius: centre of the shape's box and half the box's side, in pixels.
        columns: [X + 1] ascending edges of the pixel columns, in pixels.
        rows: [Y + 1] edges of the pixel rows, one pixel apart.

    Returns:
        [Y, X] float64 in 0 … 1.
    """
    if shape == "circle":
        return _disc_corners(columns - x, rows[:, None] - y, radius)
    x0, y0 = (CORNERS[shape] * radius + (x, y)).T[:, :, None]  # [E, 1] each
    x1, y1 = np.roll(x0, -1, axis=0), np.roll(y0, -1, axis=0)
    slanted = (x0 != x1)[:, 0]  # a vertical edge has no area above it
    x0, y0, x1, y1 = (value[slanted] for value in (x0, y0, x1, y1))
    slope = (y1 - y0) / (x1 - x0)
    at = np.clip(columns, np.minimum(x0, x1), np.maximum(x0, x1))  # [E, X + 1]
    below_top = (y0 + slope * (at - x0))[:, None] - rows[:-1, None]  # [E, Y, X + 1], from a row's top down to the edge
    # ∫ clip(edge − top, 0, 1) dx: how much of the row lies above the edge, up to each column's end
    clipped = np.clip(below_top, 0, 1)
    ramp = clipped**2 / 2 + np.maximum(below_top - 1, 0)
    flat = (slope == 0)[:, None]
    area = np.where(flat, clipped * at[:, None], ramp / np.where(flat, 1, slope[:, None]))
    signed = np.sign(x0 - x1)[:, None] * np.diff(area, axis=2)  # the lower edges run to the left
    return np.clip(signed.sum(0), 0, 1)


def _disc_corners(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """[Y, X] coverage by a disc around 0, from x [X + 1] and y [Y + 1, 1]: differences of the area left of and below
    each pixel corner."""

    square = radius * radius  # rounds like an array's square, unlike radius**2: no root of −1e-17, no arcsin past 1

    def primitive(u: np.ndarray) -> np.ndarray:  # of √(r² − u²)
        return (u * np.sqrt(square - u * u) + square * np.arcsin(u / radius)) / 2

    height = np.minimum(np.abs(y), radius)
    half = np.sqrt(square - height * height)  # of the chord at y
    end = np.clip(x, -half, half)
    cap = primitive(end) - primitive(-half) - height * (end + half)  # left of x and beyond the chord
    strip = 2 * (primitive(np.clip(x, -radius, radius)) - primitive(np.array(-radius)))
    below = np.where(y >= 0, cap, strip - cap)
    return np.clip(-np.diff(np.diff(below, axis=0), axis=1), 0, 1)


def render(scene: Scene, size: int) -> Tensor:
    """uint8 [3, S, S]: every pixel is the mean of the colours in it, by area, in sRGB values."""
    background = np.array(BACKGROUNDS[scene.background], dtype=np.float64)[:, None, None]
    image = np.broadcast_to(background, (3, size, size)).copy()
    for thing in scene.objects:
        x, y, radius = thing.x * size, thing.y * size, thing.radius * size
        left, top = int(x - radius), int(y - radius)
        right, bottom = int(x + radius) + 1, int(y + radius) + 1
        covered = coverage(thing.shape, x, y, radius, np.arange(left, right + 1), np.arange(top, bottom + 1))
        colour = np.array(COLOURS[thing.colour])[:, None, None]
        image[:, top:bottom, left:right] += covered * (colour - background)
    return torch.from_numpy(np.rint(image).astype(np.uint8))


class Shapes(ImageDataset):
    """Scenes of one to four shapes in eight colours on white, grey or black; class = task.

    "train" has 20,000 scenes, without any shape in its held-out colour (HELD_OUT_COLOURS) or any caption with a
    held-out relation (HELD_OUT_RELATIONS); each of the 2,000 captions in "held-out" names at least one of these.
    """

    def __init__(self, image_size: int = 32, split: Split = "train"):
        self.scenes = make_scenes(split)
        super().__init__(image_size, 3, [TASKS.index(scene.task) for scene in self.scenes], TASKS)
        self.captions = [scene.captions for scene in self.scenes]

    def pixels(self, index: int) -> Tensor:
        return render(self.scenes[index], self.image_size)


def shapes_called(split: str, image_size: int) -> Shapes:
    """The scenes of a split, "train" (or "") or "held-out". Raises InputError for any other word."""
    if split and split not in get_args(Split):
        raise InputError(
            f"{split!r} in data set 'shapes:{split}' is unknown; known words: {', '.join(get_args(Split))}"
        )
    return Shapes(image_size, split or "train")
