import io
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from PIL import Image, ImageSequence
from torchvision.transforms.functional import pil_to_tensor

from pixnerd import InputError, ModelConfig, TextModelConfig, data, load, sample, training
from pixnerd.checkpoints import newest_checkpoint, save_model
from pixnerd.explore import demo as module
from pixnerd.explore.demo import Request, animation, demo, frame, number, open_run, picture, states, table, whole_number
from pixnerd.sampling import SamplingConfig
from pixnerd.solvers import SOLVERS, STUDENT_SOLVER

from ..conftest import randomised
from .serving import voila

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "demo.ipynb"
SMALL = {"width": 16, "heads": 2, "blocks": 1, "patch_size": 8, "image_size": 16, "field_width": 4, "field_blocks": 1}
SAMPLING = SamplingConfig(steps=3, solver="heun", guidance=2.5, interval=(0.2, 0.8), shift=1.5)  # no default value
CPU = torch.device("cpu")


def train(folder, model, **changes):
    """A run of one step, then with random EMA weights, so that every setting has a visible effect."""
    options = {"data": "synthetic", "steps": 1, "batch_size": 2, "compile": "off", "sampling": SAMPLING, **changes}
    list(training.train(training.TrainConfig(out=str(folder), model=model, **options), CPU))
    save_model(randomised(load(folder)), newest_checkpoint(folder / "checkpoints") / "ema.safetensors")
    return folder


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "default_device", lambda: CPU)
        yield


@pytest.fixture(scope="module")
def class_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("demo") / "class", ModelConfig(**SMALL))


@pytest.fixture(scope="module")
def text_run(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("demo")
    model = TextModelConfig(**SMALL, text_blocks=1, text_features=12, text_length=6)

    def captioned(name, image_size):
        gratings = original(name, image_size)
        gratings.captions = [("a red cat",)] * len(gratings)
        return gratings

    original = data.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIXNERD_DATA", str(folder / "data"))
        patch.setattr(data, "load", captioned)
        yield train(folder / "text", model, text_encoder=str(tiny_folder))


@pytest.fixture(params=["class_run", "text_run"])
def any_run(request):
    return request.getfixturevalue(request.param)


def request_for(path, **changes):
    subject = "a red cat" if path.name == "text" else 3
    return Request(**{"subject": subject, "size": 16, "count": 2, "seed": 5, "steps": 4, "guidance": 2.0, **changes})


def sampled(path, **changes):
    return list(states(open_run(path), request_for(path, **changes)))


def decoded(content):
    """uint8 [3, H, W] of every frame in a file."""
    return [pil_to_tensor(image.convert("RGB")) for image in ImageSequence.Iterator(Image.open(io.BytesIO(content)))]


# --- from settings to pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "base"), [(16, None), (8, None), (32, (16, 16)), (20, (16, 16))])
def test_the_images_are_those_of_sample(any_run, size, base):
    settings = {"steps": 3, "solver": "adams2", "guidance": 2.0, "interval": (0.3, 0.9), "shift": 2.0, "seed": 7}
    model = load(any_run)
    if any_run.name == "text":
        text, empty = open_run(any_run).conditions.encode(["a blue dog", ""])
        expected = sample(
            model, torch.stack([text] * 2), unconditional=empty, size=(size, size), base_resolution=base, **settings
        )
        got = sampled(any_run, subject="a blue dog", size=size, **settings)
    else:
        expected = sample(model, [4, 4], size=(size, size), base_resolution=base, **settings)
        got = sampled(any_run, subject=4, size=size, **settings)
    assert [state.step for state in got] == [1, 2, 3]
    assert got[-1].x.equal(expected)


def test_the_picture_shows_every_image_with_square_pixels():
    images = torch.linspace(-1, 1, 5 * 3 * 4 * 4).view(5, 3, 4, 4)  # a table of 2 rows and 3 columns
    pixels = decoded(picture(images))[0]
    factor = 256 // 12
    assert pixels.shape == (3, 2 * 4 * factor + 6, 3 * 4 * factor + 8)
    assert pixels.equal(table(images))
    top, left = 4 * factor + 4, 4 * factor + 4  # of the last image, in the second row and column
    last = pixels[:, top : top + 4 * factor, left : left + 4 * factor]
    expected = ((images[4] + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
    assert last[:, ::factor, ::factor].equal(expected)
    assert last[:, factor - 1 :: factor, factor - 1 :: factor].equal(expected)
    assert decoded(picture(torch.zeros(1, 1, 300, 300)))[0].shape == (3, 300, 300)  # large images keep their size


def test_the_animation_has_a_frame_for_each_step_and_ends_at_the_images(any_run):
    path = sampled(any_run)
    frames = decoded(animation([frame(state) for state in path]))
    assert len(frames) == 4
    side = table(path[-1].x).shape[2]
    for state, pixels in zip(path, frames, strict=True):
        assert pixels[:, :, :side].equal(table(state.x))  # lossless
        assert pixels[:, :, -side:].equal(table(state.image))
    assert frames[-1][:, :, :side].equal(decoded(picture(path[-1].x))[0])
    assert len(decoded(animation([frame(path[0])]))) == 1
    with Image.open(io.BytesIO(animation([frame(state) for state in path]))) as file:
        assert file.info["loop"] == 0


def test_frames_of_large_images_are_small(class_run):
    (state,) = sampled(class_run, size=128, count=16, steps=1)
    assert table(state.x).shape == (3, 4 * 130 + 2, 4 * 130 + 2)
    assert frame(state).size == (526, 261)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"count": 0}, "images is 0; it has to be 1 … 16"),
        ({"count": 17}, "images is 17"),
        ({"seed": -1}, "seed is -1; it cannot be negative"),
        ({"steps": 201}, "steps is 201; here it has to be at most 200"),
        ({"steps": 10**12}, "at most 200"),  # refused before the list of times is built
        ({"steps": 0}, "steps is 0"),
        ({"interval": (0.5, 0.5)}, r"interval is \(0.5, 0.5\); it needs"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"solver": "rk4"}, "solver 'rk4' is unknown"),
        ({"subject": "  "}, "prompt is empty"),
    ],
)
def test_a_request_refuses_invalid_values(class_run, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        request_for(class_run, **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": 12}, "image size 12x12 does not fit patches of 8"),
        ({"size": 17}, "height 17 cannot be shared by the 2 patches"),
        ({"size": 0}, "image size 0x0"),
        ({"size": 136}, "size is 136; here it has to be at most 8 · 16"),
        ({"subject": 11}, "label 11 is outside 0 … 10"),
        ({"subject": "a cat"}, "subject is 'a cat'; this model takes a class"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_any_step(class_run, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        states(open_run(class_run), request_for(class_run, **changes))


def test_a_text_model_wants_a_prompt(text_run):
    with pytest.raises(InputError, match="subject is 2; this model takes a prompt"):
        states(open_run(text_run), request_for(text_run, subject=2))


def test_fields_become_numbers_or_sentences():
    assert (whole_number("steps", " 12 "), number("shift", "1.5"), number("guidance", "3")) == (12, 1.5, 3.0)
    for text, shown in [("", "empty"), (" ", "empty"), ("2.5", "2.5"), ("ten", "ten")]:
        with pytest.raises(InputError, match=f"^steps is {shown}; a whole number is needed$"):
            whole_number("steps", text)
    for text, shown in [("", "empty"), ("nan", "nan"), ("inf", "inf"), ("1,5", "1,5")]:
        with pytest.raises(InputError, match=f"^shift is {shown}; a number is needed$"):
            number("shift", text)


def test_a_missing_run_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="gone does not exist and holds no run; a run's folder"):
        demo(tmp_path / "gone")


def test_the_package_does_not_need_widgets():
    code = "import sys; sys.modules['ipywidgets'] = None; import pixnerd, pixnerd.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the widgets, without a browser --------------------------------------------------------------------------------


def panel_for(path):
    panel = demo(path)
    panel.steps.value, panel.count.value = "2", 1
    if path.name == "text":
        panel.subject.value = "a red cat"
    return panel


def press(panel):
    """What the panel shows after a click on Draw."""
    panel.draw.click()
    assert not panel.draw.disabled
    return panel.images.value, panel.animation.value, panel.error.value


def test_the_controls_start_with_the_runs_settings(any_run):
    panel = demo(any_run)
    request = panel.request()
    assert {name: getattr(request, name) for name in vars(SAMPLING)} == vars(SAMPLING)
    assert (request.size, request.count, request.seed) == (16, 4, 0)
    assert panel.results[0].layout.visibility == "hidden"
    waiting = [panel.count, panel.interval, panel.seed, panel.steps, panel.guidance, panel.shift, panel.size]
    assert not any(control.continuous_update for control in waiting)
    images, movie, error = press(panel)
    assert error == ""
    assert panel.results[0].layout.visibility == "visible"
    assert panel.progress.value == panel.progress.max == 3
    path = list(states(open_run(any_run), request))
    assert images == picture(path[-1].x)
    assert movie == animation([frame(state) for state in path])


def test_a_run_that_guides_every_step_checks_the_box(tmp_path):
    folder = train(tmp_path / "run", ModelConfig(**SMALL), sampling=SamplingConfig(steps=2, interval=None))
    panel = demo(folder)
    assert panel.request().interval is None
    assert panel.interval.disabled
    panel.everywhere.value = False
    assert panel.request().interval == (0, 1)
    assert not panel.interval.disabled


CHANGES = {  # control → values, each of which changes the images
    "count": [2, 16],
    "seed": ["1", str(2**63 - 1)],
    "steps": ["1", "7"],
    "guidance": ["1", "0", "-2.5", "7"],
    "interval": [(0.0, 0.4), (0.6, 1.0)],
    "everywhere": [True],
    "shift": ["0.3", "4"],
    "solver": ["euler", "sde", "heun"],
    "size": ["8", "32", "18"],
}
WRONG = {  # control → (value, sentence)
    "seed": [
        ("", "seed is empty; a whole number is needed"),
        ("-1", "seed is -1"),
        ("1.5", "seed is 1.5"),
        (str(2**63), "below 2⁶³"),
    ],
    "steps": [("", "steps is empty"), ("0", "steps is 0"), ("201", "steps is 201"), ("<b>", "steps is &lt;b&gt;;")],
    "guidance": [("", "guidance is empty; a number is needed"), ("nan", "guidance is nan")],
    "interval": [((0.4, 0.4), "interval is (0.4, 0.4); it needs 0 ≤ low &lt; high ≤ 1")],
    "shift": [("", "shift is empty"), ("0", "shift is 0.0"), ("-1", "shift is -1.0")],
    "size": [
        ("", "size is empty"),
        ("0", "image size 0x0"),
        ("20.5", "size is 20.5"),
        ("17", "image height 17 cannot"),
    ],
}


@pytest.mark.parametrize("control", CHANGES)
def test_every_control_changes_the_images(any_run, control):
    panel = panel_for(any_run)
    panel.steps.value = "4"
    seen = [press(panel)]
    for value in CHANGES[control]:
        getattr(panel, control).value = value
        images, movie, error = press(panel)
        assert error == "", value
        assert images != seen[-1][0], value
        assert movie != seen[-1][1], value
        seen.append((images, movie, error))


@pytest.mark.parametrize("control", WRONG)
def test_every_wrong_value_is_one_sentence(any_run, control):
    panel = panel_for(any_run)
    before = press(panel)
    right = getattr(panel, control).value
    for value, sentence in WRONG[control]:
        getattr(panel, control).value = value
        images, movie, error = press(panel)
        assert sentence in error
        assert (images, movie) == before[:2]
    getattr(panel, control).value = right
    assert press(panel) == before  # and the error is gone


def test_every_class_can_be_sampled(class_run):
    panel = panel_for(class_run)
    assert panel.subject.options == tuple((f"{18 * label} degrees ({label})", label) for label in range(10))
    drawings = set()
    for _, label in panel.subject.options:
        panel.subject.value = label
        drawings.add(press(panel)[0])
    assert len(drawings) == 10
    assert panel.error.value == ""


def test_prompts_are_sampled_and_an_empty_one_refused(text_run):
    panel = panel_for(text_run)
    drawings = set()
    for prompt in ("a red cat", "a blue cat", "dog"):
        panel.subject.value = prompt
        drawings.add(press(panel)[0])
    assert len(drawings) == 3
    panel.subject.value = " "
    assert "prompt is empty" in press(panel)[2]


def test_all_solvers_are_offered_and_work(class_run):
    panel = panel_for(class_run)
    for solver in panel.solver.options:
        panel.solver.value = solver
        assert press(panel)[2] == "", solver
    assert panel.solver.options == tuple(name for name in SOLVERS if name != STUDENT_SOLVER)


@pytest.mark.parametrize("broken", ["states", "animation"])
def test_an_exception_in_the_callback_is_seen(class_run, monkeypatch, broken):
    """ipywidgets only logs what a callback raises; the panel has to show it and must not swallow the traceback."""

    def fail(*_):
        raise RuntimeError("out of <memory>")

    panel = panel_for(class_run)
    before = press(panel)
    monkeypatch.setattr(module, broken, fail)
    images, movie, error = press(panel)
    assert "RuntimeError: out of &lt;memory&gt;" in error
    assert panel.progress.layout.display == "none"
    assert (images, movie) == before[:2]
    with pytest.raises(RuntimeError):
        panel._draw(panel.draw)  # raised again for the notebook's log
    monkeypatch.undo()
    assert press(panel) == before


# --- the notebook, and a browser -----------------------------------------------------------------------------------


def test_the_notebook_shows_the_panel_or_says_what_to_run_first(class_run, tmp_path, monkeypatch):
    sources = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    for run in (class_run, tmp_path / "gone"):
        exec("\n".join([sources[0], f"run = {str(run)!r}", *sources[1:]]), {})
    panel, words = shown
    assert press(panel)[2] == ""
    assert "gone" in words.data
    assert "Run `make quickstart` first" in words.data


@pytest.fixture
def served(class_run, tmp_path):
    """The address where Voila serves the notebook with a tiny run."""
    path = tmp_path / "demo.ipynb"
    papermill.execute_notebook(NOTEBOOK, path, {"run": str(class_run)}, prepare_only=True)
    with voila(path) as address:
        yield address


def test_draws_in_a_browser(browser, served):
    page = browser.new_page()
    page.set_default_timeout(300_000)  # the first page waits for a kernel that imports torch
    page.goto(served)
    draw = page.get_by_role("button", name="Draw")
    draw.wait_for()
    pictures = "[...document.querySelectorAll('img.widget-image')].map(image => image.src)"
    empty = page.evaluate(pictures)
    assert len(empty) == 2

    def images_after(before):
        """The images' addresses, once both have changed and are loaded."""
        script = f"""before => {pictures}.every((address, i) => address !== before[i])
            && [...document.querySelectorAll('img.widget-image')].every(image => image.naturalWidth > 100)"""
        page.wait_for_function(script, arg=before)
        return page.evaluate(pictures)

    draw.click()
    first = images_after(empty)
    page.get_by_label("seed").fill("")
    draw.click()
    page.get_by_text("seed is empty; a whole number is needed").wait_for()
    assert page.evaluate(pictures) == first
    page.get_by_label("seed").fill("9")
    draw.click()
    images_after(first)
    assert page.get_by_text("seed is empty").count() == 0
