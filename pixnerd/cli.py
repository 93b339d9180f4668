"""The command line: pixnerd train | sample | evaluate | convert | average | data | prepare | plan | bench | sweep |
export-explorer.

A command consists of its flags and a few calls. torch is imported only when a command runs, so --help and a refused
flag need not wait for it. Invalid input ends with one sentence on standard error and exit code 2.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro
from typing_extensions import Doc

from . import data
from .bench.presets import PRESETS, BenchConfig
from .checks import Count, Index, Positive, check_fields
from .config import Compile, EvaluationConfig, SamplingConfig, TrainConfig
from .errors import InputError, NonFiniteLoss
from .files import check_output_file, make_folder, replacing
from .model_config import SIZES
from .model_source import own_sampling, student_config
from .recipes import RECIPES
from .runs import Run
from .signals import STOPPED

if TYPE_CHECKING:
    from .evaluation import Evaluation

DataSetName = Annotated[str, tyro.conf.Positional, Doc(f"one of {data.NAMES}")]
PATIENCE = 60  # seconds within which the leading process says what all have to say
OwnSampling = Annotated[SamplingConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Command:
    """A command whose flags are checked like every configuration's fields."""

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Train(Command):
    """Train a model, or resume the run in --out.

    SIGTERM, SIGHUP and Ctrl-C end it after the current step with a checkpoint and exit code 75; 0 means trained to the
    end.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    recipe: str = "imagenet-256"
    """start from these settings; every other flag overrides them. With --teacher: student-cpu by default, and the
    teacher's data, network and guidance"""
    size: str | None = None
    """use a named model size; --model.* flags override it"""

    def run(self) -> None:
        from .distributed import join, leave
        from .training.interruptible import train_until_stopped

        world = join()
        last = train_until_stopped(self.config, world)
        leave()
        if last < self.config.steps:
            with contextlib.suppress(OSError):  # after SIGHUP there is no terminal to print on
                if world.leads:
                    print(f"stopped after step {last}, as requested; the same command resumes from here")
            sys.exit(STOPPED)
        if world.leads:
            print(f"trained: {self.config.out}; to see samples: pixnerd sample {self.config.out}")


@dataclass(frozen=True)
class Plan(Train):
    """Count memory, arithmetic and hours of a training run, without starting it or opening its data."""

    gpus: Count = 8
    """GPUs that share a batch, eight to a machine if there are more"""
    card_gib: Positive | None = None
    """memory of each, in GiB; by default that of this machine's GPU, or without one 79.2, as a card of 80 GB has"""
    rate: Positive = 1e14
    """FLOP/s of each; by default an A100's in the authors' runs"""

    def run(self) -> None:
        from .distributed import capability, default_device
        from .planning import advice, card_here, cards_table, hours_line, memory_table, paths_line, plan_run

        config = self.config
        here = 0 if self.card_gib else capability(default_device())
        found, card = plan_run(config, self.gpus, capability=here), self.card_gib or card_here()
        parameters = sum(parameter.numel() for parameter in found.model.parameters())
        size, kernel = config.model.image_size, found.model.field_kernel
        print(f"{parameters / 1e6:.1f} million parameters, {size} pixels, GiB on each GPU with the kernel {kernel}:")
        _print_table(memory_table(found, card))
        print(advice(found, card))
        print("the most that each GPU computes at once, 0 if not even one image fits:")
        _print_table(cards_table(found))
        if config.paths:
            print(paths_line(config))
        print(hours_line(found, self.rate))


@dataclass(frozen=True)
class Sample(Command):
    """Sample images with a trained model (EMA weights); sampling flags default to its run's settings, or the published
    ones for released weights."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """RUN, RUN@STEP, a .safetensors file or released weights (a file, or MCG-NJU/PixNerd-XL-P16-C2I)"""
    count: Count = 100
    """number of images, divided evenly among the classes or prompts, in order"""
    labels: tuple[str, ...] = ()
    """classes to sample instead of all: numbers, or names as the data had them when the run began"""
    prompts: tuple[str, ...] = ()
    """captions to sample, for a text model; the labels in samples.npz are then indices into this list"""
    sampling: OwnSampling = field(default_factory=SamplingConfig)
    image_size: tuple[Count, Count] | None = None
    """height and width in pixels; by default those the model was trained at"""
    base_resolution: tuple[Count, Count] | None = None
    """height and width that the transformer sees while the fields decode the image size; by default the same"""
    seed: Index = 0
    """seed of the noise; image i depends on (seed, i) alone"""
    batch_size: Count = 64
    """images per batch"""
    compile: Compile = "auto"
    """torch.compile for the network; auto: on a GPU with at least 3e16 FLOP to do, five minutes of an A100, since
    compiling takes up to a minute"""
    graphs: bool = False
    """replay the kernels of small batches, up to 14 images of XL/16 or half as many where they are guided, from CUDA
    graphs; off until timed on a GPU"""
    out: Path | None = None
    """folder for samples.png and samples.npz; by default the run's, or runs/NAME for weights without a run"""

    def run(self) -> None:
        import torch
        from tqdm import tqdm

        from .compiling import compile_to_sample
        from .conditions import model_conditions
        from .distributed import default_device
        from .model_source import find_model, load_guide
        from .recorded import record_small_batches
        from .sampling import sample_batches

        source, device = find_model(self.source), default_device()
        model = source.load(device=device)
        target = Run(self.out or source.results.folder)
        make_folder(target.folder)
        conditions = model_conditions(model, source.config(model), device, source.class_names(model))
        subjects = conditions.asked_for(self.labels, self.prompts, f"{'run ' * bool(source.run)}{self.source}")
        guide = load_guide(self.sampling, device)
        if self.graphs:
            for network in filter(None, (model, guide)):
                record_small_batches(network)
        compile_to_sample(self.compile, model, guide, self.count, self.sampling)
        indices = (torch.arange(self.count) % len(subjects)).sort().values  # each image's subject
        batches = sample_batches(
            model,
            conditions.encode([subjects[index] for index in indices.tolist()]),
            self.sampling,
            unconditional=conditions.nothing,
            weaker=guide,
            size=self.image_size,
            base_resolution=self.base_resolution,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            images = list(tqdm(batches, total=-(-self.count // self.batch_size), unit="batch"))
        labels = indices if self.prompts else torch.tensor(subjects)[indices]
        target.save_samples(torch.cat(images), labels, columns=min(-(-self.count // len(subjects)), 20))
        print(f"sampled: {target.folder / 'samples.png'}, {target.folder / 'samples.npz'}")


@dataclass(frozen=True)
class Evaluate(EvaluationConfig):
    """Measure samples against real images: saved samples, or images sampled on the fly with a trained model.

    A text model samples the plainest caption of each reference image; the reference then has to be a data set. Each
    result becomes a row of the run's metrics.json, or of runs/NAME/metrics.json for weights without a run; of images
    sampled on the fly, what is already there is not measured again. `torchrun … -m pixnerd evaluate …` samples and
    measures on many GPUs.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL|IMAGES")]
    """a trained model: RUN, RUN@STEP, several checkpoints RUN@STEP,STEP or RUN@all, a .safetensors file or released
    weights; or images: a .npz with arr_0, or a folder of pictures"""
    sampling: OwnSampling = field(default_factory=SamplingConfig)

    def run(self) -> None:
        from .distributed import join, leave
        from .evaluation import evaluate
        from .model_source import each_checkpoint

        names = each_checkpoint(self.source)
        if len(names) > 1 and self.out:
            raise InputError(f"out is {self.out}, one file for {len(names)} checkpoints; leave it out, or name one")
        world = join()
        for name in names:
            found = evaluate(dataclasses.replace(self, source=name), world)
            if world.leads:
                self._report(found, name if len(names) > 1 else "")
        leave()

    def _report(self, found: "Evaluation", name: str) -> None:
        """Print an evaluation's result, after the checkpoint's name where there are several."""
        images, reference = found.settings["images"], found.settings["reference"]
        if found.digit_agreement is not None:
            share = f"{found.digit_agreement:.1%} of {images} samples"
            print(f"a 3-nearest-neighbour vote reads the digit that was asked for in {share}")
        how = "captions shown" if self.network == "scenes" else f"{self.network} features"
        scores = ", ".join(f"{score} {value:.4g}" for score, value in found.scores.items())
        print(f"{name}{': ' * bool(name)}{images} images against {reference}, {how}: {scores}")
        if self.out:
            print(f"to score them with the ADM suite: python evaluator.py REFERENCE.npz {self.out}")


@dataclass(frozen=True)
class Convert(Command):
    """Convert a checkpoint of the released PixNerd code to safetensors that pixnerd.load reads."""

    source: Annotated[str, tyro.conf.Positional]
    """checkpoint file, or repository on the Hugging Face hub"""
    out: Annotated[Path, tyro.conf.Positional]
    """the .safetensors file to write"""
    filename: str | None = None
    """which checkpoint of the repository, if it has several"""

    def run(self) -> None:
        from .checkpoints import save_model
        from .released import load_released

        if self.out.exists():
            raise InputError(f"{self.out} exists already; choose another name or remove it")
        check_output_file(self.out)
        model = load_released(self.source, self.filename)
        with replacing(self.out) as partial:
            save_model(model, partial)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"written: {self.out}, a {type(model).__name__} of {parameters / 1e6:.1f} million parameters")


@dataclass(frozen=True)
class Average(Command):
    """Make a moving average of another length after training, from those that a run with --power-averages keeps."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """RUN or RUN@STEP; the more of its checkpoints are kept (--keep-every), the nearer to the wanted average"""
    width: Positive
    """of the average, relative to the training so far: 0.05 is short, 0.2 long"""

    def run(self) -> None:
        from .model_source import find_model, synthesise

        file = synthesise(find_model(self.source).settled(), self.width)
        print(f"written: {file}; to measure it: pixnerd evaluate {self.source} --draw 500 --average {file.stem}")


@dataclass(frozen=True)
class Data(Command):
    """Look at a data set: its images per class, three captions and, with --show, a contact sheet."""

    name: DataSetName
    image_size: Count = 32
    """pixels along a side"""
    show: bool = False
    """write a contact sheet of 100 random images"""
    out: Path = Path("contact-sheet.png")
    """file for the contact sheet"""

    def run(self) -> None:
        import torch
        from PIL import Image

        from .randomness import Purpose, generator

        if self.show:
            check_output_file(self.out)
            if self.out.suffix.lower() not in Image.registered_extensions():
                raise InputError(f"contact sheet {self.out} has no suffix of a picture; .png is one")
        dataset = data.load(self.name, self.image_size)
        counts = torch.bincount(dataset.labels, minlength=dataset.num_classes).tolist()
        print(f"{self.name}: {len(dataset)} images of {dataset.channels}x{self.image_size}x{self.image_size}")
        for name, word, count in zip(dataset.classes, dataset.words, counts, strict=True):
            print(f"  {name}{f' {word}' * (word != name)}: {count}")
        shuffle = generator(torch.device("cpu"), 0, Purpose.DATA_ORDER)
        chosen = torch.randperm(len(dataset), generator=shuffle)[:100].tolist()
        for index in chosen[:3] if dataset.captions else ():
            print(f"  image {index}: {dataset.captions[index][0]}")
        if self.show:
            from torchvision.utils import make_grid, save_image

            pixels, _ = dataset.batch(chosen)
            with replacing(self.out) as partial:
                save_image(make_grid(pixels / 255, nrow=10, pad_value=0.5), partial)
            print(f"contact sheet: {self.out}")


@dataclass(frozen=True)
class Prepare(Command):
    """Crop a data set once and keep plain pixels, for `train --data prepared:OUT`; the same command resumes where it
    stopped, and checks every byte of a finished copy."""

    name: Annotated[str, tyro.conf.Positional]
    """a data set without captions, such as imagenet:PATH or folder:PATH"""
    out: Path
    """folder for the copy; ImageNet at 256 pixels takes 252 GB"""
    image_size: Count = 256
    """pixels along a side"""
    workers: Index = os.cpu_count() or 1
    """processes that read and crop; 0 uses this one"""

    def run(self) -> None:
        source = data.open_data_set(self.name, self.image_size)  # bad files are left out, not refused
        copy = data.prepare(source, self.name, self.out, self.workers)
        print(data.read_speeds(source, copy))
        if copy.skipped:
            print(
                f"{len(copy.skipped)} of {len(source)} images cannot be read and are left out, see "
                f"{self.out / 'skipped.txt'}; the first: {copy.skipped[0]}"
            )
        print(f"prepared: {len(copy.images)} images in {self.out}; train on them with: --data prepared:{self.out}")


@dataclass(frozen=True)
class Sweep(Command):
    """Make the runs of a study (notebooks/studies.md), each trained and measured in a process of its own.

    The same command goes on where it was stopped. It leaves alone what is done, what another process makes, and what
    failed before. Exit code 1 if a run failed, 75 if a signal ended the sweep.
    """

    study: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """the study, a YAML file"""
    index: tuple[Index, ...] | None = None
    """only the runs of these numbers, see --list; a single one is made in this process"""
    jobs: Count = 1
    """how many runs at a time"""
    out: Path | None = None
    """folder of the runs; by default runs/STUDY"""
    retry: bool = False
    """also make what failed before"""
    again: bool = False
    """also make what is in the record already"""
    list: bool = False
    """make nothing: say how far each run is"""
    record: bool = False
    """make nothing: write the figures of the runs that are done into data/ablations/STUDY"""
    compare: str | None = None
    """make nothing: say how the measures differ between the values of this axis, from the runs or from the record"""
    against: str = ""
    """with compare: the value that the others are compared with; by default the first that a run has"""
    tune: str = ""
    """with compare: an axis that is tuned, such as the learning rate; each combination of the others counts with the
    best value alone: the worst on the seeds that all have is dropped, until one is left"""
    by: str = ""
    """with tune: the measure that is smallest at the best value; by default velocity_error"""

    def run(self) -> None:
        from .studies.compare import at_best, best_values, table
        from .studies.record import earlier_record, stored_rows, write_record
        from .studies.study import expand, read_study
        from .studies.sweep import Status, carry_out, check_alone, check_folders, status_of, sweep

        check_alone()
        comparing = self.compare is not None
        if self.list + self.record + comparing > 1:
            raise InputError("list, record and compare are three commands: give one of them")
        if self.index is not None and (self.record or comparing):
            raise InputError("index names runs to make or to list; record and compare take all that are done")
        if self.index == ():
            raise InputError("index is empty; it takes the numbers of runs, see --list, or is left out for all of them")
        if self.against and not comparing:
            raise InputError(f"against is {self.against}; it goes with compare")
        if self.tune and (not comparing or self.tune == self.compare):
            raise InputError(f"tune is {self.tune}; it goes with compare, and names another axis than that")
        if self.by and not self.tune:
            raise InputError(f"by is {self.by}; it goes with tune")
        study = read_study(self.study)
        out = self.out or Path("runs", study.name)
        if self.compare is not None:
            rows = stored_rows(study, out)
            if self.tune:
                best = best_values(rows, self.tune, self.by or "velocity_error")
                others = [axis for axis in study.axes if axis != self.tune]
                _print_table([[*others, f"best {self.tune}"], *([*arm, value] for arm, value in best.items())])
                print()
                rows = at_best(rows, self.tune, best)
            _print_table(table(rows, self.compare, self.against))
            plan = expand(study, out) if out.is_dir() else []
            if failed := [run for run in plan if status_of(run).state == "failed"]:
                print(
                    f"\nleft out: {len(failed)} runs that failed, the first of them {failed[0].folder.name}, see --list"
                )
            return
        plan = expand(study, out)
        if beyond := [index for index in self.index or () if index >= len(plan)]:
            raise InputError(f"index is {beyond[0]}; study {study.name} has the runs 0 … {len(plan) - 1}")
        check_folders(study, plan, out)
        before = earlier_record(study)
        recorded = {row.index for row in before.rows} if before else set()
        chosen = [plan[index] for index in dict.fromkeys(self.index or ())] or plan
        if self.list:
            states = [(run, status_of(run)) for run in chosen]
            there = [Status("recorded") if s.state == "missing" and r.index in recorded else s for r, s in states]
            rows = [[run.folder.name, *state] for run, state in zip(chosen, there, strict=True)]
            _print_table([["run", "state", "why"], *rows], "<")
        elif self.record:
            print(f"recorded: {write_record(self.study, study, plan)}")
        elif len(chosen) > 1 or not self.index:
            left = [run for run in chosen if self.again or self.index or run.index not in recorded]
            if len(left) < len(plan) and not self.index:
                print(
                    f"{len(plan) - len(left)} of {len(plan)} runs are in the record, and not made again without --again"
                )
            if code := sweep(self.study, left, out, self.jobs, self.retry):
                sys.exit(code)
        else:
            state, why = carry_out(study, chosen[0], self.retry)
            print(f"{chosen[0].folder}: {state}{': ' * bool(why)}{why}")
            if state == "failed":
                sys.exit(1)


@dataclass(frozen=True)
class Bench(Command):
    """Measure what a training step and a sampling step cost, beside the plain network and the linear head.

    All share weights, batch and optimiser and take turns in this process. Prints tables, and writes
    data/benchmarks/NAME.json.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME"), Doc(f"one of {', '.join(PRESETS)}")]
    config: Annotated[BenchConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """file to write; by default data/benchmarks/NAME.json"""

    def run(self) -> None:
        from .bench.measure import run_benchmark
        from .bench.tables import TABLES

        flags = as_flags(self.config) + (["--out", str(self.out)] if self.out else [])
        record = run_benchmark(self.config, self.name, shlex.join(["pixnerd", "bench", self.name, *flags]), self.out)
        for title, table in TABLES.items():
            print(f"\n{title}:")
            _print_table(table(record))


@dataclass(frozen=True)
class ExportExplorer(Command):
    """Write the ablation explorer as one page that needs no network: every record in data/ablations, and the studies
    and runs in the folder runs."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.html")]
    """the file to write"""
    studies: tuple[str, ...] = ()
    """only these studies, by name"""

    def run(self) -> None:
        from .explore.ablations import export

        size = export(self.out, self.studies)
        print(f"written: {self.out}, {size / 1e6:.1f} MB; a browser opens it from the disk")


def _print_table(rows: Sequence[Sequence[str]], side: str = ">") -> None:
    """Print rows of text as columns, aligned to the left (<) or the right (>)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{entry:{side}{width}}" for entry, width in zip(row, widths, strict=True))
        print(f"  {'  '.join(cells)}".rstrip())


AnyCommand = Train | Sample | Evaluate | Convert | Average | Data | Prepare | Plan | Bench | Sweep | ExportExplorer


def parse(arguments: Sequence[str]) -> AnyCommand:
    """The command with its flags. Raises InputError for an unknown recipe or size, or a value out of range."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("recipe", "size", "distil", "teacher", "teacher-guidance"):
        first.add_argument(f"--{name}")
    try:
        base, _ = first.parse_known_args(arguments)  # these set the defaults of all others
    except argparse.ArgumentError:  # one of them has no value, as the whole parser will say
        base = first.parse_args([])
    recipe = base.recipe or ("student-cpu" if base.teacher else Train.recipe)
    config = RECIPES[recipe]
    if base.teacher:
        given = {} if base.teacher_guidance is None else {"teacher_guidance": 1.0}  # its own value, below
        config = student_config(base.teacher, config, distil=base.distil or "shortcut", **given)
    if base.size is not None:
        config = dataclasses.replace(config, model=SIZES[base.size])
    defaults: dict[str, AnyCommand] = {
        "train": Train(config, recipe, base.size),
        "plan": Plan(config, recipe, base.size),
    }
    defaults["bench"] = Bench("digits", PRESETS["digits"])
    command = _parse(arguments, defaults)
    if isinstance(command, Bench) and command.name != "digits":
        command = _parse(arguments, {**defaults, "bench": Bench(command.name, PRESETS[command.name])})
    if isinstance(command, (Sample, Evaluate)) and (sampling := own_sampling(command.source)):
        own = dataclasses.replace(command, sampling=sampling)  # defaults of the sampling flags
        command = _parse(arguments, {**defaults, type(command).__name__.lower(): own})
    return command


def _parse(arguments: Sequence[str], defaults: dict[str, AnyCommand]) -> AnyCommand:
    """The command with its flags; `defaults` holds the default values of some commands."""
    commands = {"train": Train, "sample": Sample, "evaluate": Evaluate, "convert": Convert, "average": Average}
    commands |= {"data": Data, "prepare": Prepare, "plan": Plan, "bench": Bench, "sweep": Sweep}
    commands["export-explorer"] = ExportExplorer
    kinds = []
    for name, kind in commands.items():
        options = {"default": defaults[name]} if name in defaults else {}
        kinds.append(Annotated[kind, tyro.conf.subcommand(name, **options)])
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union |= kind
    with _refusals_as_sentences():
        return tyro.cli(union, prog="pixnerd", args=arguments)


@contextlib.contextmanager
def _refusals_as_sentences() -> Iterator[None]:
    """If tyro exits because a configuration refused a value, raise that InputError; else print what tyro printed."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            yield
            return
        except SystemExit as stop:
            cause: BaseException | None = stop
            while cause is not None:
                if isinstance(cause, InputError):
                    raise cause from None
                cause = cause.__context__
            code, words = stop.code, printed.getvalue()
    if code:
        _let_the_leader_speak()
    print(words, end="", file=sys.stderr)  # an unknown flag, a wrong type, a wrong choice; --help has none
    sys.exit(code)


def as_flags(config: Any, prefix: str = "") -> list[str]:
    """The command line flags for a configuration, without its positional `source`; `parse` reverses this."""
    flags = []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        name = f"{prefix}{entry.name.replace('_', '-')}"
        if entry.name == "source":
            continue
        if isinstance(config, EvaluationConfig) and entry.name == "sampling":
            flags += as_flags(value)
        elif dataclasses.is_dataclass(value):
            flags += as_flags(value, f"{name}.")
        elif isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--{prefix}no-{name.removeprefix(prefix)}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Exit codes: 2 after invalid input or a file that cannot be written, 1 after a non-finite loss, STOPPED if a signal
    ended a training run early. An error that all processes raise is printed by the leading one alone.
    """
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        try:
            command = parse(sys.argv[1:] if arguments is None else arguments)
        except InputError as error:
            error.shared = True
            raise
        command.run()
        sys.stdout.flush()
    except InputError as error:
        if error.shared:
            _let_the_leader_speak()
        _end(_say(error, 2))
    except NonFiniteLoss as error:
        _let_the_leader_speak()
        _end(_say(error, 1))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would complain
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(_say("interrupted; the same command resumes from here", 130))


def _say(message: object, code: int) -> int:
    print(f"pixnerd: {message}", file=sys.stderr)
    return code


def _end(code: int) -> NoReturn:
    """Exit. One of several processes does so at once: the threads that talk to the others may abort an orderly end."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _let_the_leader_speak() -> None:
    """In every process but the leading one: wait for the end, then exit without a word.

    torchrun ends all processes as soon as one of them fails; that has to be the one that says why.
    """
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
        sys.exit(2)
