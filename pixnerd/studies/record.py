"""The record of a study: its figures as small text files that git keeps, read back without the runs.

A record is a folder: the study's file, rows.csv, curves.json, sheets/ and about.json. It has only runs that are done,
and the same runs give the same bytes. A record grows: runs that were made elsewhere, and recorded, need not be made
again.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..differences import differences
from ..errors import InputError
from ..files import make_folder, read_json, readable, remove_partial_files, replacing, write_together
from ..recipes import RECIPES
from ..runs import SWEEP, Run
from .compare import Row
from .logged import curves_of, rounded
from .sheet import at_most
from .study import Choices, PlannedRun, Study, configured, expand, read_study
from .sweep import HARMLESS, check_folders, status_of

RECORDS = Path("data/ablations")
ABOUT = ("planned", "done", "axes", "repeat", "base", "made")  # what about.json has at least
SHEET_SIZE = 40_000  # bytes; larger sheets are kept in lossy WebP


@dataclass(frozen=True)
class Record:
    """A record, read back."""

    about: dict[str, Any]
    """planned and done, the numbers of runs; axes; seeds or models; base, the recipe then; made, with what"""
    rows: list[Row]
    curves: dict[int, dict[str, list[float | None]]]
    """index of a run → its curves by name: step, loss, gradient_norm, and every list that was measured"""


def done_runs(plan: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Those runs of a study that are done."""
    return [run for run in plan if status_of(run).state == "done"]


def rows_of(done: Sequence[PlannedRun]) -> list[Row]:
    """The rows of runs that are done, six digits of each figure."""
    return [Row(run.index, run.choices, run.repeat, _scores(run)) for run in done]


def earlier_record(study: Study) -> Record | None:
    """What is recorded of this study; None if nothing is.

    Raises:
        InputError: the record cannot be read, or is one of another study of this name.
    """
    folder = RECORDS / study.name
    if not any((folder / name).is_file() for name in ("about.json", "rows.csv")):
        return None
    record, before = read_record(folder), read_study(folder / f"{study.name}.yaml")
    known, planned = (_choices_and_repeats(version) for version in (before, study))
    base = TrainConfig.from_dict(record.about["base"])
    for row in record.rows:
        if row.index >= len(known):
            raise InputError(f"{folder / 'rows.csv'} is damaged: its study has no run {row.index}")
        choices, repeat = known[row.index]
        changed = ["measure"] if before.measure != study.measure else []
        if row.index >= len(planned) or planned[row.index] != (choices, repeat):
            changed.append(f"run {row.index} was {'-'.join(choices.values())} with {study.repeat} {repeat}")
        elif study.models:
            changed += [d.name for d in differences(before.settings_of(choices), study.settings_of(choices))]
        else:
            try:
                then = configured(base, before.settings_of(choices))
                now = configured(RECIPES[study.base], study.settings_of(choices))
            except InputError:  # a student's teacher that is not here: what the files set is compared
                then, now = before.settings_of(choices), study.settings_of(choices)
            changed += [d.name for d in differences(then, now) if d.name not in HARMLESS | {"seed"}]
        if changed:
            raise InputError(
                f"{folder} is the record of another study called {study.name} ({', '.join(changed)}): rename this "
                "study, or remove the record"
            )
    return record


def _choices_and_repeats(study: Study) -> list[tuple[Choices, str]]:
    """What tells a study's runs apart, by their numbers."""
    combinations = list(study.combinations())
    return [(choices, str(repeat)) for repeat in study.seeds or study.models for choices in combinations]


def write_record(file: Path, study: Study, plan: Sequence[PlannedRun]) -> Path:
    """Write the record of a study, adding to what is recorded of it; returns its folder, in data/ablations.

    Raises:
        InputError: no run is done, or the record is one of another study of this name.
        WriteError: a file cannot be written.
    """
    done = done_runs(plan)
    if not done:
        raise InputError(f"no run of study {study.name} is done yet; there is nothing to record")
    before = earlier_record(study)
    rows = {row.index: row for row in [*(before.rows if before else ()), *rows_of(done)]}
    curves = (before.curves if before else {}) | {run.index: curves_of(Run(run.folder)) for run in done}
    folder = RECORDS / study.name
    make_folder(folder / "sheets")
    remove_partial_files(folder)
    _write_sheets(folder / "sheets", [run for run in plan if run.index in rows])
    lines = ",\n".join(f'"{index}": {_compact(curves[index])}' for index in sorted(curves))
    about = _about(study, plan, len(rows), _made(done, before))
    write_together(
        {
            folder / f"{study.name}.yaml": file.read_text(),
            folder / "rows.csv": _csv(study, [rows[index] for index in sorted(rows)]),
            folder / "curves.json": f"{{\n{lines}\n}}\n",
            folder / "about.json": json.dumps(about, indent=1) + "\n",
        }
    )
    return folder


def read_record(folder: Path) -> Record:
    """The record in a folder. Raises InputError if a file of it is missing or damaged."""
    about = read_json(folder / "about.json", "what a record is about")
    if missing := [entry for entry in ABOUT if entry not in about]:
        raise InputError(f"{folder / 'about.json'} is damaged: it lacks {', '.join(missing)}")
    stored = read_json(folder / "curves.json", "a record's curves")
    path = folder / "rows.csv"
    with readable(path, "is damaged"):
        titles, *lines = csv.reader(io.StringIO(path.read_text()))
        axes, repeat, done = list(about["axes"]), about["repeat"], about["done"]
        if titles[: len(axes) + 2] != ["index", *axes, repeat]:
            raise ValueError(f"its columns are not those of {', '.join(axes)}")
        if len(lines) != done or any(len(line) != len(titles) for line in lines):
            raise ValueError(f"it has {len(lines)} rows, about.json says {done}; or one has not {len(titles)} entries")
        rows = []
        for index, *entries in lines:
            figures = zip(titles[len(axes) + 2 :], entries[len(axes) + 1 :], strict=True)
            measures = {name: _number(text) for name, text in figures if text}
            choices = dict(zip(axes, entries[: len(axes)], strict=True))
            rows.append(Row(int(index), choices, entries[len(axes)], measures))
    with readable(folder / "curves.json", "is damaged"):
        if not all(isinstance(curve, dict) for curve in stored.values()):
            raise ValueError("a run has no curves by name")
        curves = {int(index): curve for index, curve in stored.items()}
    return Record(about, rows, curves)


def stored_rows(study: Study, out: Path) -> list[Row]:
    """The rows of a study's record, and of its runs in `out` that are done.

    Raises InputError if there is neither, or if they cannot be read or are of another study of this name.
    """
    before = earlier_record(study)
    rows = {row.index: row for row in before.rows} if before else {}
    if out.is_dir():
        plan = expand(study, out)
        check_folders(study, plan, out)
        rows |= {row.index: row for row in rows_of(done_runs(plan))}
    if not rows:
        raise InputError(f"study {study.name} has neither a run that is done in {out} nor a record in {RECORDS}")
    return [rows[index] for index in sorted(rows)]


# --- what a run contributes ------------------------------------------------------------------------------------------


def _scores(run: PlannedRun) -> dict[str, float]:
    """The finite numbers that were measured for a run, by name."""
    scores = Run(run.folder).metrics()["study"]["scores"]
    return {name: rounded(value) for name, value in sorted(scores.items()) if math.isfinite(value)}


# --- the files -------------------------------------------------------------------------------------------------------


def _csv(study: Study, rows: Sequence[Row]) -> str:
    measures = sorted({name for row in rows for name in row.measures})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["index", *study.axes, study.repeat, *measures])
    for row in rows:
        figures = [repr(row.measures[name]) if name in row.measures else "" for name in measures]
        writer.writerow([row.index, *(row.choices[axis] for axis in study.axes), row.repeat, *figures])
    return file.getvalue()


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _write_sheets(folder: Path, recorded: Sequence[PlannedRun]) -> None:
    """The samples of each combination's first run, and of no other; those that were recorded elsewhere stay."""
    first: dict[str, PlannedRun] = {}
    for run in recorded:
        first.setdefault(run.arm, run)
    sheets = {f"{run.folder.name.partition('-')[2]}.webp": run.folder / "sheet.webp" for run in first.values()}
    for path in folder.glob("*"):
        if path.name not in sheets:
            path.unlink()
    for name, sheet in sheets.items():
        if sheet.is_file():
            with replacing(folder / name) as partial:
                partial.write_bytes(at_most(sheet.read_bytes(), SHEET_SIZE))


def _made(done: Sequence[PlannedRun], before: Record | None) -> list[dict[str, Any]]:
    """With what the runs were made: versions, commit, machine, threads."""
    made: list[dict[str, Any]] = list(before.about["made"]) if before else []
    for run in done:
        notes = run.folder / SWEEP / "made.json"
        there = read_json(notes, "the surroundings of a run").get("made", []) if notes.is_file() else []
        made += [entry for entry in there if entry not in made]
    return made


def _about(study: Study, plan: Sequence[PlannedRun], done: int, made: list[dict[str, Any]]) -> dict[str, Any]:
    base = RECIPES[study.base] if study.base else TrainConfig()
    return {
        "study": study.name,
        "command": f"pixnerd sweep {RECORDS / study.name / study.name}.yaml",
        "planned": len(plan),
        "done": done,
        "axes": {axis: list(values) for axis, values in study.axes.items()},
        "repeat": study.repeat,
        f"{study.repeat}s": list(study.models or study.seeds),
        "base": base.to_dict(),
        "made": made,
    }
