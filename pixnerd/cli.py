"""The command line: pixnerd train | sample | evaluate | convert | data | prepare.

Wrong input ends with one sentence on standard error and exit code 2.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from . import data
from .checkpoints import load, load_released, save_model
from .distributed import join, leave
from .errors import InputError
from .metrics.nearest import digit_agreement
from .randomness import Purpose, generator
from .recipes import RECIPES
from .runs import Run
from .sampling import SamplingConfig, sample_batches
from .text import ALL_SIZES, TextPixNerd
from .training import NonFiniteLoss, TrainConfig, caption_encoder, default_device, train


@dataclass(frozen=True)
class Train:
    """Train a model, or go on with the run in --out."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    recipe: str = "imagenet-256"
    """start from these settings; every other flag overrides them"""
    size: str | None = None
    """use a named model size; --model.* flags override it"""

    def run(self) -> None:
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())  # what clusters send before they take a machine away
        records, world = train(self.config), join()
        if world.size > 1:  # several processes have to stop at the same step to save together
            signal.signal(signal.SIGINT, lambda *_: stop.set())
        last = self.config.steps
        with tqdm(total=last, unit="step", mininterval=1, disable=not world.leads) as bar:
            for record in records:
                bar.update(record.step - bar.n)
                if record.step % self.config.log_every == 0:
                    bar.set_postfix(loss=f"{float(record.loss):.4f}")
                if record.step < last and world.any(stop.is_set()):
                    records.close()  # writes a checkpoint
                    last = record.step
                    break
        leave()
        if world.leads and last < self.config.steps:
            print(f"stopped after step {last}, as told; the same command goes on from here")
        elif world.leads:
            print(f"trained: {self.config.out}; look at it with: pixnerd sample {self.config.out}")


@dataclass(frozen=True)
class Sample:
    """Sample images with a run's newest checkpoint (EMA weights); flags that are not given are the run's own."""

    run_folder: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    count: int = 100
    """images; the classes or prompts share them evenly, in order"""
    labels: tuple[int, ...] = ()
    """classes to draw instead of all"""
    prompts: tuple[str, ...] = ()
    """captions to draw, for a text model; samples.npz then has their places in this list as labels"""
    steps: int | None = None
    solver: str | None = None
    guidance: float | None = None
    interval: tuple[float, float] | None = None
    """guide only steps that start strictly inside"""
    shift: float | None = None
    image_size: tuple[int, int] | None = None
    """height and width in pixels; by default what the model was trained at"""
    base_resolution: tuple[int, int] | None = None
    """height and width that the transformer sees while the fields decode the image size; by default the same"""
    seed: int = 0
    """of the noise; image i depends on (seed, i) alone"""
    batch_size: int = 64
    out: Path | None = None
    """folder for samples.png and samples.npz; by default the run's"""

    def run(self) -> None:
        if self.count < 1:
            raise InputError(f"count is {self.count}; it has to be at least 1")
        run = Run(self.run_folder)
        names = (field.name for field in dataclasses.fields(SamplingConfig))
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        config = TrainConfig.from_dict(run.config())
        sampling = dataclasses.replace(config.sampling, **given)
        device = default_device()
        model = load(run.folder, device=device)
        is_text = isinstance(model, TextPixNerd)
        if is_text != bool(self.prompts):
            needs = "a text model: name --prompts" if is_text else "a class-conditional model: it takes --labels"
            raise InputError(f"run {run.folder} is of {needs}")
        wanted = range(len(self.prompts)) if is_text else self.labels or range(model.num_classes)
        each = -(-self.count // len(wanted))  # rounded up
        labels = torch.tensor(wanted).repeat_interleave(each)[: self.count]
        condition, empty = labels, None
        if is_text:
            features = caption_encoder(config, device)([*self.prompts, ""])  # [prompts + 1, L, F]
            condition, empty = features[labels], features[-1]
        batches = sample_batches(
            model,
            condition,
            sampling,
            unconditional=empty,
            size=self.image_size,
            base_resolution=self.base_resolution,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            images = list(tqdm(batches, total=-(-self.count // self.batch_size), unit="batch"))
        target = Run(self.out or run.folder)
        target.folder.mkdir(parents=True, exist_ok=True)
        target.save_samples(torch.cat(images), labels, columns=min(each, 20))
        print(f"drawn: {target.folder / 'samples.png'}, {target.folder / 'samples.npz'}")


@dataclass(frozen=True)
class Evaluate:
    """Measure the samples of a run on digits: the share that a k-NN on the real digits takes for their label."""

    run_folder: Annotated[Path, tyro.conf.Positional]
    """folder with samples.npz, where metrics.json goes"""

    def run(self) -> None:
        run = Run(self.run_folder)
        if run.config_path.is_file() and (name := run.config()["data"]) != "digits":
            raise InputError(f"run {run.folder} is on data set {name!r}; so far only 'digits' has a measure here")
        images, labels = run.load_samples()
        agreement = digit_agreement(images, labels)
        run.save_metrics({"digit_agreement": agreement, "images": len(images)})
        print(f"the label is what a 3-nearest-neighbour vote reads in {agreement:.1%} of {len(images)} samples")


@dataclass(frozen=True)
class Convert:
    """Write a checkpoint of the released PixNerd code as safetensors that pixnerd.load reads."""

    source: Annotated[str, tyro.conf.Positional]
    """checkpoint file, or repository on the Hugging Face hub"""
    out: Annotated[Path, tyro.conf.Positional]
    """the .safetensors file to write"""
    filename: str | None = None
    """which checkpoint of the repository, where it has several"""

    def run(self) -> None:
        if self.out.exists():
            raise InputError(f"{self.out} exists already; choose another name or remove it")
        model = load_released(self.source, self.filename)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, self.out)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"written: {self.out}, a {type(model).__name__} of {parameters / 1e6:.1f} million parameters")


@dataclass(frozen=True)
class Data:
    """Look at a data set: how many images of which classes, three captions, and, with --show, a contact sheet."""

    name: Annotated[str, tyro.conf.Positional]
    """digits, emoji, emoji:WORDS, synthetic, folder:PATH, imagenet:PATH, prepared:PATH, captions:PATH or shards:PATH"""
    image_size: int = 32
    """pixels along a side"""
    show: bool = False
    """write a contact sheet of 100 random images"""
    out: Path = Path("contact-sheet.png")
    """where the contact sheet goes"""

    def run(self) -> None:
        dataset = data.load(self.name, self.image_size)
        counts = torch.bincount(dataset.labels, minlength=dataset.num_classes).tolist()
        print(f"{self.name}: {len(dataset)} images of {dataset.channels}x{self.image_size}x{self.image_size}")
        for name, count in zip(dataset.classes, counts, strict=True):
            print(f"  {name}: {count}")
        shuffle = generator(torch.device("cpu"), 0, Purpose.DATA_ORDER)
        chosen = torch.randperm(len(dataset), generator=shuffle)[:100].tolist()
        for index in chosen[:3] if dataset.captions else ():
            print(f"  image {index}: {dataset.captions[index][0]}")
        if self.show:
            pixels, _ = dataset.batch(chosen)
            self.out.parent.mkdir(parents=True, exist_ok=True)
            save_image(make_grid(pixels / 255, nrow=10, pad_value=0.5), self.out)
            print(f"contact sheet: {self.out}")


@dataclass(frozen=True)
class Prepare:
    """Crop a data set once and keep plain pixels, for `train --data prepared:OUT`; the same command goes on where it
    stopped, and checks every byte of a finished copy."""

    name: Annotated[str, tyro.conf.Positional]
    """a data set without captions, such as imagenet:PATH or folder:PATH"""
    out: Path
    """folder of the copy; ImageNet at 256 pixels takes 252 GB"""
    image_size: int = 256
    """pixels along a side"""
    workers: int = os.cpu_count() or 1
    """processes that read and crop; 0 does it in this one"""

    def run(self) -> None:
        source = data.load(self.name, self.image_size)
        copy = data.prepare(source, self.name, self.out, self.workers)
        print(data.read_speeds(source, copy))
        if copy.skipped:
            print(
                f"{len(copy.skipped)} of {len(source)} images cannot be read and are left out, see "
                f"{self.out / 'skipped.txt'}; the first: {copy.skipped[0]}"
            )
        print(f"prepared: {len(copy.images)} images in {self.out}; train on them with: --data prepared:{self.out}")


def parse(arguments: Sequence[str]) -> Train | Sample | Evaluate | Convert | Data | Prepare:
    """The command with its flags. Raises InputError for an unknown recipe, size or value out of range."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe", default=Train.recipe)
    first.add_argument("--size")
    base, _ = first.parse_known_args(arguments)  # these two decide the defaults of all the others
    config = RECIPES[base.recipe]
    if base.size is not None:
        config = dataclasses.replace(config, model=ALL_SIZES[base.size])
    train_command = tyro.conf.subcommand("train", default=Train(config, base.recipe, base.size))
    commands = (
        Annotated[Train, train_command]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Convert, tyro.conf.subcommand("convert")]
        | Annotated[Data, tyro.conf.subcommand("data")]
        | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    )
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            return tyro.cli(commands, prog="pixnerd", args=arguments)
        except SystemExit as stop:
            cause: BaseException | None = stop
            while cause is not None:  # a configuration that refused a value is the reason behind tyro's exit
                if isinstance(cause, InputError):
                    raise cause from None
                cause = cause.__context__
            code, words = stop.code, printed.getvalue()
    print(words, end="", file=sys.stderr)  # tyro's own: an unknown flag, a wrong type, a wrong choice; --help has none
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 2 after wrong input, 1 after a loss that is not finite."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        parse(sys.argv[1:] if arguments is None else arguments).run()
    except InputError as error:
        sys.exit(_say(error, 2))
    except NonFiniteLoss as error:
        sys.exit(_say(error, 1))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted; the same command goes on from here", 130))


def _say(message: object, code: int) -> int:
    print(f"pixnerd: {message}", file=sys.stderr)
    return code
