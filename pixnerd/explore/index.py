"""The figures of all studies and runs of a project as one index, an object that JSON can hold.

    {"measures": {name: …}, "studies": [study, …], "left_out": [{"where", "why"}, …]}

    study    name, question, file, where, repeat ("seed" or "model"), axes {axis: [value, …]}, loose (its runs belong
             to no study, and its axes are the settings that differ), runs, missing, sheets {arm: picture}, made,
             settings {arm: {setting: value}}, of those settings that are not the same in all arms
    run      index, choices [a value for each axis], repeat, measures {name: number}, curves {name: [number, …]}, where
    missing  index, choices, repeat, state, why

An arm is a combination of choices; its name is these, joined by "-".
"""

import base64
import contextlib
import dataclasses
import json
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import TrainConfig
from ..differences import differences
from ..errors import InputError, WriteError
from ..files import read_json, write_atomically
from ..recipes import RECIPES
from ..runs import SWEEP, Run
from ..studies.logged import curves_of, training_figures
from ..studies.record import RECORDS, read_record, rows_of
from ..studies.sheet import sheet_of_samples
from ..studies.study import PlannedRun, Study, expand, read_study
from ..studies.sweep import HARMLESS, status_of

Index = dict[str, Any]
Entry = dict[str, Any]  # a study of the index, or one of its runs

RUNS = Path("runs")
STUDIES = Path("notebooks/studies")
LOOSE = "runs of no study"
CACHE = ".explorer.json"  # in the folder of the runs: what was read of each, until its files change
FORMAT = 2  # of the cache
SHEET_FILE, SAMPLES_FILE = "sheet.webp", "samples.npz"  # of a run: sixteen samples as a picture, and all samples
READ = ("config.json", "metrics.json", "log.jsonl", f"{SWEEP}/planned.json", f"{SWEEP}/failed.json")
NO_SWITCH = HARMLESS | {"seed"}  # settings that make no other arm


@dataclass(frozen=True)
class Measure:
    """How a measure is read."""

    title: str
    better: Literal["lower", "higher", ""]
    """which way is better; empty: neither"""
    group: Literal["quality", "training", "cost"] = "quality"
    counted: bool = False
    """it is the same with every seed, so one pair decides"""


MEASURES = {
    "velocity_error": Measure("velocity error", "lower"),
    "fd": Measure("FD", "lower"),
    "kid": Measure("KID", "lower"),
    "precision": Measure("precision", "higher"),
    "recall": Measure("recall", "higher"),
    "softened_fd": Measure("FD, softened", "lower"),
    "softened_kid": Measure("KID, softened", "lower"),
    "softened_precision": Measure("precision, softened", "higher"),
    "softened_recall": Measure("recall, softened", "higher"),
    "agreement": Measure("shows what was asked", "higher"),
    "unguided_agreement": Measure("shows what was asked, no guidance", "higher"),
    "class_agreement": Measure("class agreement", "higher"),
    "softened_class_agreement": Measure("class agreement, softened", "higher"),
    "retrieval": Measure("retrieval", "higher"),
    "softened_retrieval": Measure("retrieval, softened", "higher"),
    "sharpness": Measure("sharpness, real = 1", ""),
    "loss": Measure("training loss", "lower", "training"),
    "gradient_norm": Measure("gradient norm", "", "training"),
    "gradient_spikes": Measure("gradient spikes", "lower", "training"),
    "seconds_per_step": Measure("seconds a step", "lower", "cost"),
    "parameters": Measure("parameters, millions", "lower", "cost", counted=True),
    "step_gflop": Measure("GFLOP an image and step", "lower", "cost", counted=True),
    "activations_mib": Measure("activations, MiB an image", "lower", "cost", counted=True),
}


def measure_of(name: str) -> Measure:
    """How a measure is read; of an unknown one neither direction is better."""
    return MEASURES.get(name) or Measure(name.replace("_", " "), "")


def index(project: Path = Path(), own: bool = True) -> Index:
    """The index of a project: its records in data/ablations, and the studies and runs in its folder `runs`.

    What cannot be read, or is not trained to its end, is listed with the reason, and the rest is there.

    Args:
        project: the folder that has data/ablations, runs and notebooks/studies; each may be missing.
        own: also the folder `runs` and studies that are not made yet; without, the records alone.
    """
    left_out: list[Entry] = []
    found = {entry["name"]: entry for entry in _recorded(project, left_out)}
    if own:
        _add_own(project, found, left_out)
    studies = [study for study in found.values() if study["runs"] or study["missing"]]
    for study in studies:
        study["settings"] = _differing(study["settings"])
    names = {name for study in studies for run in study["runs"] for name in run["measures"]}
    ordered = [*(name for name in MEASURES if name in names), *sorted(names - MEASURES.keys())]
    measures = {name: dataclasses.asdict(measure_of(name)) for name in ordered}
    return {"measures": measures, "studies": studies, "left_out": left_out}


@contextlib.contextmanager
def _listing(left_out: list[Entry], where: Path) -> Iterator[None]:
    """List what goes wrong in the block instead of raising it: these files may be anybody's, and half written."""
    try:
        yield
    except (InputError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = str(error) if isinstance(error, InputError) else f"it is damaged: {type(error).__name__}: {error}"
        left_out.append({"where": str(where), "why": " ".join(why.split())})


# --- studies ---------------------------------------------------------------------------------------------------------


def _recorded(project: Path, left_out: list[Entry]) -> Iterator[Entry]:
    """Every study that has a record."""
    for folder in sorted((project / RECORDS).glob("*/")):
        where = folder.relative_to(project)
        with _listing(left_out, where):
            record = read_record(folder)
            path = folder / f"{record.about['study']}.yaml"
            study = read_study(path)
            if list(study.axes) != list(record.about["axes"]):
                raise InputError(f"{path} has other axes than the record's rows: {', '.join(study.axes)}")
            entry = _of_file(study, path, project, recorded=True)
            entry |= {"where": str(where), "made": record.about["made"]}
            for row in record.rows:
                run = {"index": row.index, "choices": list(row.choices.values()), "repeat": row.repeat}
                run |= {"measures": row.measures, "curves": record.curves.get(row.index, {}), "where": str(where)}
                _add_run(entry, run)
            for arm in entry["settings"]:
                for sheet in sorted((folder / "sheets").glob(f"{arm}-{study.repeat}-*.webp"))[:1]:
                    entry["sheets"][arm] = picture_url(sheet.read_bytes())
            yield entry


def _add_own(project: Path, found: dict[str, Entry], left_out: list[Entry]) -> None:
    """Add the studies and the runs in the project's folder `runs`, and the studies that are not made yet."""
    for path in sorted((project / STUDIES).glob("*.yaml")):
        if path.stem not in found:
            with _listing(left_out, path.relative_to(project)):
                found[path.stem] = _of_file(read_study(path), path, project)
    loose: list[Entry] = []
    with _reader(project / RUNS) as read:
        for folder in sorted((project / RUNS).glob("*/")):
            where = folder.relative_to(project)
            if (folder / "config.json").exists():
                with _listing(left_out, where):
                    loose.append(read(folder) | {"where": str(where)})
            else:
                runs = []
                for run in sorted(path.parent.parent for path in folder.glob(f"*/{SWEEP}/planned.json")):
                    with _listing(left_out, run.relative_to(project)):
                        runs.append(read(run) | {"where": str(run.relative_to(project))})
                if runs:
                    _add_swept(found.setdefault(folder.name, _of_runs(folder.name, runs)), project, runs, left_out)
        if loose:
            found[LOOSE] = _of_loose(loose, read, left_out)


def _of_file(study: Study, path: Path, project: Path, recorded: bool = False) -> Entry:
    """A study without runs, as its file has it; of one that is `recorded`, the trained models may lie elsewhere."""
    axes = {axis: list(values) for axis, values in study.axes.items()}
    entry = {"name": study.name, "question": _question(path), "file": str(path.relative_to(project)), "where": ""}
    entry |= {"loose": False, "repeat": study.repeat, "axes": axes}
    entry |= {"runs": [], "missing": [], "sheets": {}, "made": []}
    plan = []
    try:
        if not study.models:
            plan = expand(study, project / RUNS / study.name, project)
    except InputError:  # such as a teacher that is not here
        if not recorded:
            raise
    if not plan:  # only what the file sets is known
        arms = {"-".join(choices.values()): _flat(study.settings_of(choices)) for choices in study.combinations()}
        return entry | {"settings": arms}
    for run in plan:
        missing = {"index": run.index, "choices": list(run.choices.values()), "repeat": run.repeat}
        entry["missing"].append(missing | {"state": "missing", "why": ""})
    return entry | {"settings": {run.arm: _flat(run.config.to_dict()) for run in plan}}


def _of_runs(name: str, runs: Sequence[Entry]) -> Entry:
    """A study whose file is lost, without runs, as its runs have it."""
    axes: dict[str, dict[str, None]] = {}
    for run in runs:
        for axis, value in run["choices"].items():
            axes.setdefault(axis, {})[value] = None
    entry = {"name": name, "question": "", "file": "", "where": "", "loose": False, "repeat": "seed"}
    entry |= {"axes": {axis: list(values) for axis, values in axes.items()}, "runs": [], "missing": [], "sheets": {}}
    return entry | {"made": [], "settings": {_arm(run): run["settings"] for run in runs}}


def _add_swept(entry: Entry, project: Path, runs: Sequence[Entry], left_out: list[Entry]) -> None:
    """Add runs that `pixnerd sweep` made to their study, in place of those that were recorded of it."""
    entry["where"] = entry["where"] or str(RUNS / entry["name"])
    recorded, missing = ({run["index"]: run for run in entry[kind]} for kind in ("runs", "missing"))
    for run in runs:
        number, choices = int(Path(run["where"]).name.partition("-")[0]), list(run["choices"].values())
        known = recorded.get(number) or missing.get(number)
        if list(run["choices"]) != list(entry["axes"]) or (known and _is_other(entry, run, known)):
            why = f"it was made by study {entry['name']} when that was another one"
            left_out.append({"where": run["where"], "why": why})
        elif run["state"] == "done":
            _add_run(entry, _kept(run, number, choices))
            sheet = project / run["where"] / SHEET_FILE
            if _arm(run) not in entry["sheets"] and sheet.is_file():
                entry["sheets"][_arm(run)] = picture_url(sheet.read_bytes())
        else:
            if number in missing:
                missing[number] |= {"state": run["state"], "why": run["why"]}
            left_out.append({"where": run["where"], "why": f"{run['state']}{': ' * bool(run['why'])}{run['why']}"})
    entry["runs"].sort(key=lambda run: run["index"])


def _is_other(entry: Entry, run: Entry, known: Entry) -> bool:
    """Whether a run is another than the one that the study has under its number, or has other settings."""
    if [list(run["choices"].values()), run["repeat"]] != [known["choices"], known["repeat"]]:
        return True
    planned = entry["settings"].get(_arm(run), {})
    return any(run["settings"].get(name) != value for name, value in planned.items())


def _add_run(entry: Entry, run: Entry) -> None:
    """Put a run that is done into its study, in place of what the study has under its number."""
    for kind in ("runs", "missing"):
        entry[kind] = [other for other in entry[kind] if other["index"] != run["index"]]
    entry["runs"].append(run)


def _kept(run: Entry, number: int, choices: list[str]) -> Entry:
    """What the index keeps of a run that was read from its folder."""
    return {"index": number, "choices": choices, **{k: run[k] for k in ("repeat", "measures", "curves", "where")}}


def _arm(run: Entry) -> str:
    return "-".join(run["choices"].values())


def _question(file: Path) -> str:
    """The comment at the head of a study's file."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def picture_url(webp: bytes) -> str:
    """A picture as the text that an <img> takes for its source."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _flat(config: Entry, prefix: str = "") -> Entry:
    """A configuration's entries by dotted name, without those that make no other arm."""
    flat: Entry = {}
    for name, value in config.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{dotted}.")
        elif dotted not in NO_SWITCH:
            flat[dotted] = list(value) if isinstance(value, tuple) else value
    return flat


def _differing(settings: dict[str, Entry]) -> dict[str, Entry]:
    """Of settings by arm those that are not the same in every arm."""
    names = dict.fromkeys(name for arm in settings.values() for name in arm)
    varied = [name for name in names if len({json.dumps(arm.get(name)) for arm in settings.values()}) > 1]
    return {arm: {name: values.get(name) for name in varied} for arm, values in settings.items()}


# --- runs of no study ------------------------------------------------------------------------------------------------


def _of_loose(runs: Sequence[Entry], read: "Reader", left_out: list[Entry]) -> Entry:
    """Runs that `pixnerd train` made, as a study whose axes are the settings in which they differ."""
    done: dict[str, Entry] = {}
    for run in runs:
        if run["state"] != "done":
            left_out.append({"where": run["where"], "why": f"{run['state']}: {run['why']}"})
            continue
        first = done.setdefault(json.dumps([run["settings"], run["repeat"]]), run)
        if first is not run:
            left_out.append({"where": run["where"], "why": f"it has the settings and the seed of {first['where']}"})
    kept = list(done.values())
    differing = _differing({run["where"]: run["settings"] for run in kept})
    axes: dict[str, dict[str, None]] = {}
    entry = {"name": LOOSE, "question": "", "file": "", "where": str(RUNS), "loose": True, "repeat": "seed"}
    entry |= {"runs": [], "missing": [], "sheets": {}, "settings": {}, "made": []}
    for number, run in enumerate(kept):
        choices = {name: _label(value) for name, value in differing[run["where"]].items()}
        for name, value in choices.items():
            axes.setdefault(name, {})[value] = None
        chosen = list(choices.values())
        command = train_command(run["settings"], run["repeat"], run["where"])
        _add_run(entry, _kept(run, number, chosen) | {"command": command})
        entry["settings"]["-".join(chosen)] = differing[run["where"]]
    for run in sorted(kept, key=lambda run: int(run["repeat"])):  # so that both sides have the same seed, if they can
        arm, folder = "-".join(_label(value) for value in differing[run["where"]].values()), Path(run["where"])
        if arm not in entry["sheets"]:
            with _listing(left_out, folder / SAMPLES_FILE):
                if sheet := read.sheet(read.runs / folder.name):
                    entry["sheets"][arm] = sheet
    return entry | {"axes": {axis: list(values) for axis, values in axes.items()}}


def _label(value: Any) -> str:
    """A setting's value as a name."""
    return (value or "(empty)") if isinstance(value, str) else json.dumps(value)


def train_command(settings: Entry, seed: str, out: str) -> str:
    """The command that makes a training run with these settings, by dotted name: the flags that its default lacks.

    Of a student, whose defaults are its teacher's, all of them.
    """
    flags = ["--out", out, "--seed", seed]
    named = list(settings.items())
    if not settings.get("distil"):
        recipe = "text-256" if "model.text_length" in settings else "imagenet-256"
        flags += ["--recipe", recipe] * (recipe != "imagenet-256")
        named = [(d.name, d.new) for d in differences(_flat(RECIPES[recipe].to_dict()), settings)]
    for name, value in named:
        group, dot, last = name.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            flags.append(f"--{group}{dot}{'' if value else 'no-'}{last}")
        else:
            flags += [f"--{group}{dot}{last}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(["pixnerd", "train", *flags])


# --- run folders, read once ------------------------------------------------------------------------------------------


class Reader:
    """Reads run folders, and remembers what it read of one until a file of it changes."""

    def __init__(self, runs: Path, before: dict[str, Any]):
        self.runs, self.before = runs, before
        self.now: dict[str, Any] = {}

    def __call__(self, folder: Path) -> Entry:
        """What the index needs of a run: state, why, choices, repeat, settings, measures and curves.

        Raises InputError, or whatever reading them raises, if its files are damaged.
        """
        name, stamp = str(folder.relative_to(self.runs)), [_stamp(folder / name) for name in READ]
        kept = self.before.get(name)
        if kept is None or kept["stamp"] != stamp:
            kept = {"stamp": stamp, "run": _read_swept(folder) if stamp[3] else _read_loose(folder)}
        self.now[name] = kept
        run = dict(kept["run"])
        if stamp[3] and run["state"] != "done":  # a process may hold its lock
            run["state"], run["why"] = status_of(_planned(folder, run))
        return run

    def sheet(self, folder: Path) -> str:
        """The newest samples of a run that was read, as a picture; empty if it has none.

        Raises InputError if they cannot be read.
        """
        stamps = {name: _stamp(folder / name) for name in (SHEET_FILE, SAMPLES_FILE)}
        name = max(stamps, key=stamps.__getitem__)
        if not stamps[name]:
            return ""
        kept, stamp = self.now[str(folder.relative_to(self.runs))], [name, *stamps[name]]
        if kept.get("sheet", {}).get("stamp") != stamp:
            made = (folder / name).read_bytes() if name == SHEET_FILE else sheet_of_samples(folder / name)
            kept = kept | {"sheet": {"stamp": stamp, "picture": picture_url(made)}}
            self.now[str(folder.relative_to(self.runs))] = kept
        return kept["sheet"]["picture"]


@contextlib.contextmanager
def _reader(runs: Path) -> Iterator[Reader]:
    """A reader that starts with what the last one kept, and keeps what it read where the folder can be written."""
    path, before = runs / CACHE, {}
    with contextlib.suppress(InputError):
        stored = read_json(path, "a cache")
        before = stored["runs"] if stored.get("format") == _format() else {}
    reader = Reader(runs, before)
    yield reader
    if reader.now != before and os.access(runs, os.W_OK):
        with contextlib.suppress(WriteError):
            write_atomically(path, json.dumps({"format": _format(), "runs": reader.now}))


def _format() -> list[Any]:
    """Of the cache; runs that were read before a setting existed lack it, and would differ from all others."""
    return [FORMAT, sorted({name for recipe in RECIPES.values() for name in _flat(recipe.to_dict())})]


def _stamp(path: Path) -> list[int]:
    """What changes when a file does; empty if there is none."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_mtime_ns, status.st_size]


def _planned(folder: Path, run: Entry) -> PlannedRun:
    number = int(folder.name.partition("-")[0])
    return PlannedRun(number, folder, run["choices"], run["repeat"], TrainConfig(out=str(folder)))


def _read_swept(folder: Path) -> Entry:
    kept = read_json(folder / SWEEP / "planned.json", "a planned run")
    choices, repeat = kept["choices"], kept["repeat"]
    if not all(isinstance(value, str) for value in (repeat, *choices.values())):
        raise InputError(f"{folder / SWEEP / 'planned.json'} is damaged: its choices are no text")
    run = {"choices": choices, "repeat": repeat, "settings": _flat(TrainConfig.from_dict(kept["config"]).to_dict())}
    planned = _planned(folder, run)
    state, why = status_of(planned)
    run |= {"state": state, "why": why, "measures": {}, "curves": {}}
    if state == "done":
        run |= {"measures": rows_of([planned])[0].measures, "curves": curves_of(Run(folder))}
    return run


def _read_loose(folder: Path) -> Entry:
    run = Run(folder)
    config = run.config()
    log = run.read_log()
    last = log[-1]["step"] if log else 0
    scores = training_figures(run) | run.metrics().get("study", {}).get("scores", {})
    measured = {name: value for name, value in scores.items() if math.isfinite(value)}
    state = {"state": "done", "why": ""}
    if last < config.steps:  # the last step is always logged
        state = {"state": "stopped", "why": f"step {last} of {config.steps}"}
    found = state | {"choices": {}, "repeat": str(config.seed), "settings": _flat(config.to_dict())}
    return found | {"measures": measured, "curves": curves_of(run)}
