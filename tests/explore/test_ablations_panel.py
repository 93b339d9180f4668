"""The explorer with a kernel: it trains a run that is missing, and the new dots join."""

import dataclasses
import shutil
from pathlib import Path

import ipywidgets
import papermill
import pytest
import yaml
from PIL import Image

from pixnerd.explore import ablations_panel as module
from pixnerd.explore.ablations_panel import Ablations
from pixnerd.recipes import RECIPES
from pixnerd.runs import Run

from ..studies.conftest import TINY
from . import synthetic
from .controls import move_every_control
from .serving import voila

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "explore.ipynb"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(synthetic.ROOT))
    yield
    ipywidgets.Widget.close_all()


@pytest.fixture
def project(tmp_path):
    """A project with a tiny study that nobody has made."""
    path = tmp_path / "notebooks" / "studies" / "tiny.yaml"
    path.parent.mkdir(parents=True)
    heads = {"head": TINY["axes"]["head"]}
    path.write_text(yaml.safe_dump(TINY | {"axes": heads, "seeds": [0]}, sort_keys=False))
    return tmp_path


def trained(panel, number):
    """Train a run and wait for it; everything that was reported of it."""
    said = []
    panel.observe(lambda change: said.append(change.new), "progress")
    panel._on_message(panel, {"do": "train", "study": "tiny", "index": number}, [])
    panel.training.join()
    return said


def test_a_missing_run_is_trained_and_joins(project, monkeypatch):
    monkeypatch.setattr(module, "PERIOD", 0)
    panel = Ablations(project)
    (study,) = panel.found["studies"]
    assert (study["runs"], [run["index"] for run in study["missing"]]) == ([], [0, 1])
    said = trained(panel, 1)
    assert said[0] == {"running": True, "study": "tiny", "index": 1, "line": "starting"}
    assert said[-1] == {"running": False, "error": ""}
    assert len(said) > 2
    (study,) = panel.found["studies"]
    assert [(run["index"], run["choices"]) for run in study["runs"]] == [(1, ["field"])]
    assert [run["index"] for run in study["missing"]] == [0]


def test_a_studys_folders_are_those_of_the_project(project):
    """Of its data and of its teacher, wherever the kernel runs."""
    (project / "pictures" / "a").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(project / f"pictures/a/{number}.png")
    study = project / "notebooks/studies/tiny.yaml"
    content = yaml.safe_load(study.read_text())
    content["settings"]["data"] = "folder:pictures"
    study.write_text(yaml.safe_dump(content, sort_keys=False))
    config = dataclasses.replace(RECIPES["digits-cpu"], out=str(project / "runs/teacher"))
    Run(config.out).begin(config).release()
    axes = {"steps": {"few": {"steps": 2}, "more": {"steps": 3}}}
    students = {"base": "student-cpu", "settings": {"teacher": "runs/teacher"}, "axes": axes, "seeds": [0]}
    (study.parent / "students.yaml").write_text(yaml.safe_dump(students, sort_keys=False))
    panel = Ablations(project)
    assert [entry["name"] for entry in panel.found["studies"]] == ["students", "tiny"]
    assert trained(panel, 0)[-1] == {"running": False, "error": ""}


def test_a_run_that_cannot_be_trained_says_why(project):
    panel = Ablations(project)
    (project / "notebooks/studies/tiny.yaml").write_text("base: nothing\n")
    assert "nothing" in trained(panel, 0)[-1]["error"]
    assert trained(Ablations(project), 0)[-1]["error"] == "study is 'tiny'; its file is needed to train a run of it"


def test_a_training_run_is_stopped(project, monkeypatch):
    closed = []

    def lines(*_, **__):
        try:
            while True:
                panel.stop()
                yield "step"
        finally:
            closed.append(True)

    monkeypatch.setattr(module, "launch", lines)
    panel = Ablations(project)
    assert trained(panel, 0)[-1] == {"running": False, "error": ""}
    assert closed == [True]


def test_an_exception_is_told(project, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no <room>")
        yield

    monkeypatch.setattr(module, "launch", broken)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    assert trained(Ablations(project), 0)[-1]["error"] == "RuntimeError: no <room>"


def test_the_address_belongs_to_voilas_page_alone(project, monkeypatch):
    monkeypatch.delenv("SERVER_SOFTWARE", raising=False)
    assert not Ablations(project).in_address
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5.12")
    assert Ablations(project).in_address


def test_the_notebook_under_voila(browser, project, recorded):
    """Every dot is there, the address follows, and a run that is trained from the page joins."""
    shutil.copytree(recorded / "data", project / "data")
    path = project / "explore.ipynb"
    papermill.execute_notebook(NOTEBOOK, path, {"project": str(project)}, prepare_only=True)
    page, said = browser.new_page(), []
    page.on("pageerror", lambda error: said.append(str(error)))
    with voila(path) as address:
        page.set_default_timeout(100_000)
        page.goto(f"{address}#study=noise&measure=fd&a=linear&b=field&at.prediction=v")
        page.wait_for_selector(".panel")
        assert page.locator(".panel").count() == 4
        move_every_control(page)
        page.locator("[data-key='select study']").select_option("tiny")
        page.locator("summary", has_text="2 runs of these two values not made yet").click()
        for number in (0, 1):
            page.get_by_role("button", name=f"train this one now run {number}").click()
            page.locator(".progress", has_text=f"run {number} of tiny").wait_for()
            assert page.evaluate("document.activeElement.dataset.key") == "stop"  # the button that was used is gone
            page.locator(".progress").wait_for(state="detached")
            assert page.evaluate("document.activeElement.localName") == "summary"
        page.wait_for_selector(".verdict")
        assert page.locator(".panel .mark").count() == 2
        assert page.locator(".missing summary").count() == 0
    assert said == []
