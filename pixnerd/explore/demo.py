"""A panel that samples from any trained run: first the functions from settings to pictures, then their widgets.

Dimension letters: B images, C channels, H × W pixels.
"""

import dataclasses
import html
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from ..compiling import compile_to_sample
from ..conditions import Conditions, Subject, model_conditions
from ..config import Compile, SamplingConfig, TrainConfig
from ..data import to_uint8
from ..distributed import default_device
from ..errors import InputError
from ..model import PatchDenoiser
from ..model_source import find_model
from ..sampling import State, trajectory
from ..solvers import SOLVERS, STUDENT_SOLVER

MOST_IMAGES = 16
MOST_STEPS = 200  # the browser has to keep a frame for each
MOST_ENLARGED = 8  # times the side of the training images; 16 larger images do not fit in a laptop's memory
SIDE = 256  # approximate pixels of a table of images on the page
GAP = 2  # pixels between images


# --- from settings to pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Request(SamplingConfig):
    """What to sample, and how. Raises InputError when a value is outside its range."""

    subject: Subject
    """the prompt, for a text model, or the class"""
    size: int
    """pixels along a side of the images, H = W"""
    count: int = 4
    """number of images, 1 … MOST_IMAGES, all of the same subject"""
    seed: int = 0
    """seed of the noise; image i depends on (seed, i) alone"""

    def __post_init__(self):
        if isinstance(self.subject, str) and not self.subject.strip():
            raise InputError("prompt is empty; describe the image in a few words")
        if not 1 <= self.count <= MOST_IMAGES:
            raise InputError(f"images is {self.count}; it has to be 1 … {MOST_IMAGES}")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it cannot be negative")
        if self.steps > MOST_STEPS:
            raise InputError(f"steps is {self.steps}; here it has to be at most {MOST_STEPS}")
        super().__post_init__()


@dataclass(frozen=True)
class Trained:
    """What sampling needs of a trained model."""

    config: TrainConfig
    model: PatchDenoiser
    """with the moving average's weights"""
    conditions: Conditions
    """what the model is told"""


def open_run(path: str | Path, compile: Compile = "auto") -> Trained:
    """A trained model by its name, see `model_source`, and its settings, on a GPU if there is one.

    `compile` is that of `pixnerd sample`, for MOST_IMAGES images.

    Raises:
        InputError: there is no such model, it is damaged, its text encoder is missing, or torch.compile does not work.
    """
    source, device = find_model(path), default_device()
    model = source.load(device=device)
    config = source.config(model)
    compile_to_sample(compile, model, None, MOST_IMAGES, config.sampling)
    return Trained(config, model, model_conditions(model, config, device, source.class_names(model)))


def states(run: Trained, request: Request) -> Iterator[State]:
    """One State per step; the last one's x [B, C, H, W] is what `pixnerd.sample` returns with these settings.

    Above the size of the training images, the transformer stays at that size and the fields decode more pixels.

    Raises:
        InputError: at the call: a subject of the wrong kind, an unknown class or an unsuitable size.
    """
    trained, size = run.model.config.image_size, request.size
    if size > MOST_ENLARGED * trained:
        raise InputError(f"size is {size}; here it has to be at most {MOST_ENLARGED} · {trained}, the training size")
    if isinstance(request.subject, str) != (run.conditions.subject == "prompt"):
        raise InputError(f"subject is {request.subject!r}; this model takes a {run.conditions.subject}")
    config = SamplingConfig(
        **{field.name: getattr(request, field.name) for field in dataclasses.fields(SamplingConfig)}
    )
    return trajectory(
        run.model,
        run.conditions.encode([request.subject] * request.count),
        config,
        unconditional=run.conditions.nothing,
        seed=request.seed,
        size=(size, size),
        base_resolution=(trained, trained) if size > trained else None,
    )


def table(images: Tensor) -> Tensor:
    """Images [B, C, H, W] in [−1, 1], row by row in a square table: uint8 [3, rows·…, columns·…].

    Small images are enlarged by an integer factor, to about SIDE pixels for the table; every pixel stays a square.
    """
    columns = math.ceil(math.sqrt(len(images)))
    factor = max(1, SIDE // (columns * images.shape[-1]))
    pixels = to_uint8(images.cpu()).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return make_grid(pixels, nrow=columns, padding=GAP, pad_value=255)


def picture(images: Tensor) -> bytes:
    """A PNG of all images [B, C, H, W], see `table`."""
    return _bytes(_to_image(table(images)), "PNG")


def frame(state: State) -> Image.Image:
    """x_t on the left, the current estimate x̂ on the right, reduced to about 2·SIDE × SIDE pixels."""
    x, guess = table(state.x), table(state.image)
    gap = torch.full((3, x.shape[1], 4 * GAP), 255, dtype=torch.uint8)
    image = _to_image(torch.cat((x, gap, guess), 2))
    return image.reduce(max(1, image.width // (2 * SIDE)))


def animation(frames: Sequence[Image.Image]) -> bytes:
    """A lossless, looping WebP that plays for about three seconds and then shows the last frame for two."""
    times = [max(20, 3000 // len(frames))] * (len(frames) - 1) + [2000]  # milliseconds
    options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    return _bytes(frames[0], "WEBP", lossless=True, method=0, **options)


def whole_number(name: str, text: str) -> int:
    """The integer in a field called `name`. Raises InputError when the text is not an integer."""
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name} is {text.strip() or 'empty'}; a whole number is needed") from None


def number(name: str, text: str) -> float:
    """The number in a field called `name`. Raises InputError when the text is not a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name} is {text.strip() or 'empty'}; a number is needed")
    return value


def _to_image(pixels: Tensor) -> Image.Image:
    """uint8 [3, H, W]"""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _bytes(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- the widgets ---------------------------------------------------------------------------------------------------

X_T = "x<sub style='line-height: 0'>t</sub>"  # without this height the two pictures would not align


class Panel(widgets.VBox):
    """Controls on the left, initially with the run's own sampling settings; the resulting images on the right.

    Numbers are text fields, so that an empty or invalid one is reported in `error` instead of being replaced.
    """

    def __init__(self, run: Trained, name: str):
        self.run = run
        own, side = run.config.sampling, run.model.config.image_size
        if (names := run.conditions.names) is not None:
            options = [(names.title(label), label) for label in range(len(names))]
            self.subject = _control(widgets.Dropdown, "class", 0, options=options)
        else:
            self.subject = _control(widgets.Text, "prompt", "red heart", continuous_update=False)
        self.count = _control(widgets.IntSlider, "images", 4, min=1, max=MOST_IMAGES, continuous_update=False)
        self.seed = _field("seed", 0)
        self.steps = _field("steps", own.steps)
        self.guidance = _field("guidance", own.guidance)
        limits = {"min": 0, "max": 1, "step": 0.01, "readout_format": ".2g", "continuous_update": False}
        self.interval = _control(widgets.FloatRangeSlider, "while t in", own.interval or (0, 1), **limits)
        self.everywhere = _control(widgets.Checkbox, "guide every step", own.interval is None, indent=True)
        widgets.dlink((self.everywhere, "value"), (self.interval, "disabled"))
        self.shift = _field("shift", own.shift)
        student = run.model.config.student
        solvers = [STUDENT_SOLVER] if student else [solver for solver in SOLVERS if solver != STUDENT_SOLVER]
        self.solver = _control(widgets.Dropdown, "solver", own.solver, options=solvers)
        self.size = _field("size", side)
        self.draw = widgets.Button(description="Draw", button_style="primary", layout={"width": "auto"})
        self.draw.on_click(self._draw)
        self.progress = widgets.IntProgress(layout={"width": "auto", "display": "none"})
        self.error = widgets.HTML()
        self.images = widgets.Image(format="png", layout={"max_width": "100%"})
        self.animation = widgets.Image(format="webp", layout={"max_width": "100%"})

        classes = run.conditions.num_classes
        kind = "text to image" if classes is None else f"{classes} classes"
        other = f" · guided by itself here, and not by {html.escape(own.guide)}" if own.guide else ""
        title = widgets.HTML(f"<b>{html.escape(name)}</b> · {kind}, trained at {side} × {side} pixels{other}")
        sampling = [self.solver, self.steps, self.shift, self.guidance, self.interval, self.everywhere]
        controls = [self.subject, self.count, self.size, self.seed, *sampling, self.draw, self.progress, self.error]
        self.results = [
            _column(widgets.HTML("the images"), self.images),
            _column(widgets.HTML(f"on the way: {X_T}, and the current estimate x̂"), self.animation),
        ]
        for column in self.results:
            column.layout.visibility = "hidden"  # until there is something to show
        rows = {"flex_flow": "row wrap", "grid_gap": "8px 24px"}
        right = widgets.HBox(self.results, layout={**rows, "flex": "1 1 270px"})
        body = [widgets.VBox(controls, layout={"flex": "0 0 310px"}), right]
        super().__init__([title, widgets.HBox(body, layout=rows)])

    def request(self) -> Request:
        """The settings of the controls. Raises InputError naming the first invalid one."""
        return Request(
            subject=self.subject.value,
            count=self.count.value,
            size=whole_number("size", self.size.value),
            seed=whole_number("seed", self.seed.value),
            solver=self.solver.value,
            steps=whole_number("steps", self.steps.value),
            shift=number("shift", self.shift.value),
            guidance=number("guidance", self.guidance.value),
            interval=None if self.everywhere.value else self.interval.value,
        )

    def _draw(self, _: widgets.Button) -> None:
        self.error.value, self.draw.disabled = "", True
        try:
            self._show(self.request())
        except InputError as error:
            self._say(str(error))
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}")
            raise  # so that the notebook shows or logs the traceback
        finally:
            self.draw.disabled, self.progress.layout.display = False, "none"

    def _show(self, request: Request) -> None:
        path, frames = states(self.run, request), []
        self.progress.value, self.progress.max = 0, request.steps
        self.progress.layout.display = None
        for state in path:
            frames.append(frame(state))
            self.progress.value = state.step
        self.images.value, self.animation.value = picture(state.x), animation(frames)
        for column in self.results:
            column.layout.visibility = "visible"

    def _say(self, sentence: str) -> None:
        self.error.value = f'<div style="color: #c62828; line-height: 1.4">{html.escape(sentence)}</div>'


def _control(kind: type[widgets.Widget], label: str, value: object, **options) -> widgets.Widget:
    style = {"description_width": "80px"}
    return kind(value=value, description=label, style=style, layout={"width": "300px"}, **options)


def _column(*children: widgets.Widget) -> widgets.VBox:
    return widgets.VBox(children, layout={"align_items": "flex-start", "max_width": "100%"})


def _field(label: str, value: float) -> widgets.Text:
    return _control(widgets.Text, label, str(value), continuous_update=False)


def demo(path: str | Path, compile: Compile = "auto") -> Panel:
    """A panel that samples with the model called `path`, class- or text-conditional; show it as a cell's last line.

    `compile` "on" pays when many pictures are drawn; "auto" compiles only where one drawing takes minutes.

    Raises:
        InputError: there is no such model, it is damaged, its text encoder is missing, or torch.compile does not work.
    """
    return Panel(open_run(path, compile), str(path))
