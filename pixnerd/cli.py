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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from . import data
from .checkpoints import load, load_released, newest_checkpoint, save_model
from .distributed import World, join, leave
from .errors import InputError
from .metrics.evaluation import SampleFile, collect, compare, own_batches, reference_features
from .metrics.images import open_images
from .metrics.nearest import digit_agreement
from .metrics.networks import Network, load_network
from .metrics.scenes import score_scenes, true_score
from .model import PixNerd
from .randomness import Purpose, generator
from .recipes import RECIPES
from .runs import Run
from .sampling import SamplingConfig, sample, sample_batches
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


def overridden(config: SamplingConfig, flags: "Sample | Evaluate") -> SamplingConfig:
    """The configuration with those of its fields that were given as flags."""
    names = (field.name for field in dataclasses.fields(SamplingConfig))
    return dataclasses.replace(
        config, **{name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    )


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
        config = TrainConfig.from_dict(run.config())
        sampling = overridden(config.sampling, self)
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
class Conditions:
    """What `evaluate` draws."""

    labels: Tensor
    """[images] classes, or places of captions in the reference"""
    encoded: Callable[[Tensor], Tensor]
    """some of them → what the model takes: the classes themselves, or text features [B, L, F]"""
    empty: Tensor | None
    """features [L, F] of the empty caption; None for classes"""


@dataclass(frozen=True)
class Evaluate:
    """Measure drawn images against real ones: a run's samples, or images that a run draws straight into the features.

    A text model draws captions of the reference, which has to be a data set then: of each image the plainest. Each
    result is a row of the run's metrics.json; what is there already is not measured again. `torchrun … -m pixnerd
    evaluate …` draws and measures on many GPUs.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """run folder, or images: a .npz with arr_0, or a folder of pictures"""
    reference: str = ""
    """real images: the ADM suite's reference .npz, a folder of pictures, or a data set; by default the run's"""
    network: Literal[Network, "scenes"] = "efficientnet"
    """whose features: inception gives FID, sFID, IS, precision and recall; efficientnet needs no download. Or
    none: scenes counts, of captions of shapes, those that the drawing shows"""
    weights: str | None = None
    """Inception's file of weights, or DINOv2's folder; by default they are fetched"""
    draw: int = 0
    """draw so many images with the newest checkpoint; 0 measures the images that are there"""
    classes: Literal["equal", "random"] = "equal"
    """of drawn images: as many of each class, or of each caption, or at random"""
    average: str = "ema"
    """weights to draw with: ema, ema-DECAY or model"""
    steps: int | None = None
    solver: str | None = None
    guidance: float | None = None
    interval: tuple[float, float] | None = None
    """guide only steps that start strictly inside"""
    shift: float | None = None
    seed: int = 0
    """of the noise and the random classes; image i depends on (seed, i) alone"""
    batch_size: int = 64
    out: Path | None = None
    """also write what is drawn as .npz, for the ADM suite"""

    def run(self) -> None:
        if self.draw < 0 or self.batch_size < 1:
            raise InputError(f"draw is {self.draw} and batch_size {self.batch_size}; they have to be at least 0 and 1")
        run = Run(self.source)
        is_run = run.config_path.is_file()
        if not is_run and (self.draw or not self.reference):
            raise InputError(f"{self.source} holds no run: name the real images with --reference, and draw nothing")
        config = TrainConfig.from_dict(run.config()) if is_run else None
        world = join()
        if config and config.data == "digits" and not self.draw and world.leads:
            images, labels = run.load_samples()
            agreement = digit_agreement(images, labels)
            run.save_metrics({"digit_agreement": agreement, "images": len(images)})
            print(f"the label is what a 3-nearest-neighbour vote reads in {agreement:.1%} of {len(images)} samples")
        reference = self.reference or config.data
        if self.network == "scenes" and (not self.draw or self.weights):
            raise InputError("network 'scenes' has no weights and reads what is drawn on the spot: name --draw alone")
        if self.draw:
            settings = self.settings()
        else:
            drawn = open_images(self.source)
            settings = {"reference": reference, "network": self.network}
            settings |= {"images": drawn.count, "samples": str(self.source)}
        scores = run.evaluation(settings) if self.draw and not self.out else None
        if scores is None:
            scored = self.network == "scenes"
            network = None if scored else load_network(self.network, self.weights, world.device)
            if self.draw:
                model = load(run.folder, weights=self.average, device=world.device)
                size = model.config.image_size
                conditions = self._conditions(model, config, reference, world)
                batches = self._drawn(model, conditions, overridden(config.sampling, self), world)
            else:
                size = next(drawn.batches(1)).shape[-1]
                batches = own_batches(drawn, self.batch_size, world)
            if scored:
                scores = self._scene_scores(conditions, reference, size, batches, world)
            else:
                folder = run.folder if is_run else None
                real = reference_features(network, self.network, reference, size, self.batch_size, world, folder)
                found = collect(network, batches, settings["images"], world)
                scores = compare(real, found, self.network) if world.leads else {}
            if world.leads and is_run:
                run.save_evaluation(settings, scores)
        if world.leads:
            how = "captions shown" if self.network == "scenes" else f"{self.network} features"
            kind = f"{settings['images']} images against {reference}, {how}"
            print(f"{kind}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
            if self.out:
                print(f"with the ADM suite: python evaluator.py REFERENCE.npz {self.out}")
        leave()

    def settings(self) -> dict[str, Any]:
        """What a row of images that are drawn is found by in metrics.json, see `Run.evaluation`."""
        run = Run(self.source)
        config = TrainConfig.from_dict(run.config())
        checkpoint = newest_checkpoint(run.checkpoints)
        return {
            "reference": self.reference or config.data,
            "network": self.network,
            "checkpoint": checkpoint and checkpoint.name,
            "average": self.average,
            "images": self.draw,
            "classes": self.classes,
            "seed": self.seed,
            "sampling": dataclasses.asdict(overridden(config.sampling, self)),
        }

    def _conditions(
        self, model: PixNerd | TextPixNerd, config: TrainConfig, reference: str, world: World
    ) -> Conditions:
        """What to draw: all classes or, with a text model, all captions of the reference, in turns or at random."""
        if isinstance(model, TextPixNerd):
            captions = [ways[0] for ways in data.load(reference, model.config.image_size).captions]
            if not captions:
                raise InputError(f"run {self.source} draws captions, and {reference!r} has none: name --reference")
            encode = caption_encoder(config, world.device)
            kinds, empty = len(captions), encode([""])[0]
            encoded = lambda labels: encode([captions[label] for label in labels.tolist()])
        else:
            kinds, empty, encoded = model.num_classes, None, lambda labels: labels
        labels = torch.arange(self.draw) % kinds
        if self.classes == "random":
            labels = torch.randint(kinds, (self.draw,), generator=torch.Generator().manual_seed(self.seed))
        return Conditions(labels, encoded, empty)

    def _scene_scores(
        self,
        conditions: Conditions,
        reference: str,
        size: int,
        batches: Iterable[tuple[int, Tensor]],
        world: World,
    ) -> dict[str, float]:
        """How many drawings of scenes show their caption, and beside it how many true ones do, by the same detector."""
        dataset = data.load(reference, size)
        if conditions.empty is None or not isinstance(dataset, data.Shapes):
            raise InputError(
                f"network 'scenes' reads captions of shapes; it cannot measure {self.source} against {reference!r}: "
                "it needs a text model and --reference shapes or shapes:held-out"
            )
        drawn = torch.zeros(self.draw, 3, size, size)
        for first, pixels in tqdm(batches, unit="batch", disable=not world.leads, mininterval=1):
            drawn[first : first + len(pixels)] = pixels.cpu()
        drawn = world.sum(drawn).to(torch.uint8)
        scenes = [dataset.scenes[label] for label in conditions.labels.tolist()]
        return score_scenes(drawn, scenes).to_dict() | {"true drawings": true_score(scenes, size).overall}

    def _drawn(
        self, model: PixNerd | TextPixNerd, conditions: Conditions, sampling: SamplingConfig, world: World
    ) -> Iterator[tuple[int, Tensor]]:
        """This process's batches of what is drawn: the place of the first, and uint8 [B, 3, H, W]."""
        size = model.config.image_size
        file = SampleFile(self.out, (self.draw, size, size, 3), world) if self.out else None
        for number, batch in enumerate(torch.arange(self.draw).split(self.batch_size)):
            if number % world.size != world.rank:
                continue
            options = {**dataclasses.asdict(sampling), "seed": self.seed, "indices": batch.tolist()}
            condition = conditions.encoded(conditions.labels[batch]).to(world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=world.device.type == "cuda"):
                images = sample(model, condition, unconditional=conditions.empty, **options)
                pixels = data.to_uint8(images).expand(-1, 3, -1, -1)
            if file:
                file.put(int(batch[0]), pixels)
            yield int(batch[0]), pixels
        if file:
            file.close(conditions.labels)


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
    """digits, emoji, emoji:WORDS, synthetic, shapes, shapes:held-out, folder:PATH, imagenet:PATH, prepared:PATH,
    captions:PATH or shards:PATH"""
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
