"""What a study measures of a trained run: velocity errors, samples, training and cost, kept in metrics.json.

Everything random is shared by all runs (the held-out images, their noise and times, the noise that sampling starts
from), so a difference between two runs is paired and almost free of sampling noise.

Dimension letters: N images, C channels, H × W pixels.
"""

import dataclasses
import statistics
from typing import Any

import torch
from torch import Tensor

from .. import cost, data, flow, frozen
from ..conditions import Conditions, model_conditions
from ..config import EvaluationConfig, SamplingConfig, TrainConfig
from ..data import ImageDataset, Shapes
from ..distributed import World, join
from ..errors import InputError
from ..evaluation import Samples
from ..files import replacing
from ..metrics.features import REFERENCES, collect, compare, own_batches, reference_features
from ..metrics.images import open_images
from ..metrics.nearest import digit_agreement
from ..metrics.scenes import score_scenes
from ..metrics.softened import ClassVote, sharpness, soften
from ..metrics.statistics import retrieval_ranks
from ..model import PatchDenoiser
from ..model_config import TextModelConfig
from ..model_source import ModelSource, find_model
from ..runs import Run
from ..sampling import sample_noise
from .logged import training_figures
from .sheet import SHEET, save_sheet
from .wanted import Measures

NETWORK = "efficientnet"
SEED = 2020  # of what all runs share
LAST = 0.96  # errors are measured up to this t, the last one at which 25 Euler steps ask for a velocity
CAPTIONS = 64  # pictures among which a caption's own has to be the nearest


def check_measures(config: TrainConfig, wanted: Measures) -> None:
    """Raise InputError unless the data that a run of `config` is measured on exist and suit its model."""
    size, text = config.model.image_size, isinstance(config.model, TextModelConfig)
    if wanted.errors_on and not config.distil:
        num_classes = None if text else data.open_data_set(config.data, size).num_classes
        check_images(data.load(wanted.errors_on, size), wanted.errors_on, num_classes)
    if wanted.reference and (wanted.samples or wanted.unguided):
        reference = data.load(wanted.reference, size)
        if text:
            check_images(reference, wanted.reference, None)


def check_images(images: ImageDataset, name: str, num_classes: int | None) -> None:
    """Raise InputError unless images have the classes of a model, or captions where it has none: a text model."""
    if num_classes not in (None, images.num_classes):
        raise InputError(f"the model knows {num_classes} classes; the images of {name} have {images.num_classes}")
    if num_classes is None and not images.captions:
        raise InputError(f"a text model is measured on images with captions, and those of {name} have none")


def measure_run(
    run: Run, wanted: Measures, sampling: SamplingConfig | None = None, into: Run | None = None
) -> dict[str, Any]:
    """Measure a trained run and keep the result as "study" in metrics.json, with sixteen samples in sheet.webp.

    Args:
        run: a run trained to its end.
        wanted: what to measure.
        sampling: how to sample; by default as the run's configuration says.
        into: the run that keeps the result; by default the measured one. Features of real images are cached beside it.

    Returns:
        "wanted" and "sampling", the settings; "scores", numbers by name; "error_by_t", ten numbers, none of a student.

    Raises:
        InputError: the run has no checkpoint, or the data cannot be used.
    """
    world, config, into = join(), run.config(), into or run
    sampling = sampling or config.sampling
    source = find_model(run.folder).settled()
    model = source.load("ema", world.device)
    conditions = model_conditions(model, config, world.device)
    scores, by_t = {}, []
    if not model.config.student:  # whose velocities nobody follows
        images = data.load(name := wanted.errors_on or config.data, config.model.image_size)
        check_images(images, name, model.num_classes)
        by_t = velocity_errors(model, images, conditions, wanted.errors, wanted.batch_size)
        scores["velocity_error"] = statistics.fmean(by_t)
    if wanted.samples:
        scores |= sample_scores(source, model, wanted, sampling, into, world)
    if wanted.unguided and pixels_decide(config, wanted):
        plain = dataclasses.replace(sampling, guidance=1.0, guide="")
        pixels, samples = draw(source, model, wanted, plain, wanted.unguided, world)
        scores["unguided_agreement"] = asked_for(pixels, samples)
    scores |= training_figures(run) | costs(model, run)
    found = {"wanted": dataclasses.asdict(wanted), "sampling": dataclasses.asdict(sampling)}
    found |= {"scores": {name: round(value, 6) for name, value in scores.items()}}
    found |= {"error_by_t": [round(value, 6) for value in by_t]}
    into.save_metrics({"study": found})
    return found


@torch.no_grad()
def velocity_errors(
    model: PatchDenoiser, images: ImageDataset, conditions: Conditions, count: int, batch_size: int
) -> list[float]:
    """mean((v̂ − v)²) in each tenth of [0, 0.96], over the same images, noise and times for every model.

    Beyond t = 0.96 a network that predicts the image has a velocity error that 1/(1 − t)² alone decides, and samplers
    hardly ever evaluate there.

    Args:
        model: the network, conditioned on what each image is.
        images: `count` of them are used, all if there are fewer, chosen at random but always the same.
        conditions: what the model is told.
        count: number of images.
        batch_size: images per batch.
    """
    device, config = model.patch_embed.weight.device, model.config
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(len(images), generator=generator)[:count]
    within = torch.rand(10, len(chosen), generator=generator)  # the place of each time in its tenth
    totals = torch.zeros(10, dtype=torch.float64)
    shape = config.channels, config.image_size, config.image_size
    for part in torch.arange(len(chosen)).split(batch_size):
        indices = chosen[part].tolist()
        pixels, labels = images.batch(indices)
        x = data.to_float(pixels).to(device)
        subjects = [images.captions[i][0] for i in indices] if conditions.subject == "prompt" else labels.tolist()
        condition = conditions.encode(subjects).to(device)
        for tenth in range(10):
            noise = sample_noise(shape, indices, SEED, tenth).to(device)
            t = (LAST * (tenth + within[tenth, part]) / 10).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                v = model(flow.interpolate(x, noise, t), t, condition)
            totals[tenth] += flow.mean_square(v.float() - flow.velocity(x, noise)).double().sum().cpu()
    return (totals / len(chosen)).tolist()


def draw(
    source: ModelSource, model: PatchDenoiser, wanted: Measures, sampling: SamplingConfig, count: int, world: World
) -> tuple[Tensor, Samples]:
    """Sample `count` images: uint8 [N, 3, H, W], and what they were asked to show."""
    settings = EvaluationConfig(
        str(source.run.folder), wanted.reference, draw=count, sampling=sampling, batch_size=wanted.batch_size
    )
    samples = Samples(settings, source, world, model)
    return torch.cat([pixels.cpu() for _, pixels in samples.batches()]), samples


def sample_scores(
    source: ModelSource,
    model: PatchDenoiser,
    wanted: Measures,
    sampling: SamplingConfig,
    into: Run,
    world: World,
) -> dict[str, float]:
    """Samples against real images: features of both as they are and softened, sharpness, and what they show."""
    pixels, samples = draw(source, model, wanted, sampling, wanted.samples, world)
    with replacing(into.folder / "sheet.webp") as path:
        save_sheet(pixels[:SHEET].permute(0, 2, 3, 1).numpy(), path)
    network = frozen.load(NETWORK, world.device)
    real_images = open_images(samples.reference, samples.image_size)
    scores, features = {}, {}
    for way, change in {"": lambda images: images, "softened_": soften}.items():

        def pooled(images: Tensor, change=change) -> dict[str, Tensor]:
            return network.pooled(change(images))

        name = f"{way.replace('_', '-')}{NETWORK}"
        real = reference_features(
            pooled, name, samples.reference, samples.image_size, wanted.batch_size, world, into.folder.parent
        )
        batches = ((start, pixels[start : start + 64]) for start in range(0, len(pixels), 64))
        found = collect(pooled, batches, len(pixels), world)
        for score, value in compare(real, found, network.measure, world.device).items():
            scores[f"{way}{score.removesuffix(f'-{network.measure}').lower()}"] = value
        features[way] = real.rows["pool"], found.rows["pool"]
    real_sharpness = [sharpness(batch) for _, batch in own_batches(real_images, 256, world)]
    scores["sharpness"] = sharpness(pixels) / statistics.fmean(real_sharpness)
    if pixels_decide(source.config(model), wanted):
        scores["agreement"] = asked_for(pixels, samples)
    return scores | feature_agreement(features, samples)


def pixels_decide(config: TrainConfig, wanted: Measures) -> bool:
    """Whether pixels alone tell what a sample shows: digits, and scenes of shapes from captions."""
    scenes = (wanted.reference or config.data).startswith("shapes") and isinstance(config.model, TextModelConfig)
    return config.data == "digits" or scenes


def asked_for(pixels: Tensor, samples: Samples) -> float:
    """The share of samples uint8 [N, 3, H, W] that show what was asked for, where `pixels_decide`."""
    if samples.conditions.subject == "class":
        return digit_agreement(pixels, samples.labels)
    dataset: Shapes = data.load(samples.reference, samples.image_size)
    return score_scenes(pixels, [dataset.scenes[label] for label in samples.labels.tolist()]).overall


def feature_agreement(features: dict[str, tuple[Tensor, Tensor]], samples: Samples) -> dict[str, float]:
    """What features say of the condition: a vote on the class, or whether a caption's own picture is the nearest.

    features: of real images and of samples, [N, F] each, as they are ("") and softened ("softened_").
    """
    dataset = data.open_data_set(samples.reference, samples.image_size)
    if len(dataset) > REFERENCES:  # features of a part of the images alone were kept
        return {}
    scores = {}
    if samples.conditions.subject == "class":
        if len(dataset.labels.unique()) < 2:  # then a vote says nothing
            return scores
        vote = ClassVote(features[""][0], features["softened_"][0], dataset.labels)
        for way, (_, found) in features.items():
            scores[f"{way}class_agreement"] = vote.agreement(found, samples.labels)
        return scores
    for way, (real, found) in features.items():
        own = real[samples.labels]
        ranks = [
            retrieval_ranks(*pair) for pair in zip(found.split(CAPTIONS), own.split(CAPTIONS), strict=True)
        ]  # the last part may have fewer captions
        whole = ranks[: len(found) // CAPTIONS] or ranks
        scores[f"{way}retrieval"] = float((torch.cat(whole) == 0).double().mean())
    return scores


def costs(model: PatchDenoiser, run: Run) -> dict[str, float]:
    """Parameters in millions, arithmetic of a training step in GFLOP an image, and activations kept, MiB an image."""
    config = run.config()
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    kept = cost.saved_activation_bytes(model, config.model.image_size, config.recompute, dtype)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "step_gflop": cost.step_flops(model, config.model.image_size, config.recompute) / 1e9,
        "activations_mib": kept / 2**20,
    }
