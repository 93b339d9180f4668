"""A study: a small YAML file that expands into training runs with paired seeds, or into measurements of trained runs.

Reading a study and expanding it needs no torch.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import SamplingConfig, TrainConfig, tupled
from ..errors import InputError
from ..files import readable
from ..model_source import student_config
from ..recipes import RECIPES
from ..runs import Run
from .wanted import Measures

KEYS = ("base", "settings", "axes", "adjust", "leave_out", "seeds", "models", "measure")
OWN = {"out", "seed"}  # settings of a run that its study decides
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*")  # part of a folder's name
COLUMNS = {"index", "seed", "model"}  # of a record's table, beside the axes and the measures
LONGEST = 200  # letters in the name of a run's folder, with room for the endings of its files' names
POINTLESS = re.compile(r"[+-]?\d+[eE][+-]?\d+")  # a number for people, text for YAML 1.1

Choices = dict[str, str]  # axis → its value's name
Settings = dict[str, Any]  # dotted name of a TrainConfig's field → value


@dataclass(frozen=True)
class Adjustment:
    """Further settings of the combinations that match."""

    when: dict[str, tuple[str, ...]]
    """axis → any of these values"""
    settings: Settings


@dataclass(frozen=True)
class Study:
    """A question to training: what is varied, what stays the same, and what is measured.

    Raises InputError when the parts do not fit together.
    """

    name: str
    """the file's name without .yaml"""
    axes: dict[str, dict[str, Settings]]
    """axis → name of each of its values → the settings that make it"""
    base: str = ""
    """the recipe that every run starts from; empty in a study of trained models"""
    settings: Settings = dataclasses.field(default_factory=dict)
    """of every run, over the recipe's"""
    adjust: tuple[Adjustment, ...] = ()
    leave_out: tuple[dict[str, tuple[str, ...]], ...] = ()
    """combinations without a run, each as axis → any of these values"""
    seeds: tuple[int, ...] = ()
    """each combination is trained with each of them"""
    models: tuple[str, ...] = ()
    """trained runs to measure with each combination, instead of training"""
    measure: Measures = dataclasses.field(default_factory=Measures)

    def __post_init__(self):
        self._check_repeats()
        if not self.axes or not all(self.axes.values()):
            empty = next((f"axis {axis}" for axis, values in self.axes.items() if not values), "axes")
            raise InputError(f"{empty} is empty; a study varies at least one axis, each with named values")
        for name in (*self.axes, *(value for values in self.axes.values() for value in values)):
            if not NAME.fullmatch(name):
                raise InputError(f"{name!r} cannot name an axis or a value: letters, digits and .+_- make such a name")
        if taken := [axis for axis in self.axes if axis in COLUMNS]:
            raise InputError(
                f"an axis cannot be called {taken[0]!r}; {', '.join(sorted(COLUMNS))} are columns of records"
            )
        for what, groups in (("adjust", [entry.when for entry in self.adjust]), ("leave_out", self.leave_out)):
            for group in groups:
                self._check_group(what, group)

    def _check_repeats(self) -> None:
        if self.models and (self.base or self.settings or self.seeds):
            raise InputError("a study of models, which are trained already, has no base, settings or seeds")
        if not self.models and not (self.base and self.seeds):
            raise InputError("a study needs a base and seeds, or models")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise InputError(f"seeds has {seed!r}; a seed is a whole number, 0 or more")
        for model in self.models:
            if not isinstance(model, str):
                raise InputError(f"models has {model!r}; a model is the folder of a trained run")
        if len(set(self.seeds)) < len(self.seeds) or len(set(self.models)) < len(self.models):
            raise InputError(f"{self.repeat}s are {list(self.seeds or self.models)}; each may stand there only once")

    def _check_group(self, what: str, group: dict[str, tuple[str, ...]]) -> None:
        if not group:
            raise InputError(f"{what} names no axis; it has to say which combinations it means")
        for axis, values in group.items():
            if axis not in self.axes:
                raise InputError(f"{what} has axis {axis!r}; the study's axes are {', '.join(self.axes)}")
            for value in values:
                if value not in self.axes[axis]:
                    raise InputError(f"{what} has {axis} {value!r}; its values are {', '.join(self.axes[axis])}")

    @property
    def repeat(self) -> str:
        """What the runs of a combination differ in: seed or model."""
        return "model" if self.models else "seed"

    def combinations(self) -> Iterator[Choices]:
        """The combinations that are not left out; the last axis varies fastest."""
        for values in itertools.product(*self.axes.values()):
            choices = dict(zip(self.axes, values, strict=True))
            if not any(_matches(group, choices) for group in self.leave_out):
                yield choices

    def settings_of(self, choices: Choices) -> Settings:
        """The settings of a combination. Raises InputError if two of its values set the same."""
        found: Settings = {}
        for axis, value in choices.items():
            if twice := found.keys() & self.axes[axis][value].keys():
                named = ", ".join(f"{axis} {value}" for axis, value in choices.items())
                raise InputError(f"two values of {named} set {min(twice)}; let adjust set it where both are chosen")
            found |= self.axes[axis][value]
        for entry in self.adjust:
            if _matches(entry.when, choices):
                found |= entry.settings
        return self.settings | found


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    index: int
    """0, 1, …"""
    folder: Path
    """where it is kept; its name is unique and says what the run is"""
    choices: Choices
    repeat: str
    """the seed, or the trained model"""
    config: TrainConfig
    """of the training run; in a study of models that of the model, with other sampling"""
    model: str = ""
    """the trained model to measure; empty where one is trained"""

    @property
    def arm(self) -> str:
        """The values of its combination, joined."""
        return "-".join(self.choices.values())


def read_study(path: Path) -> Study:
    """The study in a YAML file. Raises InputError if it cannot be read, or says something that does not exist."""
    with readable(path, "cannot be read as a study"):
        text = path.read_text()
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        reason = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise InputError(f"{path} is no YAML{where}: {reason}") from error
    try:
        return _study(path.stem, _mapping(content, "a study"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def expand(study: Study, out: Path, project: Path | None = None) -> list[PlannedRun]:
    """Every run of a study, in folders of `out`: all combinations with the first seed, then with the second …

    A seed that is added at the end leaves the numbers of all other runs as they are. The teacher of a student is looked
    for in the folder `project`, by default in this one, where the runs will be made.

    Raises:
        InputError: a combination is no configuration, or is that of another one; a model is no trained run.
    """
    combinations = list(study.combinations())
    if not combinations:
        raise InputError(f"study {study.name}: leave_out leaves no combination")
    if study.models:
        bases = [(model, f"model-{number}", Run(model).config()) for number, model in enumerate(study.models)]
    else:
        recipe = RECIPES[study.base]
        bases = [(str(seed), f"seed-{seed}", dataclasses.replace(recipe, seed=seed)) for seed in study.seeds]
    planned: list[PlannedRun] = []
    for repeat, name, base in bases:
        configs: dict[TrainConfig, str] = {}
        for choices in combinations:
            arm = "-".join(choices.values())
            try:
                config = configured(base, study.settings_of(choices), project)
            except InputError as error:
                raise InputError(f"study {study.name}, {arm}: {error}") from error
            if arm in configs.values():
                raise InputError(f"study {study.name}: two combinations are called {arm}; rename a value")
            if config in configs:
                raise InputError(f"study {study.name}: {configs[config]} and {arm} have the very same settings")
            configs[config] = arm
            folder = out / f"{len(planned):04d}-{arm}-{name}"
            if (length := len(folder.name)) > LONGEST:
                raise InputError(
                    f"study {study.name}: {arm} would be part of a folder's name of {length} letters; {LONGEST} are "
                    "possible, so shorten the values' names"
                )
            if not study.models:
                config = dataclasses.replace(config, out=str(folder))
            planned.append(
                PlannedRun(len(planned), folder, choices, repeat, config, model=repeat if study.models else "")
            )
    return planned


# --- from YAML to a study ---------------------------------------------------------------------------------------------


MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently keep the last; `<<` may bring a key again."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _study(name: str, content: dict[str, Any]) -> Study:
    if not NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot name a study: letters, digits and .+_- make such a name")
    if unknown := [key for key in content if key not in KEYS]:
        raise InputError(f"key {unknown[0]!r} is unknown; a study has {', '.join(KEYS)}")
    models = tuple(_list(content.get("models"), "models"))
    base = content.get("base", "")
    if not isinstance(base, str):
        raise InputError(f"base is {base!r}; it has to be the name of a recipe")
    known = _setting_names(RECIPES[base] if base else TrainConfig())
    if models and not base:
        known = {name for name in known if name.startswith("sampling.")}

    def settings(value: Any, what: str) -> Settings:
        return _settings(_mapping(value, what), what, known)

    axes = {
        axis: {value: settings(made, f"{axis} {value}") for value, made in _mapping(values, f"axis {axis}").items()}
        for axis, values in _mapping(content.get("axes"), "axes").items()
    }
    adjust = []
    for entry in _list(content.get("adjust"), "adjust"):
        entry = _mapping(entry, "an entry of adjust")
        if entry.keys() != {"when", "settings"}:
            raise InputError(f"an entry of adjust has {', '.join(entry) or 'nothing'}; it needs when and settings")
        adjust.append(Adjustment(_group(entry["when"], "when"), settings(entry["settings"], "adjust")))
    return Study(
        name,
        axes,
        base,
        settings(content.get("settings"), "settings"),
        tuple(adjust),
        tuple(_group(entry, "an entry of leave_out") for entry in _list(content.get("leave_out"), "leave_out")),
        tuple(_list(content.get("seeds"), "seeds")),
        models,
        _measures(_mapping(content.get("measure"), "measure")),
    )


def _mapping(value: Any, what: str) -> dict[str, Any]:
    """A mapping with text for keys; nothing at all is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{what} is {value!r}; it has to be names with what each stands for")
    named: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(key, bool) or not isinstance(key, (str, int, float)):
            raise InputError(f"{what} has the name {key!r}; put names such as on, off, yes and null in quotes")
        if str(key) in named:
            raise InputError(f"{what} has {str(key)!r} twice")
        named[str(key)] = entry
    return named


def _list(value: Any, what: str) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise InputError(f"{what} is {value!r}; it has to be a list")
    return value or []


def _group(value: Any, what: str) -> dict[str, tuple[str, ...]]:
    entries = _mapping(value, what).items()
    return {axis: tuple(map(str, named if isinstance(named, list) else [named])) for axis, named in entries}


def _settings(entries: Settings, what: str, known: set[str]) -> Settings:
    for name, value in entries.items():
        if name in OWN:
            raise InputError(f"{what} sets {name}, which the study decides for each run")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:3]
            raise InputError(f"{what} sets {name}, which is no setting that it can have, such as {', '.join(near)}")
        if isinstance(value, str) and POINTLESS.fullmatch(value):
            raise InputError(f"{what} sets {name} to the text {value!r}; YAML wants a point in it, as in 1.0e-3")
    return {name: tupled(value) for name, value in entries.items()}


def _measures(entries: dict[str, Any]) -> Measures:
    known = [field.name for field in dataclasses.fields(Measures)]
    if unknown := [name for name in entries if name not in known]:
        raise InputError(f"measure has {unknown[0]!r}; it can have {', '.join(known)}")
    return Measures(**{name: tupled(value) for name, value in entries.items()})


def _setting_names(config: Any, prefix: str = "") -> set[str]:
    """The dotted names of all settings in a configuration."""
    names: set[str] = set()
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        names |= _setting_names(value, f"{name}.") if dataclasses.is_dataclass(value) else {name}
    return names


def configured(base: TrainConfig, settings: Settings, project: Path | None = None) -> TrainConfig:
    """`base` with these settings; a teacher among them, found from the folder `project`, brings its data, network and
    guidance.

    Raises InputError if a value is outside its range, or the teacher cannot be found.
    """
    if teacher := settings.get("teacher"):
        if not isinstance(teacher, str):
            raise InputError(f"teacher is {teacher!r}; it has to be the name of a trained model")
        there = str(project / teacher) if project and (project / teacher.partition("@")[0]).exists() else teacher
        given = {name: settings[name] for name in ("distil", "teacher_guidance") if name in settings}
        base = student_config(there, base, **given)
    nested: dict[str, Settings] = {"model": {}, "sampling": {}}
    plain: Settings = {}
    for name, value in settings.items():
        group, dot, entry = name.rpartition(".")
        (nested[group] if dot else plain)[entry] = value
    model = dataclasses.replace(base.model, **nested["model"])
    sampling: SamplingConfig = dataclasses.replace(base.sampling, **nested["sampling"])
    return dataclasses.replace(base, model=model, sampling=sampling, **plain)


def _matches(group: dict[str, tuple[str, ...]], choices: Choices) -> bool:
    return all(choices[axis] in values for axis, values in group.items())
