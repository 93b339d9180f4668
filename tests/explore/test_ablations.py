"""The index has what lies in the folders, and comparisons are those of pairs that differ in one switch."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from pixnerd import InputError
from pixnerd.cli import main, parse
from pixnerd.explore import ablations
from pixnerd.explore import index as module
from pixnerd.explore.index import LOOSE, index, measure_of
from pixnerd.recipes import RECIPES
from pixnerd.runs import SWEEP, Run
from pixnerd.studies.compare import Comparison
from pixnerd.studies.record import write_record
from pixnerd.studies.study import expand, read_study

from . import synthetic

FIXED = {"prediction": "v", "ratio": "1.5"}


@pytest.fixture
def study(recorded):
    """A study of the index, to change."""
    (found,) = index(recorded)["studies"]
    return found


def only(found, name):
    return next(study for study in found["studies"] if study["name"] == name)


# --- pairs and what they say -----------------------------------------------------------------------------------------


def test_comparisons_are_those_of_scipy_on_the_same_pairs(study):
    found = ablations.compared(study, "head", "linear", "field", "velocity_error", FIXED)
    two = [
        (one["measures"]["velocity_error"], other["measures"]["velocity_error"])
        for one, other in ablations.pairs(study, "head", "linear", "field")
        if FIXED.items() <= ablations.choices_of(study, one).items()
    ]
    differences = np.array([b - a for a, b in two])
    assert found.pairs == found.seeds == len(differences) == 6
    assert found.mean == pytest.approx(differences.mean())
    tested = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert found.p == pytest.approx(tested.pvalue)
    interval = stats.bootstrap((differences,), np.mean, method="percentile", rng=0).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(interval), abs=0.2 * differences.std())


def test_swapping_the_sides_negates_everything(study):
    words = {"better": "worse", "worse": "better", "higher": "lower", "lower": "higher"}
    for measure in study["runs"][0]["measures"]:
        there, back = (
            ablations.compared(study, "head", *arms, measure, FIXED)
            for arms in (("linear", "field"), ("field", "linear"))
        )
        assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))
        assert back.p == there.p
        said = ablations.verdict(there, measure)
        assert ablations.verdict(back, measure) == words.get(said, said)


def test_a_run_with_another_field_changes_no_pair(study):
    before = ablations.pairs(study, "head", "linear", "field")
    compared = ablations.compared(study, "head", "linear", "field", "fd", FIXED)
    for choices, seed in (
        (["linear", "epsilon", "1.5"], "0"),
        (["field", "v", "9"], "0"),
        (["field", "v", "1.5"], "77"),
    ):
        extra = {"index": 999, "choices": choices, "repeat": seed, "measures": {"fd": 1e6}, "curves": {}, "where": ""}
        study["runs"].append(extra)
    assert ablations.pairs(study, "head", "linear", "field") == before
    assert ablations.compared(study, "head", "linear", "field", "fd", FIXED) == compared


def test_every_pair_differs_in_its_switch_alone(study):
    for axis, values in study["axes"].items():
        found = ablations.pairs(study, axis, *values[:2])
        assert len(found) >= 10
        for one, other in found:
            assert ablations.only_switch(study, one, other) == axis


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {0: "field", 1: "x"},
            r"runs 0 and 1 of noise differ in head \(linear, field\) and also in prediction \(v, x\)",
        ),
        ({0: "field", 3: "5"}, r"differ in head \(linear, field\) and also in seed \(0, 5\)"),
        ({3: "5"}, "differ in the seed alone, which is no switch"),
        ({}, "runs 0 and 1 of noise differ in nothing"),
    ],
)
def test_two_runs_that_are_no_pair_are_refused_by_name(study, changes, sentence):
    first = ["linear", "v", "1.5", "0"]
    second = [changes.get(place, value) for place, value in enumerate(first)]
    runs = [{"index": number, "choices": run[:3], "repeat": run[3]} for number, run in enumerate((first, second))]
    with pytest.raises(InputError, match=sentence):
        ablations.only_switch(study, *runs)


def comparison(mean, low, high, p, seeds=6):
    return Comparison(mean, low, high, p, seeds, seeds)


@pytest.mark.parametrize(
    ("measure", "found", "words"),
    [
        ("fd", comparison(-2, -3, -1, 0.03), "better"),
        ("fd", comparison(2, 1, 3, 0.03), "worse"),
        ("recall", comparison(2, 1, 3, 0.03), "better"),
        ("sharpness", comparison(2, 1, 3, 0.03), "higher"),
        ("something_new", comparison(-2, -3, -1, 0.03), "lower"),
        ("fd", comparison(-2, -3, -1, 0.06), "undecided with 6 seeds"),
        ("fd", comparison(-2, -3, 0.1, 0.03), "undecided with 6 seeds"),
        ("fd", comparison(-2, -2, -2, 1.0, seeds=1), "undecided with 1 seed"),
        ("parameters", comparison(-2, -2, -2, 1.0, seeds=1), "better"),
        ("fd", comparison(0, 0, 0, 1.0), "no difference"),
    ],
)
def test_verdicts(measure, found, words):
    assert ablations.verdict(found, measure) == words


def test_the_command_makes_every_run_of_both_sides(study, recorded):
    line = ablations.command(study, "head", "linear", "field", FIXED)
    command = parse(shlex.split(line)[1:])
    plan = expand(read_study(recorded / command.study), recorded / "runs")
    wanted = [run.index for run in plan if run.choices["head"] != "shared" and FIXED.items() <= run.choices.items()]
    assert list(command.index) == wanted
    missing = ablations.command(study, "head", "linear", "field", {"prediction": "x", "ratio": "1.5"})
    assert 3 in parse(shlex.split(missing)[1:]).index


@pytest.mark.parametrize(
    ("switch", "sentence"),
    [
        (("size", "a", "b"), "switch is 'size'; noise has head, prediction, ratio"),
        (("head", "linear", "conv"), "head is 'conv'; noise has linear, field, shared"),
        (("head", "linear", "linear"), "head is 'linear' twice"),
    ],
)
def test_a_switch_that_does_not_exist_is_one_sentence(study, switch, sentence):
    for call in (
        lambda: ablations.pairs(study, *switch),
        lambda: ablations.compared(study, *switch, "fd", {}),
        lambda: ablations.command(study, *switch, {}),
    ):
        with pytest.raises(InputError, match=sentence):
            call()


# --- the index -------------------------------------------------------------------------------------------------------


def test_a_record_is_indexed_with_what_is_missing(study, recorded):
    assert (len(study["runs"]), [run["index"] for run in study["missing"]]) == (70, [3, 67])
    assert study["question"].startswith("Who carries the noise?")
    assert study["file"] == "data/ablations/noise/noise.yaml"
    assert list(study["axes"]) == ["head", "prediction", "ratio"]
    run = study["runs"][0]
    assert {"step", "loss", "gradient_norm", "error_by_t"} <= run["curves"].keys()
    assert study["settings"]["linear-v-0.4"]["model.head"] == "linear"
    assert study["settings"]["field-v-0.4"]["model.head"] == "field"
    assert "seed" not in study["settings"]["field-v-0.4"]
    assert all(sheet.startswith("data:image/webp;base64,") for sheet in study["sheets"].values())
    json.dumps(index(recorded), allow_nan=False)


def project_of_runs(tmp_path, count=4, **parts):
    """A project whose study has `count` runs in runs/noise, and no record; with the plan."""
    path = synthetic.copy_study(tmp_path, axes={"head": {"linear": {"model.head": "linear"}, "field": {}}}, **parts)
    study = read_study(path)
    plan = expand(study, tmp_path / "runs" / "noise")
    for run in plan[:count]:
        synthetic.make_run(run, study, np.random.default_rng(run.index))
    return path, plan


def test_own_runs_join_the_runs_of_the_record(tmp_path):
    path, _ = project_of_runs(tmp_path)
    synthetic.record(tmp_path, path, missing={2, 3, 7})
    entry = only(index(tmp_path), "noise")
    assert [run["index"] for run in entry["runs"]] == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert [run["where"].split("/")[0] for run in entry["runs"][:5]] == ["runs"] * 4 + ["data"]
    assert [run["index"] for run in entry["missing"]] == [7]
    assert only(index(tmp_path, own=False), "noise")["runs"][2]["index"] == 4


def test_runs_that_another_version_of_the_study_made_are_left_out(tmp_path):
    path, plan = project_of_runs(tmp_path)
    path.write_text(path.read_text().replace("model.field_width: 32", "model.field_width: 16"))
    found = index(tmp_path)
    assert only(found, "noise")["runs"] == []
    assert [entry["where"] for entry in found["left_out"]] == [f"runs/noise/{run.folder.name}" for run in plan[:4]]
    assert {entry["why"] for entry in found["left_out"]} == {"it was made by study noise when that was another one"}


def test_a_study_whose_file_is_lost_is_known_from_its_runs(tmp_path):
    path, _ = project_of_runs(tmp_path)
    path.unlink()
    entry = only(index(tmp_path), "noise")
    assert (entry["file"], entry["missing"], len(entry["runs"])) == ("", [], 4)
    assert entry["axes"] == {"head": ["linear", "field"]}
    assert entry["settings"] == {"linear": {"model.head": "linear"}, "field": {"model.head": "field"}}
    assert ablations.command(entry, "head", "linear", "field", {}) == "pixnerd sweep noise.yaml --index 0 1 2 3"


def test_a_study_of_trained_models_is_paired_by_model(tmp_path):
    base = dataclasses.replace(RECIPES["digits-cpu"], steps=200)
    models = [str(synthetic.loose_run(tmp_path, name, base).folder) for name in ("one", "two")]
    path = tmp_path / "notebooks" / "studies" / "when.yaml"
    path.parent.mkdir(parents=True)
    axes = {"head": {"linear": {"sampling.interval": [0.1, 1.0]}, "field": {"sampling.interval": [0.3, 0.9]}}}
    path.write_text(json.dumps({"models": models, "axes": axes}))
    study = read_study(path)
    for run in expand(study, tmp_path / "runs" / "when"):
        synthetic.make_run(run, study, np.random.default_rng(run.index), pictures=False)
    found = index(tmp_path)
    entry = only(found, "when")
    assert entry["repeat"] == "model"
    assert entry["settings"]["field"] == {"sampling.interval": [0.3, 0.9]}
    assert [run["repeat"] for run, _ in ablations.pairs(entry, "head", "linear", "field")] == models
    assert not any("when" in left["where"] for left in found["left_out"])


def test_a_record_of_students_needs_no_teacher(tmp_path):
    """In a clone, where nobody has trained one, its rows are shown all the same."""
    teacher = synthetic.loose_run(tmp_path, "teacher", dataclasses.replace(RECIPES["digits-cpu"], steps=200)).folder
    path = tmp_path / "notebooks" / "studies" / "students.yaml"
    path.parent.mkdir(parents=True)
    axes = {"head": {"linear": {}, "field": {"distil": "meanflow"}}}  # names that the synthetic figures know
    study = {"base": "student-cpu", "settings": {"teacher": str(teacher)}, "axes": axes, "seeds": [0]}
    path.write_text(json.dumps(study))
    study = read_study(path)
    plan = expand(study, tmp_path / "runs" / "students")
    for run in plan:
        synthetic.make_run(run, study, np.random.default_rng(run.index), pictures=False)
    with contextlib.chdir(tmp_path):
        write_record(path, study, plan)
    shutil.rmtree(tmp_path / "runs")
    found = index(tmp_path)
    entry = only(found, "students")
    assert [run["choices"] for run in entry["runs"]] == [["linear"], ["field"]]
    assert entry["settings"]["field"]["distil"] == "meanflow"
    assert not found["left_out"]


def test_a_study_that_nobody_made_lists_what_to_make(tmp_path):
    project_of_runs(tmp_path, count=0)
    entry = only(index(tmp_path), "noise")
    assert (entry["runs"], len(entry["missing"])) == ([], 12)
    assert entry["missing"][0] == {"index": 0, "choices": ["linear"], "repeat": "0", "state": "missing", "why": ""}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("metrics.json", "{", "metrics.json cannot be read as a run's metrics"),
        ("metrics.json", "[1]", "it holds list instead of an object"),
        ("metrics.json", '{"study": 3}', "it is damaged"),
        ("metrics.json", '{"study": {"scores": {"fd": "high"}}}', "it is damaged"),
        ("metrics.json", None, "stopped"),
        (f"{SWEEP}/planned.json", "{}", "it is damaged: KeyError: 'choices'"),
        (f"{SWEEP}/planned.json", '{"choices": {"head": 3}, "repeat": "0", "config": {}}', "its choices are no text"),
        (f"{SWEEP}/planned.json", '{"choices": {"tail": "x"}, "repeat": "0"', "cannot be read as a planned run"),
    ],
)
def test_a_broken_run_is_listed_and_the_others_stay(tmp_path, name, content, why):
    _, plan = project_of_runs(tmp_path)
    before = only(index(tmp_path), "noise")["runs"]
    path = plan[1].folder / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    found = index(tmp_path)
    assert [run["index"] for run in only(found, "noise")["runs"]] == [0, 2, 3]
    assert only(found, "noise")["runs"][0] == before[0]
    (entry,) = found["left_out"]
    assert entry["where"] == f"runs/noise/{plan[1].folder.name}"
    assert why in entry["why"]
    assert "\n" not in entry["why"]


def test_a_failed_run_says_why(tmp_path):
    _, plan = project_of_runs(tmp_path)
    (plan[2].folder / "metrics.json").unlink()
    (plan[2].folder / SWEEP / "failed.json").write_text('{"why": "the loss is nan"}')
    found = index(tmp_path)
    assert found["left_out"] == [{"where": f"runs/noise/{plan[2].folder.name}", "why": "failed: the loss is nan"}]
    state = next(run for run in only(found, "noise")["missing"] if run["index"] == 2)
    assert (state["state"], state["why"]) == ("failed", "the loss is nan")


@pytest.mark.parametrize("name", ["about.json", "rows.csv", "curves.json", "noise.yaml"])
def test_a_broken_record_is_listed(recorded, tmp_path, name):
    shutil.copytree(recorded / "data", tmp_path / "data")
    (tmp_path / "data/ablations/noise" / name).write_text("{ broken")
    found = index(tmp_path)
    assert found["studies"] == []
    assert [entry["where"] for entry in found["left_out"]] == ["data/ablations/noise"]


def test_there_may_be_nothing(tmp_path):
    assert index(tmp_path) == {"measures": {}, "studies": [], "left_out": []}
    assert "No study" in ablations.page(index(tmp_path))


# --- runs of no study ------------------------------------------------------------------------------------------------


BASE = dataclasses.replace(RECIPES["digits-cpu"], steps=200, log_every=50)
BASE = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, output_norm=False))


@pytest.fixture
def loose(tmp_path):
    """A project of seven training runs: two widths with seeds 0 and 1, another learning rate, and two that stopped."""
    wide = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, width=192))
    runs = {"a": BASE, "a-1": dataclasses.replace(BASE, seed=1), "wide": wide}
    runs |= {"wide-1": dataclasses.replace(wide, seed=1, checkpoint_every=7)}
    runs |= {"slow": dataclasses.replace(BASE, learning_rate=1e-3)}
    for place, (name, config) in enumerate(runs.items()):
        synthetic.loose_run(tmp_path, name, config, loss=0.4 - 0.05 * place)
    synthetic.loose_run(tmp_path, "stopped", dataclasses.replace(BASE, seed=2), steps=100)
    synthetic.loose_run(tmp_path, "nearly", dataclasses.replace(BASE, seed=3, steps=190))
    return tmp_path


def test_runs_of_no_study_are_paired_by_the_setting_in_which_they_differ(loose):
    found = index(loose)
    study = only(found, LOOSE)
    assert study["axes"] == {"model.width": ["128", "192"], "learning_rate": ["0.004", "0.001"]}
    there = ablations.pairs(study, "model.width", "128", "192")
    assert [[run["where"] for run in pair] for pair in there] == [["runs/a", "runs/wide"], ["runs/a-1", "runs/wide-1"]]
    slow = next(run for run in study["runs"] if run["where"] == "runs/slow")
    with pytest.raises(InputError, match=r"also in learning_rate \(0.004, 0.001\)"):
        ablations.only_switch(study, there[0][1], slow)
    assert found["left_out"] == [
        {"where": "runs/nearly", "why": "stopped: step 150 of 190"},
        {"where": "runs/stopped", "why": "stopped: step 100 of 200"},
    ]
    assert study["runs"][0]["measures"].keys() == {"loss", "gradient_norm", "gradient_spikes", "seconds_per_step"}


def test_their_command_is_the_run(loose):
    study = only(index(loose), LOOSE)
    lines = ablations.command(study, "learning_rate", "0.004", "0.001", {"model.width": "128"}).splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("a", "a-1", "slow"), strict=True):
        config = parse(shlex.split(line)[1:]).config
        kept = json.loads((loose / "runs" / name / "config.json").read_text())
        same = config.to_dict() | {key: kept[key] for key in module.HARMLESS if "." not in key}
        assert json.loads(json.dumps(same)) == kept


def test_the_command_of_a_text_model_is_the_run(tmp_path):
    config = dataclasses.replace(RECIPES["emoji-text-cpu"], out="runs/text", steps=7, seed=3)
    command = module.train_command(module._flat(config.to_dict()), "3", "runs/text")
    parsed, kept = (json.loads(json.dumps(c.to_dict())) for c in (parse(shlex.split(command)[1:]).config, config))
    assert parsed | {key: kept[key] for key in module.HARMLESS if "." not in key} == kept


def test_a_second_run_with_the_same_settings_is_no_second_seed(loose):
    synthetic.loose_run(loose, "twin", BASE)
    found = index(loose)
    assert len(only(found, LOOSE)["runs"]) == 5
    assert {"where": "runs/twin", "why": "it has the settings and the seed of runs/a"} in found["left_out"]


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", "{}"), ("log.jsonl", '{"step": "x"}\n'), ("metrics.json", "[]")]
)
def test_a_broken_folder_is_listed(loose, name, content):
    (loose / "runs/slow" / name).write_text(content)
    found = index(loose)
    assert "runs/slow" in [entry["where"] for entry in found["left_out"]]
    assert len(only(found, LOOSE)["runs"]) == 4


def shown(sheet):
    """A sheet's pixels."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet.removeprefix("data:image/webp;base64,")))))


@pytest.fixture
def sampled(loose):
    """The same project with two more runs of the greater width, seeds 10 and 9; samples of four runs, by name."""
    for name, seed in (("b", 10), ("c", 9)):
        synthetic.loose_run(loose, name, dataclasses.replace(Run(loose / "runs/wide").config(), seed=seed))
    names = {"a-1": 10, "b": 150, "c": 90, "wide": 200}
    return loose, {name: synthetic.add_samples(Run(loose / "runs" / name), c) for name, c in names.items()}


def test_runs_of_no_study_show_their_samples_those_of_the_lowest_seed(sampled):
    project, images = sampled
    sheets = only(index(project), LOOSE)["sheets"]
    assert sheets.keys() == {"128-0.004", "192-0.004"}
    for arm, name in (("128-0.004", "a-1"), ("192-0.004", "wide")):
        tiles = shown(sheets[arm])
        assert tiles.shape == (133, 133, 3)
        assert (tiles[1:33, 34:66] == images[name][100 // 16]).all()


def test_the_newest_samples_of_a_run_are_shown_and_read_once(sampled, monkeypatch):
    project, _ = sampled
    first, reads = index(project), []
    make = module.sheet_of_samples
    monkeypatch.setattr(module, "sheet_of_samples", lambda path: reads.append(path.parent.name) or make(path))
    assert index(project) == first
    assert reads == []
    run = Run(project / "runs" / "wide")
    images = synthetic.add_samples(run, 40, 16)
    second = only(index(project), LOOSE)["sheets"]
    assert reads == ["wide"]
    assert second["128-0.004"] == only(first, LOOSE)["sheets"]["128-0.004"]
    assert (shown(second["192-0.004"])[1:33, 1:33] == images[0]).all()
    measured = run.folder / "sheet.webp"
    Image.new("RGB", (133, 133), "red").save(measured, "WEBP", lossless=True)
    os.utime(measured, (4e9, 4e9))
    assert (shown(only(index(project), LOOSE)["sheets"]["192-0.004"]) == [255, 0, 0]).all()
    os.utime(measured, (1, 1))
    assert only(index(project), LOOSE)["sheets"] == second
    assert reads == ["wide", "wide"]
    run.log({"step": 200, "loss": 1.0, "gradient_norm": 0.3, "images_per_second": 100.0})  # what is read of it changes
    assert only(index(project), LOOSE)["sheets"] == second


def test_damaged_samples_are_listed_and_the_next_seed_shows_its_own(sampled):
    project, images = sampled
    (project / "runs/wide/samples.npz").write_bytes(b"no archive")
    found = index(project)
    assert {"where": "runs/wide/samples.npz", "why": f"{project}/runs/wide/samples.npz holds no samples"} in found[
        "left_out"
    ]
    study = only(found, LOOSE)
    assert len(study["runs"]) == 7
    assert (shown(study["sheets"]["192-0.004"])[1:33, 1:33] == images["c"][0]).all()


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_again_only_when_it_changed(tmp_path, monkeypatch):
    _, plan = project_of_runs(tmp_path)
    first, reads = index(tmp_path), []
    read = module._read_swept
    monkeypatch.setattr(module, "_read_swept", lambda folder: reads.append(folder.name) or read(folder))
    assert index(tmp_path) == first
    assert reads == []
    metrics = plan[1].folder / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"fd": ', '"fd": 1'))
    second = index(tmp_path)
    assert reads == [plan[1].folder.name]
    assert second != first
    for broken in ("", "[]", '{"format": 0}', '{"format": 1, "runs": {}}'):
        (tmp_path / "runs" / module.CACHE).write_text(broken)
        assert index(tmp_path) == second
    monkeypatch.setattr(module, "_flat", lambda *given, flat=module._flat: flat(*given) | {"new": 1})
    index(tmp_path)  # there is a new setting, which what was kept does not have
    assert len(reads) == 1 + 5 * 4


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, monkeypatch):
    project_of_runs(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(only(index(tmp_path), "noise")["runs"]) == 4
    assert not (tmp_path / "runs" / module.CACHE).exists()


def test_a_thousand_runs(recorded):
    study = synthetic.with_more_seeds(index(recorded), 90)["studies"][0]
    assert len(study["runs"]) == 6 * 12 - 2 + 84 * 11
    assert len(ablations.pairs(study, "head", "field", "shared")) == 6 * 4 - 1 + 84 * 3
    assert ablations.compared(study, "head", "linear", "field", "fd", FIXED).seeds == 90


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(recorded):
    text = ablations.page(index(recorded))
    assert "https://" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert '<link rel="stylesheet' not in text
    assert "import " not in ablations.SOURCE.read_text()


def test_text_cannot_end_the_script(recorded):
    found = index(recorded)
    found["studies"][0]["question"] = "</script><script>alert(1)</script>"
    assert "<script>alert" not in ablations.page(found)


def noisy(side):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_pictures_are_compressed_only_where_the_page_would_be_too_large(recorded, monkeypatch):
    found = index(recorded)
    whole = len(ablations.page(found).encode())
    found["studies"][0]["sheets"]["extra"] = picture = noisy(200)
    assert picture in ablations.page(found)
    monkeypatch.setattr(ablations, "LARGEST", whole + len(picture) // 2)
    small = ablations.page(found)
    assert picture not in small
    assert len(small.encode()) <= ablations.LARGEST
    found["studies"][0]["sheets"]["no picture"] = "data:image/webp;base64,AAAA"
    monkeypatch.setattr(ablations, "LARGEST", 1000)
    with pytest.raises(InputError, match="at most 6 MB are allowed: name fewer --studies"):
        ablations.page(found)


def export(*arguments):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main(["export-explorer", *map(str, arguments)])
        except SystemExit as stop:
            return stop.code, said.getvalue()
    return 0, said.getvalue()


def test_the_command_writes_the_page(recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(recorded)
    out = tmp_path / "new" / "page.html"
    assert export(out, "--studies", "noise") == (0, "")
    assert f"written: {out}, " in capsys.readouterr().out
    assert out.read_text().startswith("<!doctype html>")
    assert export(tmp_path / "page.txt")[0] == 2
    code, said = export(out, "--studies", "nois")
    assert (code, said) == (2, "pixnerd: studies has 'nois'; there are noise\n")


def test_measures_say_which_way_is_better():
    assert {name for name, measure in module.MEASURES.items() if measure.better == ""} == {"sharpness", "gradient_norm"}
    assert measure_of("softened_fd").better == "lower"
    assert measure_of("retrieval").better == "higher"
    assert measure_of("brand_new").title == "brand new"
