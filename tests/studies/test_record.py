"""A record is rebuilt to the bytes it had, read back to the rows of the runs, and refused where it is damaged."""

import dataclasses
import errno
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixnerd import InputError, files
from pixnerd.recipes import RECIPES
from pixnerd.runs import SWEEP, Run
from pixnerd.studies import record
from pixnerd.studies.record import RECORDS, read_record, rows_of
from pixnerd.studies.sheet import lossy, save_sheet
from pixnerd.studies.study import expand, read_study

from .conftest import ROOT, TINY, sweep

FULL = OSError(errno.ENOSPC, "No space left on device")
HEADS = {"axes": {"head": TINY["axes"]["head"]}, "seeds": [0]}


def record_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_runs_become_a_record_and_the_same_one_again(study_file, capsys):
    path = study_file(**HEADS)
    plan = expand(read_study(path), Path("runs/tiny"))
    for index in (0, 1):
        assert sweep(path, "--index", index) == 0
        (plan[index].folder / "sheet.webp").write_bytes(b"sixteen samples")
    assert sweep(path, "--record") == 0
    folder = RECORDS / "tiny"
    assert f"recorded: {folder}" in capsys.readouterr().out
    first = record_of(folder)
    names = [
        "about.json",
        "curves.json",
        "rows.csv",
        "sheets/field-seed-0.webp",
        "sheets/linear-seed-0.webp",
        "tiny.yaml",
    ]
    assert sorted(map(str, first)) == names
    assert sweep(path, "--record") == 0
    assert record_of(folder) == first

    record = read_record(folder)
    assert record.rows == rows_of(plan)
    for row, run in zip(record.rows, plan, strict=True):
        study = Run(run.folder).metrics()["study"]
        assert row.measures == pytest.approx(study["scores"], rel=1e-5)
        assert {"velocity_error", "seconds_per_step", "parameters"} <= row.measures.keys()
        assert record.curves[row.index]["error_by_t"] == pytest.approx(study["error_by_t"], rel=1e-5)
        assert record.curves[row.index]["step"] == [1, 2, 3, 4]
        losses = [entry["loss"] for entry in Run(run.folder).read_log()]
        assert record.curves[row.index]["loss"] == pytest.approx(losses, rel=1e-5)
    assert (record.about["planned"], record.about["done"], record.about["seeds"]) == (2, 2, [0])
    for made in record.about["made"] or [{}]:
        assert made.keys() == {"pixnerd", "commit", "torch", "machine", "threads", "device"}
    assert folder.joinpath("tiny.yaml").read_text() == path.read_text()


def test_a_large_sheet_of_samples_is_recorded_in_lossy_webp(study_file):
    path = study_file(**HEADS)
    study = read_study(path)
    plan = expand(study, Path("runs/tiny"))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    smooth = np.repeat(np.repeat(pixels[:, ::16, ::16], 16, axis=1), 16, axis=2)
    for run, images in zip(plan, (pixels, smooth), strict=True):
        fake(run, study)
        save_sheet(images, run.folder / "sheet.webp")
    whole, small = ((run.folder / "sheet.webp").read_bytes() for run in plan)
    assert len(whole) > 40_000 > len(small)
    assert sweep(path, "--record") == 0
    noisy, kept = ((RECORDS / f"tiny/sheets/{run.arm}-seed-0.webp").read_bytes() for run in plan)
    assert kept == small
    assert Image.open(io.BytesIO(noisy)).size == (261, 261)
    assert noisy == lossy(whole, 50)  # the lowest quality is still above 40 kB
    assert len(noisy) < len(whole) / 3


def fake(run, study, **measures):
    """A run that is done without being made."""
    (run.folder / SWEEP).mkdir(parents=True)
    kept = {"repeat": run.repeat, "choices": run.choices, "config": run.config.to_dict()}
    kept["measure"] = dataclasses.asdict(study.measure)
    (run.folder / SWEEP / "planned.json").write_text(json.dumps(kept))
    (run.folder / SWEEP / "made.json").write_text(json.dumps({"made": [{"torch": "2.15.0", "machine": "M"}]}))
    (run.folder / "sheet.webp").write_bytes(run.folder.name.encode())
    scores = {"fd": 12.345678 + run.index, "parameters": 7, "seconds_per_step": 0.5} | measures
    Run(run.folder).save_metrics({"study": {"wanted": {}, "scores": scores, "error_by_t": [0.1234567, None]}})
    for step in range(1, 251):
        Run(run.folder).log({"step": step, "loss": 1 / step, "gradient_norm": 2.0})


@pytest.fixture
def study_of_fakes(study_file):
    path = study_file()
    study = read_study(path)
    return path, study, expand(study, Path("runs/tiny"))


def test_a_part_of_a_study_is_recorded_as_a_part(study_of_fakes):
    path, study, plan = study_of_fakes
    for run in (plan[5], plan[4], plan[1]):
        fake(run, study)
    assert sweep(path, "--record") == 0
    record = read_record(RECORDS / "tiny")
    assert (record.about["planned"], record.about["done"]) == (8, 3)
    lines = (RECORDS / "tiny/rows.csv").read_text().splitlines()
    assert lines[:2] == [
        "index,head,prediction,seed,fd,parameters,seconds_per_step",
        "1,linear,x,0,13.3457,7,0.5",
    ]
    assert [row.index for row in record.rows] == [1, 4, 5]
    assert len(record.curves[1]["step"]) <= 100
    assert record.curves[4]["error_by_t"] == [0.123457, None]
    sheets = {file.name: file.read_text() for file in (RECORDS / "tiny/sheets").iterdir()}
    assert sheets == {
        "linear-x-seed-0.webp": "0001-linear-x-seed-0",
        "linear-v-seed-5.webp": "0004-linear-v-seed-5",
    }
    fake(plan[0], study)
    assert sweep(path, "--record") == 0
    sheets = {file.name for file in (RECORDS / "tiny/sheets").iterdir()}
    assert sheets == {"linear-x-seed-0.webp", "linear-v-seed-0.webp"}  # the earlier sheet is no first run any more


def test_parts_that_were_made_apart_join_to_the_record_of_the_whole(study_of_fakes, capsys):
    path, study, plan = study_of_fakes
    for run in plan:
        fake(run, study)
    assert sweep(path, "--record") == 0
    whole = record_of(RECORDS / "tiny")
    for name in ("runs", "data"):
        shutil.rmtree(name)
    for part in (plan[::2], plan[1::2]):
        for run in part:
            fake(run, study)
        assert sweep(path, "--record") == 0
        shutil.rmtree("runs")
    assert record_of(RECORDS / "tiny") == whole


def test_what_is_recorded_is_not_made_again_unless_asked(study_of_fakes, capsys):
    path, study, plan = study_of_fakes
    for run in plan[:7]:
        fake(run, study)
    assert sweep(path, "--record") == 0
    shutil.rmtree("runs")
    capsys.readouterr()
    assert sweep(path, "--list") == 0
    states = [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert states == ["recorded"] * 7 + ["missing"]
    fake(plan[7], study)
    assert sweep(path) == 0
    assert "1 runs: 1 done" in capsys.readouterr().out
    assert len(list(Path("runs/tiny").glob("0*"))) == 1
    assert sweep(path, "--again", "--index", 0) == 0
    assert len(list(Path("runs/tiny").glob("0*"))) == 2


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"seeds": [5, 0]}, "run 0 was linear-v with seed 0"),
        ({"settings": TINY["settings"] | {"learning_rate": 0.5}}, "learning_rate"),
        ({"measure": {"samples": 0, "errors": 5}}, "measure"),
        ({"axes": {"head": TINY["axes"]["head"]}}, "run 0 was linear-v with seed 0"),
    ],
)
def test_a_record_of_another_study_of_this_name_is_left_alone(study_of_fakes, study_file, capsys, parts, reason):
    path, study, plan = study_of_fakes
    fake(plan[0], study)
    assert sweep(path, "--record") == 0
    before = record_of(RECORDS / "tiny")
    shutil.rmtree("runs")
    path = study_file(**parts)
    for flags in ([], ["--list"], ["--compare", "head"], ["--compare", "head", "--tune", "prediction"]):
        capsys.readouterr()
        assert sweep(path, *flags) == 2
        assert f"is the record of another study called tiny ({reason}" in capsys.readouterr().err
    assert record_of(RECORDS / "tiny") == before


def test_seeds_can_be_added_to_a_recorded_study(study_of_fakes, study_file):
    path, study, plan = study_of_fakes
    fake(plan[0], study)
    assert sweep(path, "--record") == 0
    path = study_file(seeds=[0, 5, 6])
    study = read_study(path)
    fake(expand(study, Path("runs/tiny"))[8], study)
    assert sweep(path, "--record") == 0
    record = read_record(RECORDS / "tiny")
    assert [row.index for row in record.rows] == [0, 8]
    assert record.about["seeds"] == [0, 5, 6]


def test_a_changed_recipe_does_not_change_what_was_recorded(study_of_fakes, monkeypatch, capsys):
    path, study, plan = study_of_fakes
    fake(plan[0], study)
    assert sweep(path, "--record") == 0
    shutil.rmtree("runs")
    recipe = RECIPES["digits-cpu"]
    monkeypatch.setitem(RECIPES, "digits-cpu", dataclasses.replace(recipe, batch_size=3))  # the study sets it itself
    assert sweep(path, "--list") == 0
    monkeypatch.setitem(RECIPES, "digits-cpu", dataclasses.replace(recipe, ema_decay=0.123))
    assert sweep(path, "--list") == 2
    assert "another study called tiny (ema_decay)" in capsys.readouterr().err


def test_a_measure_that_a_run_lacks_is_an_empty_cell(study_of_fakes):
    path, study, plan = study_of_fakes
    fake(plan[0], study)
    fake(plan[1], study, extra=3, fd=float("nan"))
    assert sweep(path, "--record") == 0
    rows = read_record(RECORDS / "tiny").rows
    assert "extra" not in rows[0].measures
    assert rows[1].measures["extra"] == 3
    assert "fd" not in rows[1].measures


def test_comparisons_read_the_runs_or_else_the_record(study_of_fakes, capsys):
    path, study, plan = study_of_fakes
    for run in plan:
        fake(run, study)
    assert sweep(path, "--record") == 0
    capsys.readouterr()
    assert sweep(path, "--compare", "head") == 0
    from_runs = capsys.readouterr().out
    assert "field − linear" in from_runs
    Path("runs").rename("elsewhere")
    copy = RECORDS / "tiny" / "tiny.yaml"
    assert sweep(copy, "--compare", "head") == 0
    assert capsys.readouterr().out == from_runs


def test_comparing_says_how_many_runs_failed(study_of_fakes, capsys):
    path, study, plan = study_of_fakes
    for run in plan[:6]:
        fake(run, study)
    for run in plan[6:]:
        fake(run, study)
        (run.folder / "metrics.json").unlink()
        (run.folder / SWEEP / "failed.json").write_text('{"why": "the loss is not finite"}')
    assert sweep(path, "--compare", "head") == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "left out: 2 runs that failed, the first of them 0006-field-v-seed-5, see --list"
    )


def test_a_record_of_students_is_compared_without_their_teacher(study_file, capsys):
    trained = study_file("teacher", axes={"head": {"field": {}}}, seeds=[0])
    assert sweep(trained, "--index", 0) == 0
    teacher = expand(read_study(trained), Path("runs/teacher"))[0].folder
    axes = {"distil": {"meanflow": {"distil": "meanflow"}, "shortcut": {"distil": "shortcut"}}}
    path = study_file(base="student-cpu", settings={"teacher": str(teacher), "steps": 2}, axes=axes)
    study = read_study(path)
    for run in expand(study, Path("runs/tiny")):
        fake(run, study)
    assert sweep(path, "--record") == 0
    Path("runs").rename("elsewhere")
    capsys.readouterr()
    assert sweep(path, "--compare", "distil") == 0
    assert "shortcut − meanflow" in capsys.readouterr().out


def record_damaged(study_of_fakes, name, change):
    """Record two runs, then change the text of one of the record's files, or remove it; returns the study's path."""
    path, study, plan = study_of_fakes
    for run in plan[:2]:
        fake(run, study)
    assert sweep(path, "--record") == 0
    file = RECORDS / "tiny" / name
    if change is None:
        file.unlink()
    else:
        file.write_text(change(file.read_text()))
    return path


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("about.json", None, "about.json does not exist"),
        ("rows.csv", lambda text: text.replace("\n1,", "\n17,"), "rows.csv is damaged: its study has no run 17"),
    ],
)
def test_a_damaged_record_is_not_replaced(study_of_fakes, capsys, name, change, sentence):
    path = record_damaged(study_of_fakes, name, change)
    before = (RECORDS / "tiny" / "rows.csv").read_text()
    for command in ("--record", "--list"):
        assert sweep(path, command) == 2
        assert sentence in capsys.readouterr().err
    assert (RECORDS / "tiny" / "rows.csv").read_text() == before


def test_a_figure_that_is_not_finite_is_left_blank(study_of_fakes):
    path, study, plan = study_of_fakes
    fake(plan[0], study, kid=float("nan"))
    kept = Run(plan[0].folder).metrics()["study"] | {"error_by_t": [float("inf"), 0.5]}
    Run(plan[0].folder).save_metrics({"study": kept})
    assert sweep(path, "--record") == 0
    record = read_record(RECORDS / "tiny")
    assert "kid" not in record.rows[0].measures
    assert record.curves[0]["error_by_t"] == [None, 0.5]
    assert "NaN" not in (RECORDS / "tiny" / "curves.json").read_text()


def test_arms_are_compared_at_the_best_value_of_a_tuned_axis(study_of_fakes, capsys):
    path, study, plan = study_of_fakes
    for run, fd in zip(plan, [2.0, 1.0, 5.0, 7.0, 2.5, 3.0, 4.0, 9.0], strict=True):  # linear v, x, field v, x
        fake(run, study, fd=fd)
    assert sweep(path, "--compare", "head", "--tune", "prediction", "--by", "fd") == 0
    best, comparison = capsys.readouterr().out.split("\n\n")
    assert [line.split() for line in best.splitlines()] == [
        ["head", "best", "prediction"],
        ["linear", "x"],
        ["field", "v"],
    ]
    titles, *lines = (line.split() for line in comparison.splitlines())
    assert "prediction" not in titles
    measured = next(line for line in lines if line[0] == "fd")
    assert [*measured[1:4], float(measured[4]), measured[-1]] == ["field", "−", "linear", ((5 - 1) + (4 - 3)) / 2, "2"]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "rows.csv",
            lambda text: text.replace("linear,x,0,13.3457", "linear,x,0,abc"),
            "rows.csv is damaged: could not",
        ),
        ("rows.csv", lambda text: text[:-5], "rows.csv is damaged"),
        ("rows.csv", lambda text: "\n".join(text.splitlines()[:-1]), "it has 1 rows, about.json says 2"),
        ("rows.csv", lambda text: text.replace("head,", "tail,"), "its columns are not those of head, prediction"),
        ("rows.csv", lambda text: "", "rows.csv is damaged"),
        ("rows.csv", None, "rows.csv does not exist"),
        ("curves.json", lambda text: text[:-9], "curves.json cannot be read as a record's curves"),
        ("curves.json", lambda text: '{"a": []}', "curves.json is damaged"),
        ("curves.json", lambda text: '{"1": 3}', "curves.json is damaged"),
        ("rows.csv", lambda text: text.replace("linear", '"linear', 1) + "x" * 200_000, "rows.csv is damaged: field"),
        ("about.json", lambda text: "{}", "about.json is damaged: it lacks planned, done, axes, repeat, base, made"),
        ("about.json", lambda text: text.replace('"base"', '"bass"'), "about.json is damaged: it lacks base"),
        ("about.json", None, "about.json does not exist"),
    ],
)
def test_a_damaged_record_is_one_sentence(study_of_fakes, name, change, sentence):
    record_damaged(study_of_fakes, name, change)
    with pytest.raises(InputError, match=sentence) as caught:
        read_record(RECORDS / "tiny")
    assert "\n" not in str(caught.value)


def test_a_record_that_could_not_be_completed_is_the_one_before(study_of_fakes, monkeypatch):
    """Stopped at its slow part, or with a full disk at its last file; the same command then goes on."""
    path, study, plan = study_of_fakes
    fake(plan[0], study)
    assert sweep(path, "--record") == 0
    before = record_of(RECORDS / "tiny")
    fake(plan[1], study)
    with monkeypatch.context() as patched:
        patched.setattr(record, "at_most", lambda *_: fail_with(KeyboardInterrupt()))
        assert sweep(path, "--record") == 130
    assert record_of(RECORDS / "tiny") == before
    with monkeypatch.context() as patched:
        true_sync = files.sync
        patched.setattr(files, "sync", lambda path: fail_with(FULL) if "about" in path.name else true_sync(path))
        assert sweep(path, "--record") == 2
    assert {name: content for name, content in record_of(RECORDS / "tiny").items() if name.suffix != ".webp"} == {
        name: content for name, content in before.items() if name.suffix != ".webp"
    }
    assert sweep(path, "--record") == 0
    assert [row.index for row in read_record(RECORDS / "tiny").rows] == [0, 1]


def fail_with(error):
    raise error


def test_the_records_that_git_keeps_are_small_and_can_be_read():
    files = [path for path in (ROOT / RECORDS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    for folder in {path.parent for path in files if path.name == "about.json"}:
        record = read_record(folder)
        assert record.rows
        assert re.fullmatch(r"[\w.+-]+", record.about["study"])
        read_study(folder / f"{record.about['study']}.yaml")
