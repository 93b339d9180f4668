"""A study's file: what it expands into, and what is refused with which sentence."""

import dataclasses
from pathlib import Path

import pytest

from pixnerd import InputError
from pixnerd.config import STUDENT_SAMPLING
from pixnerd.recipes import RECIPES
from pixnerd.runs import Run
from pixnerd.studies.study import expand, read_study
from pixnerd.studies.wanted import Measures

from .conftest import ROOT

OUT = Path("runs/tiny")


def plan_of(path):
    return expand(read_study(path), OUT)


def test_a_study_is_every_combination_with_every_seed(study_file):
    plan = plan_of(study_file())
    assert [run.index for run in plan] == list(range(8))
    assert [run.folder.name for run in plan[:5]] == [
        "0000-linear-v-seed-0",
        "0001-linear-x-seed-0",
        "0002-field-v-seed-0",
        "0003-field-x-seed-0",
        "0004-linear-v-seed-5",
    ]
    run = plan[6]
    assert (run.choices, run.repeat, run.arm) == ({"head": "field", "prediction": "v"}, "5", "field-v")
    config, recipe = run.config, RECIPES["digits-cpu"]
    assert (config.seed, config.out, config.data, config.steps) == (5, str(run.folder), "synthetic", 4)
    assert (config.model.head, config.model.prediction, config.model.width) == ("field", "v", 16)
    assert (config.learning_rate, config.betas, config.sampling.steps) == (recipe.learning_rate, recipe.betas, 1)
    assert read_study(study_file()).measure == Measures(samples=0, errors=4)


def test_a_seed_more_leaves_all_numbers_as_they_are(study_file):
    before = plan_of(study_file())
    after = plan_of(study_file(seeds=[0, 5, 2]))
    assert after[: len(before)] == before
    assert len(after) == 12


def test_adjust_and_leave_out_mean_the_combinations_that_they_name(study_file):
    adjust = [
        {"when": {"head": "linear", "prediction": "v"}, "settings": {"learning_rate": 0.001}},
        {"when": {"prediction": ["v", "x"]}, "settings": {"betas": [0.8, 0.9]}},
    ]
    plan = plan_of(study_file(adjust=adjust, leave_out=[{"head": "linear", "prediction": "x"}], seeds=[3]))
    assert [run.arm for run in plan] == ["linear-v", "field-v", "field-x"]
    assert [run.config.learning_rate for run in plan] == [0.001, 4e-3, 4e-3]
    assert {run.config.betas for run in plan} == {(0.8, 0.9)}


def test_numbers_name_values(study_file):
    plan = plan_of(study_file(axes={"patch": {4: {"model.patch_size": 4}, 8: {}}}, leave_out=[{"patch": 4}], seeds=[0]))
    assert [run.arm for run in plan] == ["8"]


LINEAR = {"linear": {"model.head": "linear"}, "field": {}}
BAD = {
    "unknown key": ({"axis": {}}, "key 'axis' is unknown; a study has base, settings, axes"),
    "no axes": ({"axes": None}, "axes is empty; a study varies at least one"),
    "empty axis": ({"axes": {"head": {}}}, "axis head is empty"),
    "axis of a list": ({"axes": {"head": ["linear"]}}, r"axis head is \['linear'\]; it has to be names"),
    "no seeds": ({"seeds": None}, "a study needs a base and seeds, or models"),
    "seeds twice": ({"seeds": [1, 1]}, r"seeds are \[1, 1\]; each may stand there only once"),
    "negative seed": ({"seeds": [-1]}, "seeds has -1; a seed is a whole number"),
    "seed of text": ({"seeds": ["a"]}, "seeds has 'a'; a seed is a whole number"),
    "seeds no list": ({"seeds": 3}, "seeds is 3; it has to be a list"),
    "unknown recipe": ({"base": "magic"}, "recipe 'magic' is unknown; known recipes: imagenet-256"),
    "base no text": ({"base": ["digits-cpu"]}, r"base is \['digits-cpu'\]; it has to be the name of a recipe"),
    "unknown setting": ({"settings": {"learning_rat": 1}}, "settings sets learning_rat, .* such as learning_rate"),
    "group of settings": ({"settings": {"model": 1}}, "settings sets model, which is no setting"),
    "own setting": ({"settings": {"seed": 1}}, "settings sets seed, which the study decides"),
    "wrong kind": ({"settings": {"steps": "many"}}, "study tiny, linear-v: steps is 'many'; it has to be a whole"),
    "text of a number": ({"settings": {"learning_rate": "1e-3"}}, "learning_rate to the text '1e-3'; YAML wants"),
    "outside its range": ({"settings": {"steps": 0}}, "steps is 0; it has to be at least 1"),
    "no network": ({"settings": {"model.width": 18}}, "model.width 18 over 4 heads is 4.5 channels"),
    "unknown measure": ({"measure": {"sample": 3}}, "measure has 'sample'; it can have samples"),
    "measure outside": ({"measure": {"errors": 0}}, "measure.errors is 0; it has to be at least 1"),
    "unknown axis": ({"leave_out": [{"size": "big"}]}, "leave_out has axis 'size'; the study's axes are head, predict"),
    "unknown value": ({"leave_out": [{"head": "conv"}]}, "leave_out has head 'conv'; its values are linear, field"),
    "leaves nothing": ({"leave_out": [{"head": ["linear", "field"]}]}, "leave_out leaves no combination"),
    "names nothing": ({"leave_out": [{}]}, "leave_out names no axis"),
    "adjust": ({"adjust": [{"when": {"size": "big"}, "settings": {}}]}, "adjust has axis 'size'"),
    "adjust lacks when": ({"adjust": [{"settings": {}}]}, "an entry of adjust has settings; it needs"),
    "same settings": ({"axes": {"head": {"a": {}, "b": {"model.head": "field"}}}}, "a and b have the very same"),
    "two names": ({"axes": {"head": {"8": {}, 8: {}}}}, "axis head has '8' twice"),
    "one name": ({"axes": {"a": {"b": {}, "b-c": {"steps": 3}}, "d": {"c-e": {}, "e": {"clip": 2}}}}, "called b-c"),
    "truth": ({"axes": {"norm": {False: {}}}}, "axis norm has the name False; put names such as on, off"),
    "path": ({"axes": {"../head": LINEAR}}, "'../head' cannot name an axis or a value"),
    "column": ({"axes": {"seed": LINEAR}}, "an axis cannot be called 'seed'; index, model, seed are columns of rec"),
    "set twice": ({"axes": {"head": LINEAR, "b": {"field": {"model.head": "field"}}}}, "set model.head; let adjust"),
    "a teacher that is no name": ({"settings": {"teacher": 5}}, "teacher is 5; it has to be the name of a trained"),
    "long names": (
        {"axes": {"rate": {"x" * 220: {"learning_rate": 0.5}}}},
        r"xxx would be part of a folder's name of 232 letters; 200 are possible, so shorten",
    ),
    "models and base": ({"models": ["runs/a"]}, "a study of models, which are trained already, has no base"),
}  # fmt: skip


def test_students_have_their_teachers_network(study_file, tmp_path):
    config = RECIPES["digits-cpu"]
    Run(tmp_path / "teacher").begin(dataclasses.replace(config, data="synthetic"))
    ways = {name: {"distil": name} for name in ("shortcut", "meanflow")}
    settings = {"teacher": str(tmp_path / "teacher"), "steps": 9}
    plan = plan_of(
        study_file(base="student-cpu", settings=settings, axes={"distil": ways}, adjust=None, leave_out=None)
    )
    for run in plan:
        assert (run.config.distil, run.config.steps) == (run.choices["distil"], 9)
        assert (run.config.data, run.config.model) == ("synthetic", config.model)
        assert run.config.teacher_guidance == config.sampling.guidance
        assert run.config.sampling.solver == "map"


def test_a_student_of_a_recipe_for_velocities_is_sampled_as_students_are(study_file, tmp_path):
    Run(tmp_path / "teacher").begin(dataclasses.replace(RECIPES["digits-cpu"], data="synthetic"))
    settings = {"teacher": str(tmp_path / "teacher"), "steps": 9, "sampling.steps": 2}
    axes = {"distil": {name: {"distil": name} for name in ("shortcut", "fd")}}
    shortcut, fd = plan_of(study_file(base="digits-cpu", settings=settings, axes=axes, seeds=[0]))
    assert shortcut.config.sampling == dataclasses.replace(STUDENT_SAMPLING, steps=2)
    assert fd.config.sampling == shortcut.config.sampling
    assert shortcut.config.learning_rate == RECIPES["digits-cpu"].learning_rate


def test_merged_settings_may_be_replaced(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "base: digits-cpu\n"
        "settings: &all {steps: 9, batch_size: 4}\n"
        "axes: {rate: {low: &low {<<: *all, learning_rate: 0.1}, high: {<<: *low, learning_rate: 0.2}}}\n"
        "seeds: [0]\n"
    )
    assert [(run.config.steps, run.config.learning_rate) for run in plan_of(path)] == [(9, 0.1), (9, 0.2)]


@pytest.mark.parametrize(("parts", "sentence"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_a_study_is_one_sentence(study_file, parts, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        plan_of(study_file(**parts))
    assert "\n" not in str(caught.value)
    assert "tiny" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("axes: {a: {b: {}, b: {}}}", "is no YAML in line 1: 'b' stands twice"),
        ("base: a\nbase: b", "is no YAML in line 2: 'base' stands twice"),
        ("axes: {a: [", "is no YAML in line 1"),
        ("- 1", r"a study is \[1\]; it has to be names"),
        ("", "a study needs a base and seeds, or models"),
        ("\x00", "is no YAML"),
        ("a: &a {b: 1}\nc: {<<: *a, d: 1, d: 2}", "is no YAML in line 2: 'd' stands twice"),
    ],
)
def test_a_file_that_is_no_study(tmp_path, text, sentence):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=sentence) as caught:
        read_study(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="none.yaml does not exist"):
        read_study(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(InputError, match="bytes.yaml cannot be read as a study"):
        read_study(tmp_path / "bytes.yaml")
    with pytest.raises(InputError, match="cannot be read as a study: .*Is a directory"):
        read_study(tmp_path)


MODELS = {name: None for name in ("base", "settings", "seeds")}


def test_models_are_measured_with_every_sampling(study_file, tmp_path):
    from pixnerd.config import TrainConfig
    from pixnerd.runs import Run

    for name, seed in (("first", 3), ("second", 4)):
        Run(tmp_path / name).begin(TrainConfig(out=name, seed=seed))
    axes = {"guidance": {"none": {"sampling.guidance": 1.0}, "three": {"sampling.guidance": 3.0}}}
    plan = plan_of(study_file(**MODELS, models=["first", "second"], axes=axes))
    assert [run.folder.name for run in plan] == [
        "0000-none-model-0",
        "0001-three-model-0",
        "0002-none-model-1",
        "0003-three-model-1",
    ]
    assert [(run.model, run.config.seed, run.config.sampling.guidance) for run in plan[1:3]] == [
        ("first", 3, 3.0),
        ("second", 4, 1.0),
    ]
    with pytest.raises(InputError, match="settings|head linear sets model.head, which is no setting"):
        plan_of(study_file(**MODELS, models=["first"], axes={"head": LINEAR}))
    with pytest.raises(InputError, match="gone holds no run"):
        plan_of(study_file(**MODELS, models=["gone"], axes=axes))


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_book_are_studies(path):
    study = read_study(path)
    if not study.models:
        assert len(expand(study, OUT)) == len(list(study.combinations())) * len(study.seeds)
