from pathlib import Path

import nbformat
import pytest

from pixnerd import InputError
from pixnerd.explore import parameters
from pixnerd.explore.parameters import check_parameters, folder_of_run

from ..notebooks.notebook_files import SCALE

DEFAULTS = 'out = "runs/x"\nsteps = [4, 2]\nrates = [0.1]\nflags = []\nfast = True\nseed = 0'


def executed(injected, *others):
    """The contents of `In` in a notebook that papermill ran; the first entry is always empty."""
    return ["", "before = 1", DEFAULTS, "# Parameters\n" + injected, *others]


@pytest.mark.parametrize(
    "injected",
    [
        "",
        "seed = 3",
        'out = "y"\nsteps = [1]',
        "rates = [1]",
        "rates = [1, 0.5]",
        'flags = ["--clip", "1"]',
        "steps = []",
        "fast = False",
    ],
)
def test_parameters_that_the_notebook_has(injected):
    check_parameters(executed(injected, "later = 1", "check_parameters(In)"))


def test_a_notebook_without_papermill_may_hold_anything():
    check_parameters(["", DEFAULTS, "check_parameters(In)", "anything = 1"])


@pytest.mark.parametrize(
    ("injected", "sentence"),
    [
        ("seeds = 3", "unknown parameter seeds; this notebook has out, steps, rates, flags, fast, seed"),
        ("seed = 1\nstep = 2\nbefore = 3", "unknown parameter step, before; "),
        ("steps = 5", "parameter steps is 5; it has to be a list of whole numbers"),
        ('out = ["y"]', "it has to be text"),
        ('rates = ["2e-4"]', r"parameter rates is \['2e-4'\]; it has to be a list of numbers"),  # YAML needs 2.0e-4
        ('flags = "--clip"', "parameter flags is '--clip'; it has to be a list"),
        ("fast = 1", "it has to be True or False"),
        ("seed = True", "it has to be a whole number"),
        ("seed = None", "it has to be a whole number"),
        ("seed = 1.0", "parameter seed is 1.0; it has to be a whole number"),
        ("steps = [1, 2.5]", r"parameter steps is \[1, 2.5\]; it has to be a list of whole numbers"),
    ],
)
def test_parameters_that_the_notebook_does_not_have(injected, sentence):
    with pytest.raises(InputError, match=sentence):
        check_parameters(executed(injected))


def test_the_cell_that_ran_last_counts():
    """In a live notebook cells are rerun: the default parameters and the injected ones, even twice in a row."""
    again = [*executed("seed = 1"), DEFAULTS, "# Parameters\nseed = 2", "# Parameters\nseeds = 3"]
    with pytest.raises(InputError, match="unknown parameter seeds"):
        check_parameters(again)
    check_parameters([*again, "# Parameters\nseed = 3"])


def test_a_run_without_a_name_lands_in_the_project_wherever_the_notebook_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(folder_of_run("x")) == Path(__file__).parents[2] / "runs" / "x"
    monkeypatch.setattr(parameters, "__file__", str(tmp_path / "a" / "b" / "parameters.py"))
    assert Path(folder_of_run("x")) == tmp_path / "runs" / "x"


@pytest.mark.parametrize("path", SCALE, ids=lambda path: path.stem)
def test_no_parameter_leads_out_of_the_folder_where_papermill_was_started(path):
    cells = nbformat.read(path, as_version=4).cells
    (defaults,) = (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    assert "../" not in defaults
