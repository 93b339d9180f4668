"""The lessons' diagrams, notebooks/images/*.svg: python -m tests.notebooks.diagrams

One picture of PixNerd in which each lesson's part is lit, and close-ups. They have a light ground of their own, so that
they can be read on a dark page, and their text is text.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from .notebook_files import FOLDER

IMAGES = FOLDER / "images"
GROUND, INK, LINE, LIT, DIM = "#fbfbf8", "#222222", "#666666", "#ffcf70", "#e9e9e4"


@dataclass(frozen=True)
class Box:
    """A box around (x, y), in units of the drawing, with its text."""

    x: float
    y: float
    text: str
    width: float = 1.0
    height: float = 0.62


class Drawing:
    """Boxes and arrows on a ground of width × height units; a unit is an inch."""

    def __init__(self, width: float, height: float):
        self.figure = Figure((width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")
        self.axes.add_patch(Rectangle((0, 0), width, height, color=GROUND, linewidth=0))

    def box(self, box: Box, lit: bool) -> None:
        corner = box.x - box.width / 2 + 0.04, box.y - box.height / 2 + 0.04
        size = box.width - 0.08, box.height - 0.08
        style = {"facecolor": LIT if lit else DIM, "edgecolor": INK if lit else LINE, "linewidth": 1.6 if lit else 0.8}
        self.axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0.03", **style))
        self.words(box.x, box.y, box.text)

    def words(self, x: float, y: float, text: str, size: float = 8, **options: str) -> None:
        self.axes.text(x, y, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.3, **options)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points with a head at the last."""
        for start, end in pairwise(points[:-1]):
            self.axes.plot(*zip(start, end, strict=True), color=LINE, linewidth=1, solid_capstyle="round")
        head = {"arrowstyle": "-|>", "mutation_scale": 8, "shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(points[-2], points[-1], color=LINE, linewidth=1, **head))

    def save(self, path: Path) -> None:
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pixnerd", "font.family": "DejaVu Sans"}):
            self.figure.savefig(path, metadata={"Date": None, "Creator": None})


ROW, BELOW = 1.55, 0.5
PIXNERD = {
    "image": Box(0.65, ROW, "noisy\nimage $x_t$"),
    "patches": Box(1.9, ROW, "patches\nP × P"),
    "tokens": Box(3.1, ROW, "tokens\n[N, D]"),
    "blocks": Box(4.35, ROW, "transformer\nblocks", 1.1),
    "s": Box(5.65, ROW, "s for each\npatch", 1.0),
    "weights": Box(6.9, ROW, "its weights\n$W_1$, $W_2$", 1.05),
    "field": Box(8.2, ROW, "its field at\nevery pixel", 1.1),
    "velocity": Box(9.5, ROW, "velocity $v$", 1.05),
    "condition": Box(3.1, BELOW, "label\nor caption"),
    "time": Box(4.35, BELOW, "time $t$"),
    "places": Box(8.2, BELOW, "coordinates in\nthe patch", 1.2),
}
MAIN = ("image", "patches", "tokens", "blocks", "s", "weights", "field", "velocity")
LESSONS = {
    "pixnerd": set(PIXNERD),
    "pixnerd-01": {"places", "field"},
    "pixnerd-03": {"tokens", "blocks", "condition", "time"},
    "pixnerd-04": set(MAIN) | {"condition", "time"},
    "pixnerd-05": {"image", "time", "velocity"},
    "pixnerd-08": {"places", "field", "velocity"},
    "pixnerd-09": {"condition", "blocks"},
}


def edge(box: Box, side: str) -> tuple[float, float]:
    """The middle of a side of a box."""
    dx, dy = {"left": (-1, 0), "right": (1, 0), "top": (0, 1), "bottom": (0, -1)}[side]
    return box.x + dx * box.width / 2, box.y + dy * box.height / 2


def pixnerd(lit: set[str]) -> Drawing:
    """The whole model, with the boxes named in `lit` lit."""
    drawing = Drawing(10.15, 2.45)
    for first, second in pairwise(MAIN):
        drawing.arrow(edge(PIXNERD[first], "right"), edge(PIXNERD[second], "left"))
    blocks, s, field, image = (PIXNERD[name] for name in ("blocks", "s", "field", "image"))
    condition, time = PIXNERD["condition"], PIXNERD["time"]
    drawing.arrow(edge(time, "top"), edge(blocks, "bottom"))
    between = (condition.x, 1.03)
    drawing.arrow(edge(condition, "top"), between, (blocks.x - 0.3, 1.03), (blocks.x - 0.3, blocks.y - 0.31))
    drawing.arrow(edge(time, "right"), (s.x, BELOW), edge(s, "bottom"))
    drawing.arrow(edge(PIXNERD["places"], "top"), edge(field, "bottom"))
    drawing.arrow(edge(image, "top"), (image.x, 2.2), (field.x, 2.2), edge(field, "top"))
    drawing.words((image.x + field.x) / 2, 2.32, "the noisy pixels themselves", 7)
    for name, box in PIXNERD.items():
        drawing.box(box, name in lit)
    return drawing


def hypernetwork() -> Drawing:
    """How a patch's condition becomes the weights of its field."""
    drawing = Drawing(9.2, 3.3)
    top, row = 2.7, 1.0
    chain = [
        Box(0.85, row, "noisy values and\n64 coordinates", 1.45, 0.7),
        Box(2.55, row, "Linear\n(shared)", 0.95, 0.7),
        Box(3.85, row, "RMSNorm", 0.95, 0.7),
        Box(5.0, row, "· $W_1$", 0.75, 0.7),
        Box(5.95, row, "SiLU", 0.7, 0.7),
        Box(6.9, row, "· $W_2$", 0.75, 0.7),
        Box(8.35, row, "+, then RMSNorm,\nLinear (shared)", 1.5, 0.7),
    ]
    condition, generator = Box(2.55, top, "s of the patch\n[D]", 1.2), Box(4.2, top, "generator\n(Linear)", 1.1)
    unit = Box(5.95, top, "columns scaled\nto length 1", 1.3)
    drawing.arrow(edge(condition, "right"), edge(generator, "left"))
    drawing.arrow(edge(generator, "right"), edge(unit, "left"))
    for first, second in pairwise(chain):
        drawing.arrow(edge(first, "right"), edge(second, "left"))
    for matrix, shape in ((chain[3], "[W, R]"), (chain[5], "[R, W]")):
        drawing.arrow((unit.x, unit.y - 0.31), (unit.x, 1.95), (matrix.x, 1.95), edge(matrix, "top"))
        drawing.words(matrix.x + (0.33 if matrix is chain[5] else -0.33), 1.68, shape, 7)
    below = row - 0.62
    drawing.arrow((3.2, row), (3.2, below), (8.35, below), edge(chain[6], "bottom"))
    drawing.words(5.9, 0.22, "one field block; every pixel of the patch passes through the same two matrices", 7)
    for box in (*chain, condition, generator, unit):
        drawing.box(box, box in (condition, generator, unit, chain[3], chain[5]))
    return drawing


def training_step() -> Drawing:
    """What is computed in one step of the training."""
    drawing = Drawing(9.2, 2.6)
    pair = Box(0.85, 1.85, "image $x$, label y", 1.4), Box(0.85, 0.75, "noise ε, time $t$", 1.4)
    point = Box(2.75, 1.3, "$x_t = t\\,x + (1-t)\\,ε$", 1.65)
    network = Box(4.55, 1.3, "PixNerd", 1.0)
    loss = Box(6.05, 1.3, "mean of\n$(\\hat v - (x - ε))^2$", 1.35)
    step = Box(7.55, 1.3, "AdamW\nstep", 0.95)
    average = Box(8.65, 1.3, "average of\nweights", 0.95)
    for source in pair:
        drawing.arrow(edge(source, "right"), (1.75, source.y), (1.75, 1.3), edge(point, "left"))
    for first, second in ((point, network), (network, loss), (loss, step), (step, average)):
        drawing.arrow(edge(first, "right"), edge(second, "left"))
    drawing.arrow((1.55, 2.02), (4.55, 2.02), edge(network, "top"))
    drawing.words(3.3, 2.15, "the label, now and then withheld", 7)
    drawing.arrow((1.55, 0.55), (6.05, 0.55), edge(loss, "bottom"))
    drawing.words(3.8, 0.4, "the velocity of the pair", 7)
    drawing.arrow(edge(step, "top"), (7.55, 2.3), (4.85, 2.3), (4.85, 1.61))
    drawing.words(6.2, 2.42, "new weights", 7)
    for box in (*pair, point, network, loss, step, average):
        drawing.box(box, True)
    return drawing


def guidance() -> Drawing:
    """A guided step of the sampler."""
    drawing = Drawing(9.2, 2.2)
    state = Box(0.8, 1.1, "$x$ at time $t$", 1.25)
    both = Box(2.75, 1.65, "PixNerd, label y", 1.5), Box(2.75, 0.55, "PixNerd, no label", 1.5)
    out = Box(4.6, 1.65, "$v_c$", 0.7), Box(4.6, 0.55, "$v_u$", 0.7)
    mix = Box(6.25, 1.1, "$v = v_u + w\\,(v_c - v_u)$", 1.75)
    step = Box(8.15, 1.1, "solver: $x$ at\nthe next $t$", 1.35)
    for network, velocity in zip(both, out, strict=True):
        drawing.arrow(edge(state, "right"), (1.7, 1.1), (1.7, network.y), edge(network, "left"))
        drawing.arrow(edge(network, "right"), edge(velocity, "left"))
        drawing.arrow(edge(velocity, "right"), (5.15, velocity.y), (5.15, 1.1), edge(mix, "left"))
    drawing.arrow(edge(mix, "right"), edge(step, "left"))
    drawing.arrow(edge(step, "bottom"), (8.15, 0.12), (0.8, 0.12), edge(state, "bottom"))
    for box in (state, *both, *out, mix, step):
        drawing.box(box, box is mix)
    return drawing


def generate(folder: Path) -> list[Path]:
    """Draw all diagrams into a folder."""
    drawings = {name: pixnerd(lit) for name, lit in LESSONS.items()}
    drawings |= {"hypernetwork": hypernetwork(), "training-step": training_step(), "guidance": guidance()}
    for name, drawing in drawings.items():
        drawing.save(folder / f"{name}.svg")
    return [folder / f"{name}.svg" for name in drawings]


if __name__ == "__main__":
    for path in generate(IMAGES):
        print(path.relative_to(Path.cwd()))
