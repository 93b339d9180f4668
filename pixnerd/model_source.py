"""A trained model by its name: a run, a checkpoint of it, a .safetensors file, or released weights.

Every command, notebook and panel that takes a trained model takes these names:

    runs/xl                            the newest checkpoint of a run
    runs/xl@400000                     the checkpoint after 400,000 steps; a checkpoint's folder does as well
    runs/xl@200000,400000, runs/xl@all several checkpoints, for `evaluate`
    model.safetensors                  what `pixnerd convert` or a checkpoint holds
    model.ckpt                         the authors' weights
    MCG-NJU/PixNerd-XL-P16-C2I         the same from the Hugging Face hub, or …/FILE.ckpt for one of several files
"""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import averages
from .classes import ClassNames
from .config import RELEASED, STUDENT_SAMPLING, SamplingConfig, TrainConfig
from .data.synsets import synsets, words_of
from .errors import InputError
from .files import content_hash, reachable, readable, replacing
from .recipes import RECIPES, TEXT_256
from .runs import Run
from .solvers import STUDENT_SOLVER, time_grid

if TYPE_CHECKING:  # the defaults of a command's flags need no torch
    import torch

    from .distributed import World
    from .model import PatchDenoiser

# what a student has from its teacher: data, network, and how this machine computes it best
TAUGHT = ("data", "decode_sizes", "horizontal_flip", "text_encoder", "cache_text", "noise", "model", "time_shift")
TAUGHT += ("precision", "compile")
KINDS = "a run's folder, RUN@STEP, a checkpoint's folder, a .safetensors file or released weights"


@dataclass(frozen=True)
class ModelSource:
    """Where a trained model's weights are, and which settings belong to them."""

    name: str
    """as it was given"""
    run: Run | None
    """the run it belongs to, if any"""
    path: Path | None
    """a checkpoint's folder or a file; None: the run's newest checkpoint, or a file on the hub"""

    @property
    def follows(self) -> bool:
        """Whether it is a run's newest checkpoint, whichever that is when it is read."""
        return self.run is not None and self.path is None

    def settled(self, world: "World | None" = None) -> "ModelSource":
        """The same with its checkpoint named: a run that trains on does not change what is measured.

        Of several processes, each of which has to call it, the leading one decides which is the newest.
        """
        from .checkpoints import leaders_checkpoint
        from .distributed import ALONE

        return self.at(leaders_checkpoint(self.run.checkpoints, world or ALONE)) if self.follows else self

    def at(self, checkpoint: Path | None) -> "ModelSource":
        """The same run at this checkpoint. Raises InputError if there is none."""
        if checkpoint is None:
            raise InputError(f"run {self.run.folder} has no checkpoint yet")
        return dataclasses.replace(self, path=checkpoint)

    @property
    def pinned(self) -> str:
        """Its name with the step of its checkpoint, RUN@STEP, where the run alone was named."""
        if self.run is None or reachable(self.name) != self.run.folder:
            return self.name
        return f"{Path(self.name)}@{self.label.removeprefix('step-')}"

    def file(self, average: str = "ema") -> Path:
        """The file with the weights, fetched from the hub if need be.

        Args:
            average: which weights of a checkpoint: "ema", the moving average; "ema-0.999", a further one with this
                decay; "power-0.1", one with a power-function profile of this width; "model", the weights as the
                optimiser left them, which a sharded run does not write in one file.

        Raises:
            InputError: there are no such weights.
        """
        path = self.settled().path
        if path is not None and path.is_dir():
            return path / f"{average}.safetensors"
        if average != "ema":
            raise InputError(f"average is {average!r}; {self.name} holds one set of weights, leave it out")
        if path is not None:
            return path
        from .released import download

        return download(*_in_repository(self.name))

    def load(self, average: str = "ema", device: "torch.device | str" = "cpu") -> "PatchDenoiser":
        """The model in evaluation mode; `average` as in `file`. Raises InputError when it cannot be read."""
        from .checkpoints import load_model, load_newest
        from .distributed import ALONE
        from .released import load_released

        if self.follows:
            return load_newest(self.run.checkpoints, ALONE, average, device)[1]
        file = self.file(average)
        return load_model(file, device) if file.suffix == ".safetensors" else load_released(file, device=device)

    def content(self, average: str = "ema") -> str:
        """The first digits of the sha256 of the weights' file, which identify it wherever it lies."""
        with readable(file := self.file(average)):
            return content_hash(file)

    @property
    def label(self) -> str:
        """The checkpoint's name, "step-400000", or the file's."""
        path = self.settled().path
        return self.name.rpartition("/")[2] if path is None else path.name

    @property
    def results(self) -> Run:
        """Where its samples and metrics go: its own run, or runs/NAME for weights without one."""
        return self.run or Run(Path("runs") / Path(self.name).stem)

    @property
    def sampling(self) -> SamplingConfig:
        """Its run's sampling settings, or the published ones for class- or text-conditional images."""
        if self.run is not None:
            return self.run.config().sampling
        return TEXT_256.sampling if self._reads_text() else SamplingConfig()

    def config(self, model: "PatchDenoiser") -> TrainConfig:
        """Its run's settings, or the published ones where they matter to a trained `model` without a run."""
        if self.run is not None:
            return self.run.config()
        return TrainConfig(model=model.config, sampling=self.sampling, cache_text=False)

    def class_names(self, model: "PatchDenoiser") -> ClassNames | None:
        """What the labels of the trained `model` mean; None if that is not known, or it is told captions.

        Weights without a run that tell 1,000 classes apart are taken for ones of ImageNet, as all released ones are.

        Raises InputError if the run's names cannot be read, or are those of another number of classes.
        """
        if model.num_classes is None:
            return None
        if self.run is not None:
            if (names := self.run.class_names()) is not None and len(names) != model.num_classes:
                path, count = self.run.classes_path, model.num_classes
                raise InputError(f"{path} names {len(names)} classes; the model of {self.name} has {count}")
            return names
        ids = synsets()
        return ClassNames(ids, words_of(ids)) if model.num_classes == len(ids) else None

    def _reads_text(self) -> bool:
        if self.path is None:
            return RELEASED[_in_repository(self.name)[0]].text
        if self.path.is_dir() or self.path.suffix == ".safetensors":
            from safetensors import safe_open

            with readable(self.file()), safe_open(self.file(), "np") as file:
                return "text_length" in (file.metadata() or {}).get("pixnerd", "")
        from .released import reads_text

        return reads_text(self.path)


def find_model(name: str | Path) -> ModelSource:
    """The model called `name`, see this module's beginning; nothing is read or fetched yet. Raises InputError."""
    path = reachable(name)
    if path.is_file():
        return ModelSource(str(name), _run_of(path.parent), path)
    if path.is_dir():
        if (path / "checkpoints").is_dir() or (path / "config.json").is_file():
            return ModelSource(str(name), Run(path), None)
        return ModelSource(str(name), _run_of(path), path)
    folder, at, step = str(name).rpartition("@")
    if at and (run := Run(folder)).checkpoints.is_dir():
        checkpoint = reachable(run.checkpoints / f"step-{step.removeprefix('step-')}")
        if not checkpoint.is_dir():
            raise InputError(f"run {folder} has no checkpoint @{step}; it has {', '.join(_steps(run)) or 'none'}")
        return ModelSource(str(name), run, checkpoint)
    if _in_repository(str(name))[0] in RELEASED:
        return ModelSource(str(name), None, None)
    raise InputError(f"{name} does not exist and holds no run; {KINDS} is needed")


def load(path: str | Path, *, weights: str = "ema", device: "torch.device | str" = "cpu") -> "PatchDenoiser":
    """A trained model in evaluation mode.

    Args:
        path: its name: a run's folder (its newest readable checkpoint is used), RUN@STEP, a checkpoint's folder, a
            .safetensors file, a file of the authors' code, or the id of their repository on the Hugging Face hub.
        weights: which weights of a checkpoint, see `ModelSource.file`.
        device: where the model goes.

    Raises:
        InputError: there is nothing to load, or it cannot be read.
    """
    return find_model(path).load(weights, device)


def synthesise(source: ModelSource, width: float) -> Path:
    """Write the average of this width, relative to the training so far, into a checkpoint of a run; returns the file.

    It is combined from the averages with power-function profiles (`power_averages`) that the run's checkpoints up to
    this one keep, see averages.py. `ModelSource.load` reads it as power-WIDTH.

    Raises:
        InputError: the run keeps no such averages, or they cannot be read.
        WriteError: the file cannot be written.
    """
    from .checkpoints import load_model, numbered, save_model

    checkpoint = source.settled().path
    if source.run is None or not checkpoint.is_dir():
        raise InputError(f"{source.name} is no run and no checkpoint, whose averages could be combined: name RUN@STEP")
    widths = source.run.config().power_averages
    last = int(checkpoint.name.removeprefix("step-"))
    kept = [(step, w, folder) for step, folder in numbered(checkpoint.parent) if step <= last for w in widths]
    if not kept:
        raise InputError(f"run {source.run.folder} keeps no averages to combine: train with --power-averages 0.05 0.1")
    target = checkpoint / f"power-{width:g}.safetensors"
    if width in widths:
        return target
    shares = averages.synthesis_weights([step for step, _, _ in kept], [w for _, w, _ in kept], last, width)
    model, total = None, {}
    for share, (_, w, folder) in zip(shares, kept, strict=True):
        model = load_model(folder / f"power-{w:g}.safetensors")
        for name, weight in model.state_dict().items():
            total[name] = total.get(name, 0) + share * weight.double()
    model.load_state_dict(total)
    with replacing(target) as partial:
        save_model(model, partial)
    return target


def load_guide(sampling: SamplingConfig, device: "torch.device | str" = "cpu") -> "PatchDenoiser | None":
    """The model that guides, for `sample`; None where the sampled one guides itself. Raises InputError."""
    return find_model(sampling.guide).load(device=device) if sampling.guide else None


def own_sampling(name: str) -> SamplingConfig | None:
    """The sampling settings that belong to the model called `name`; None if the name is of images, or of nothing."""
    if Path(name).suffix == ".npz":
        return None
    try:
        return find_model(each_checkpoint(name)[0]).sampling
    except InputError:
        return None  # said in full where it is opened


def student_config(teacher: str, recipe: TrainConfig | None = None, **changes: Any) -> TrainConfig:
    """The settings of a training run that distils `teacher`: a recipe with the teacher's data, network and guidance.

    Args:
        teacher: the name of a trained model; for weights without a run, name data and model among the changes.
        recipe: how to train; by default student-cpu.
        changes: fields of TrainConfig, such as distil, by default "shortcut", and out.

    Raises:
        InputError: there is no such model, or its run cannot be read.
    """
    source = find_model(teacher)
    found: dict[str, Any] = {"distil": "shortcut", "teacher": teacher}
    found |= {"teacher_guidance": source.sampling.guidance, "teacher_interval": source.sampling.interval}
    if guide := source.sampling.guide:
        found |= {"teacher_guidance": 1.0, "teacher_interval": None}
        if "teacher_guidance" not in changes:
            warnings.warn(
                f"teacher {teacher} is guided by {guide}, which cannot be taught: the student learns it without "
                "guidance, unless --teacher-guidance asks for the teacher's own",
                stacklevel=2,
            )
    found["teacher_last"] = time_grid(source.sampling.steps, source.sampling.shift)[-2]
    if source.run is not None:
        own = source.run.config()
        found |= {name: getattr(own, name) for name in TAUGHT}
    found |= changes
    config = recipe or RECIPES["student-cpu"]
    if config.sampling.solver != STUDENT_SOLVER:  # a recipe for a velocity network
        config = dataclasses.replace(config, sampling=STUDENT_SAMPLING)
    if found["distil"] != "shortcut" or found.get("decode_sizes"):
        found.setdefault("paths", 0)
    if found["distil"] == "fd":  # it trains no other number of steps
        found.setdefault("sampling", dataclasses.replace(config.sampling, steps=1))
    return dataclasses.replace(config, **found)


def each_checkpoint(name: str) -> list[str]:
    """The names that one name with several checkpoints stands for: RUN@STEP,STEP or RUN@all; else the name itself."""
    folder, at, steps = name.rpartition("@")
    if not at or reachable(name).exists() or not (steps == "all" or "," in steps):
        return [name]
    chosen = _steps(Run(folder)) if steps == "all" else steps.split(",")
    if not chosen:
        raise InputError(f"run {folder} has no checkpoint yet")
    return [find_model(f"{folder}@{step}").name for step in chosen]


def _run_of(checkpoint: Path) -> Run | None:
    """The run to which a checkpoint's folder belongs."""
    run = Run(checkpoint.resolve().parents[1]) if checkpoint.resolve().parent.name == "checkpoints" else None
    return run if run is not None and run.config_path.is_file() else None


def _in_repository(name: str) -> tuple[str, str | None]:
    """OWNER/NAME or OWNER/NAME/FILE as the repository and the file in it; None: the published one."""
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    return f"{owner}/{repository}", file or None


def _steps(run: Run) -> list[str]:
    """The steps of a run's checkpoints, in ascending order."""
    from .checkpoints import numbered

    return [str(step) for step, _ in numbered(run.checkpoints)]
