"""Does an image show its caption? For scenes of shapes this is computed without a network: find, name, compare.

An object is whatever stands out from the plain background. It gets the name of the nearest colour and of the shape
whose exact drawing fits best; then the caption is checked as in GenEval (Ghosh et al. 2310.11513).

Dimension letters: B images of S × S pixels, C colours, Y rows and X columns around an object.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.dataset import to_uint8
from ..data.shapes import COLOURS, CORNERS, INVERSE, SHAPES, TASKS, Relation, Scene, Shape, Task, coverage, render
from ..errors import InputError

Part = Literal["object", "count", "colour", "position", "binding"]
PARTS: tuple[Part, ...] = get_args(Part)

NEAR = 57.0  # of 0 … 255, half the smallest distance between two colours: nothing is near two of them
SPECK = 0.006  # share of the image's area: anything smaller is ignored; the smallest object in a scene has 0.025
EDGE = 2  # pixels around an object that are still compared with its shape's drawing
MISFIT = 0.15  # largest misfit of a named shape, see Found.misfit
SLACK = 1 / 32  # how far the boxes may overlap in x while one object still counts as left of the other


@dataclass(frozen=True)
class Found:
    """An object found in an image; lengths are fractions of the image's side."""

    shape: Shape | None
    """None: no shape fits"""
    colour: str | None
    """None: no colour is near"""
    x: float
    y: float
    radius: float
    """half the side of the box that the best shape fills"""
    misfit: float
    """Σ |seen − drawn|² / Σ |drawn|² over the pixels around, colours minus background; 0 for a perfect fit"""


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption an image shows; None for parts that the caption does not ask for."""

    object: bool
    """each of the caption's shapes is present"""
    count: bool
    """each shape in the right number and nothing else: no other shape, no unnamed object"""
    colour: bool | None
    """each colour in the caption is present, on any object"""
    position: bool | None
    """each object of the first shape is in the caption's relation to each of the second"""
    binding: bool | None
    """for two coloured shapes: every object has the colour of its own shape"""

    @property
    def satisfied(self) -> bool:
        """Whether the image shows everything in the caption, and nothing more."""
        return all(getattr(self, part) is not False for part in PARTS)


@dataclass(frozen=True)
class SceneScore:
    """Shares of images, 0 … 1."""

    tasks: dict[Task, float]
    """for each task, the share of its images that show their caption"""
    parts: dict[Part, float]
    """for each part, the share of images that show it among those whose caption asks for it"""

    @property
    def overall(self) -> float:
        """The mean over the tasks, as in GenEval."""
        return sum(self.tasks.values()) / len(self.tasks)

    def to_dict(self) -> dict[str, float]:
        """The entries of metrics.json."""
        parts = {f"{part} right": share for part, share in self.parts.items()}
        return {"overall": self.overall, **self.tasks, **parts}


def score_scenes(images: Tensor, scenes: Sequence[Scene]) -> SceneScore:
    """How many images show the caption of their scene.

    An image shows a caption if it has each shape in the right number, colour and position, and nothing else: a single
    extra object, or one that fits no shape, and it does not. Whatever the caption does not mention (the background,
    sizes, unnamed colours) may be anything. Specks do not count.

    Args:
        images: [B, 3, S, S], uint8 or floats in [−1, 1].
        scenes: B scenes; only their captions matter, not their exact positions and backgrounds.

    Raises:
        InputError: the images have another shape, or there are not as many scenes.
    """
    if len(images) != len(scenes) or not scenes:
        raise InputError(f"there are {len(images)} images and {len(scenes)} scenes; one scene per image is needed")
    verdicts = [check(scene, found) for scene, found in zip(scenes, find_objects(images), strict=True)]
    tasks = {}
    for task in TASKS:
        shown = [verdict.satisfied for verdict, scene in zip(verdicts, scenes, strict=True) if scene.task == task]
        if shown:
            tasks[task] = sum(shown) / len(shown)
    parts = {}
    for part in PARTS:
        asked = [getattr(verdict, part) for verdict in verdicts if getattr(verdict, part) is not None]
        if asked:
            parts[part] = sum(asked) / len(asked)
    return SceneScore(tasks, parts)


def true_score(scenes: Sequence[Scene], size: int) -> SceneScore:
    """The score of the scenes' own renderings at size × size pixels: how well the detector works."""
    return score_scenes(torch.stack([render(scene, size) for scene in scenes]), scenes)


def check(scene: Scene, found: Sequence[Found]) -> Verdict:
    """Compare the objects found in an image with the scene's caption."""
    members = [[thing for thing in found if thing.shape == group.shape] for group in scene.groups]
    there = all(members)
    counted = all(len(things) == group.count for things, group in zip(members, scene.groups, strict=True))
    colour = position = binding = None
    if scene.names_colours:
        seen = {thing.colour for thing in found}
        colour = all(group.colour in seen for group in scene.groups)
        if len(scene.groups) == 2:
            pairs = zip(members, scene.groups, strict=True)
            binding = there and all(thing.colour == group.colour for things, group in pairs for thing in things)
    if scene.relation:
        position = there and all(stands(a, scene.relation, b) for a in members[0] for b in members[1])
    return Verdict(there, counted and len(found) == sum(map(len, members)), colour, position, binding)


def stands(first: Found, relation: Relation, second: Found) -> bool:
    """Whether the first box ends before the second begins, in the relation's direction, allowing SLACK of overlap."""
    if relation in ("right of", "below"):
        return stands(second, INVERSE[relation], first)
    distance = second.x - first.x if relation == "left of" else second.y - first.y
    return distance >= first.radius + second.radius - SLACK


# --- finding objects -----------------------------------------------------------------------------------------------


def find_objects(images: Tensor) -> list[tuple[Found, ...]]:
    """The objects on the background of each image [B, 3, S, S], uint8 or floats in [−1, 1], the largest first.

    Objects are separated by the background between them: two that touch count as one, which no shape fits.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise InputError(f"images have shape {tuple(images.shape)}; [B, 3, S, S] is needed")
    pixels = (images if images.dtype == torch.uint8 else to_uint8(images)).cpu().double()
    return [found for batch in pixels.split(64) for found in _find(batch)]


def _find(pixels: Tensor) -> list[tuple[Found, ...]]:
    """The same for floats 0 … 255, a few images at a time."""
    border = torch.cat((pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]), dim=2)
    background = border.median(dim=2).values[:, :, None, None]  # [B, 3, 1, 1]
    inside = _coverage(pixels, background) > 0.5  # [B, S, S]
    things = _label(inside)  # [B, S, S]
    around = things
    for _ in range(EDGE):
        around = torch.where(around == 0, _largest_neighbour(around), around)
    core = things * (_largest_neighbour(~inside) == 0)  # pixels whose neighbours are inside too
    difference = (pixels - background).numpy()
    maps = (difference, background.numpy(), things.numpy(), around.numpy(), core.numpy())
    return [_name_all(*image) for image in zip(*maps, strict=True)]


def _coverage(pixels: Tensor, background: Tensor) -> Tensor:
    """[B, S, S]: how far each pixel lies along the line from the background to a colour, for the nearest such line.

    Args:
        pixels: [B, 3, S, S] in 0 … 255.
        background: [B, 3, 1, 1].
    """
    line = torch.tensor(list(COLOURS.values()), dtype=pixels.dtype)[:, :, None, None] - background[:, None]
    length = (line**2).sum(2)  # [B, C, 1, 1]
    difference = (pixels - background)[:, None]  # [B, 1, 3, S, S]
    share = (difference * line).sum(2) / length.clamp(min=1)  # [B, C, S, S]
    off = ((difference - share.clamp(0, 1)[:, :, None] * line) ** 2).sum(2)
    off = off.masked_fill(length < NEAR**2, torch.inf)  # a colour like the background's does not stand out
    return share.gather(1, off.argmin(1, keepdim=True))[:, 0]


def _largest_neighbour(values: Tensor) -> Tensor:
    """[B, S, S]: the largest value among a pixel and its eight neighbours."""
    return F.max_pool2d(values.float(), 3, stride=1, padding=1)


def _label(mask: Tensor) -> Tensor:
    """[B, S, S]: a number for each set of pixels connected by edges or corners; 0 outside of them."""
    labels = torch.arange(1.0, mask[0].numel() + 1).view_as(mask[0]) * mask
    while True:
        grown = _largest_neighbour(labels) * mask
        if grown.equal(labels):
            return labels
        labels = grown


def _name_all(
    difference: np.ndarray, background: np.ndarray, things: np.ndarray, around: np.ndarray, core: np.ndarray
) -> tuple[Found, ...]:
    """The objects of one image, the largest first.

    Args:
        difference: [3, S, S] from the background.
        background: [3, 1, 1].
        things, around, core: [S, S] the number of the object at each pixel, 0 for none: its inside; also the pixels
            around it; without those at its edge.
    """
    numbers, sizes = np.unique(things[things > 0], return_counts=True)
    found = []
    for index in np.argsort(-sizes, kind="stable"):
        if sizes[index] < SPECK * things.size:
            break
        inside, middle = things == numbers[index], core == numbers[index]
        own = (around == numbers[index]) | (around == 0)
        found.append(_name(difference, background[:, 0, 0], inside, own, middle if middle.any() else inside))
    return tuple(found)


def _name(
    difference: np.ndarray, background: np.ndarray, inside: np.ndarray, own: np.ndarray, core: np.ndarray
) -> Found:
    """The object whose pixels are `inside` [S, S], with those that may be its edge (`own`) and its middle (`core`)."""
    colour = np.median(difference[:, core], axis=1)  # [3], from the background
    distances = np.linalg.norm(np.array(list(COLOURS.values())) - background - colour, axis=1)  # [C]
    name = list(COLOURS)[distances.argmin()] if distances.min() < NEAR else None

    rows, columns = np.nonzero(inside)
    top, left = max(rows.min() - EDGE, 0), max(columns.min() - EDGE, 0)
    window = np.s_[top : rows.max() + EDGE + 1, left : columns.max() + EDGE + 1]
    own, seen = own[window], difference[:, *window] * own[window]  # [Y, X], [3, Y, X]
    share = np.tensordot(colour, seen, 1) / max(colour @ colour, 1)  # [Y, X]
    y, x = np.arange(top, top + len(own) + 1), np.arange(left, left + own.shape[1] + 1)
    area = max(share.sum(), 1)
    middle_x, middle_y = (share.sum(0) @ (x[:-1] + 0.5)) / area, (share.sum(1) @ (y[:-1] + 0.5)) / area
    best = None
    for shape in SHAPES:
        unit_area, unit_y = MOMENTS[shape]
        radius = (area / unit_area) ** 0.5
        box = (middle_x, middle_y - unit_y * radius, radius)
        drawn = colour[:, None, None] * (coverage(shape, *box, x, y) * own)
        misfit = ((seen - drawn) ** 2).sum() / max((drawn**2).sum(), 1)
        if best is None or misfit < best[0]:
            best = misfit, shape, box
    misfit, shape, box = best
    x, y, radius = (float(value) / len(inside) for value in box)
    return Found(shape if misfit < MISFIT else None, name, x, y, radius, float(misfit))


def _moments(shape: Shape) -> tuple[float, float]:
    """A shape's area in the box from −1 to 1, and how far its centroid lies below the box's centre."""
    if shape == "circle":
        return np.pi, 0.0
    x, y = CORNERS[shape].T
    turned = x * np.roll(y, -1) - np.roll(x, -1) * y  # twice the areas of the triangles between 0 and each edge
    area = turned.sum() / 2
    return area, (turned * (y + np.roll(y, -1))).sum() / 6 / area


MOMENTS = {shape: _moments(shape) for shape in SHAPES}
