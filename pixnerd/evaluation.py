"""Evaluation: from a model or a set of images to a row of metrics.json, measured only once.

The images are a run's saved samples, a file or folder of images, or sampled on the fly without being stored. Under
torchrun every process samples and measures its share. Dimension letters: B images of a batch, H × W pixels.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from . import data, frozen
from .checkpoints import load_newest
from .compiling import compile_to_sample
from .conditions import Conditions, Subject, model_conditions
from .config import EvaluationConfig
from .distributed import World, join
from .errors import InputError
from .files import check_output_file, make_folder
from .metrics.features import SampleFile, check_shared, collect, compare, own_batches, reference_features
from .metrics.images import Images, content_of, open_images
from .metrics.nearest import digit_agreement
from .metrics.scenes import score_scenes, true_score
from .model import PatchDenoiser
from .model_source import ModelSource, find_model, load_guide
from .runs import Run
from .sampling import sample


class Evaluation(NamedTuple):
    """The result of an evaluation."""

    settings: dict[str, Any]  # how it was measured: identifies its row in metrics.json
    scores: dict[str, float]  # by name; empty in all processes but the leading one
    digit_agreement: float | None = None  # share of a digits run's samples that show the digit asked for


def evaluate(config: EvaluationConfig, world: World | None = None) -> Evaluation:
    """Measure images against real ones. A run keeps each result in metrics.json; with `draw`, images are not sampled
    and measured again for a result that is there.

    Args:
        config: which images to measure, against which, and how.
        world: the processes that share the work; by default those of this program.

    Raises:
        InputError: images, reference, checkpoint or network are missing or do not match.
    """
    world = world or join()
    with world.together():
        source, run = _subject(config)
        agreement = _digit_agreement(run) if run is not None and source is None and world.leads else None
        there = None if source else open_images(config.source)
        if config.network != "scenes":
            check_shared(there.count if there else config.draw, config.batch_size, world)
    asked = source
    if asked:
        source = asked.settled(world)
    settings = _shared_settings(config, there, source, world)
    found = run.evaluation(settings) if source and not config.out and world.leads else None
    if world.any(found is not None):
        return Evaluation(settings, found or {})
    with world.together():
        if run is not None and world.leads:
            make_folder(run.folder)
        if config.out and world.leads:
            check_output_file(Path(config.out))
    samples = None
    if asked:
        source, model = _load(asked, config, world)
        # a training run may have written another checkpoint meanwhile
        with world.together():
            drawn = sampled_settings(config, source) if world.leads else None
        settings = world.from_leader(settings | drawn if world.leads else None)
        with world.together():
            samples = Samples(config, source, world, model)
    if config.network == "scenes":
        scores = _scene_scores(samples, world)
    else:
        with world.together():
            network = frozen.load(config.network, world.device, config.weights)
        batches = samples.batches() if samples else own_batches(there, config.batch_size, world, config.workers)
        size = samples.image_size if samples else next(there.batches(1)).shape[-1]
        folder, reference = run and run.folder, settings["reference"]
        options = {"weights": config.weights, "workers": config.workers, "content": settings["reference_content"]}
        real = reference_features(
            network.pooled, config.network, reference, size, config.batch_size, world, folder, **options
        )
        found = collect(network.pooled, batches, settings["images"], world)
        scores = compare(real, found, network.measure, world.device) if world.leads else {}
    if world.leads and run is not None:
        run.save_evaluation(settings, scores)
    return Evaluation(settings, scores, agreement)


def _subject(config: EvaluationConfig) -> tuple[ModelSource | None, Run | None]:
    """The model to sample with, None for existing images, and the run that keeps the result, if any."""
    if config.draw:
        source = find_model(config.source)
        if source.run is None and not config.reference:
            raise InputError(f"{config.source} belongs to no run: name the real images with --reference")
        return source, source.results
    run = Run(config.source)
    if run.config_path.is_file():
        return None, run
    if _is_model(config.source):
        raise InputError(f"{config.source} is a trained model: say with --draw how many images to sample and measure")
    if not config.reference:
        raise InputError(f"{config.source} holds no run: name the real images with --reference")
    return None, None


def _is_model(name: str) -> bool:
    """Whether this names weights, RUN@STEP among them, and no images."""
    try:
        source = find_model(name)
    except InputError:
        return False
    return source.run is not None or source.path is None or source.path.suffix in (".safetensors", ".ckpt")


def _load(source: ModelSource, config: EvaluationConfig, world: World) -> tuple[ModelSource, PatchDenoiser]:
    """The model, the same on every process, and the checkpoint that it was read from."""
    if source.follows:
        checkpoint, model = load_newest(source.run.checkpoints, world, config.average, world.device)
        return source.at(checkpoint), model
    with world.together():
        return source, source.load(config.average, world.device)


def _shared_settings(
    config: EvaluationConfig, images: Images | None, source: ModelSource | None, world: World
) -> dict[str, Any]:
    """`row_settings` as the leading process sees the files, on every process."""
    with world.together():
        settings = row_settings(config, images, source) if world.leads else None
    return world.from_leader(settings)


def row_settings(
    config: EvaluationConfig, images: Images | None = None, source: ModelSource | None = None
) -> dict[str, Any]:
    """The settings that identify a row of metrics.json, see `Run.evaluation`.

    `images` are existing ones to measure; `source` samples them, by default the model that `config` names.
    """
    if images is None:
        source = (source or find_model(config.source)).settled()
    run = source.run if source else Run(config.source)
    reference = config.reference or run.config().data
    measured = {
        "reference": reference,
        "reference_content": content_of(reference),
        "network": config.network,
        "weights": config.weights,
    }
    if source is None:
        return {**measured, "images": images.count, "samples": str(Path(config.source))}
    return measured | sampled_settings(config, source)


def sampled_settings(config: EvaluationConfig, source: ModelSource) -> dict[str, Any]:
    """Those of them that say which model samples, and how."""
    sampling = dataclasses.asdict(config.sampling)
    guide = sampling.pop("guide")
    return {
        **({"guide_content": find_model(guide).content()} if guide else {}),  # rows of earlier versions had none
        "checkpoint": source.label,
        "model_content": source.content(config.average),
        "average": config.average,
        "images": config.draw,
        "classes": config.classes,
        "seed": config.seed,
        "sampling": sampling,
    }


def _digit_agreement(run: Run) -> float | None:
    """Share of a digits run's samples that show the digit asked for, kept in metrics.json; None for other runs."""
    if run.config().data != "digits":
        return None
    images, labels = run.load_samples()
    agreement = digit_agreement(images, labels)
    run.save_metrics({"digit_agreement": agreement, "images": len(images)})
    return agreement


class Samples:
    """Images sampled with a model, batch by batch; each process samples its share.

    Raises:
        InputError: the reference lacks the captions that a text model needs, or its labels have another meaning.
    """

    def __init__(self, config: EvaluationConfig, source: ModelSource, world: World, model: PatchDenoiser):
        self.config, self.world, self.model = config, world, model
        run, run_config = source.run, source.config(model)
        self.reference = config.reference or run_config.data
        self.image_size = self.model.config.image_size
        self.conditions: Conditions = model_conditions(self.model, run_config, world.device)
        self.guide = load_guide(config.sampling, world.device)
        each = -(-config.draw // world.size)  # images of a process
        compile_to_sample(config.compile, model, self.guide, each, config.sampling)
        if run and self.conditions.subject == "class" and self.reference == run_config.data and run.classes():
            run.check_classes(data.open_data_set(self.reference, self.image_size).classes)
        self.subjects: Sequence[Subject] = self.conditions.subjects(self.reference, self.image_size)
        known = len(self.subjects)
        images = torch.arange(config.draw)
        # [images], indices of subjects: each in turn, or fewer than all evenly spread, since neighbours may be alike
        self.labels = images % known if config.draw >= known else images * known // config.draw
        if config.classes == "random":
            chosen_by = torch.Generator().manual_seed(config.seed)
            self.labels = torch.randint(len(self.subjects), (config.draw,), generator=chosen_by)

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """This process's batches: the index of the first image, and uint8 [B, 3, H, W]."""
        config, world, size = self.config, self.world, self.image_size
        nothing = self.conditions.nothing
        file = SampleFile(Path(config.out), (config.draw, size, size, 3), world) if config.out else None
        with file or contextlib.nullcontext():
            for number, batch in enumerate(torch.arange(config.draw).split(config.batch_size)):
                if number % world.size != world.rank:
                    continue
                condition = self.conditions.encode([self.subjects[label] for label in self.labels[batch].tolist()])
                with torch.autocast(world.device.type, torch.bfloat16, enabled=world.device.type == "cuda"):
                    images = sample(
                        self.model,
                        condition,
                        config.sampling,
                        unconditional=nothing,
                        weaker=self.guide,
                        seed=config.seed,
                        indices=batch.tolist(),
                    )
                    pixels = data.to_uint8(images).expand(-1, 3, -1, -1)
                if file:
                    file.put(int(batch[0]), pixels)
                yield int(batch[0]), pixels
            if file:
                file.finish(self.labels)


def _scene_scores(samples: Samples, world: World) -> dict[str, float]:
    """The share of samples that show their caption, and that of true images, by the same detector."""
    size, count = samples.image_size, samples.config.draw
    dataset = data.load(samples.reference, size)
    if samples.conditions.subject != "prompt" or not isinstance(dataset, data.Shapes):
        raise InputError(
            f"network 'scenes' reads captions of shapes; it cannot measure {samples.config.source} against "
            f"{samples.reference!r}: it needs a text model and --reference shapes or shapes:held-out"
        )
    images = torch.zeros(count, 3, size, size)
    for first, pixels in tqdm(samples.batches(), unit="batch", disable=not world.leads, mininterval=1):
        images[first : first + len(pixels)] = pixels.cpu()
    images = world.sum(images).to(torch.uint8)
    scenes = [dataset.scenes[label] for label in samples.labels.tolist()]
    return score_scenes(images, scenes).to_dict() | {"true drawings": true_score(scenes, size).overall}
