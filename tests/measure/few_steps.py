"""A few-step student of digits beside its teacher: agreement, kernel distance, precision, recall and time.

python -m tests.measure.few_steps runs/student
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch

from pixnerd import frozen
from pixnerd.config import EvaluationConfig, SamplingConfig
from pixnerd.distributed import ALONE
from pixnerd.evaluation import Samples
from pixnerd.metrics.features import collect, compare, reference_features
from pixnerd.metrics.nearest import digit_agreement
from pixnerd.model_source import find_model

DIGITS, SEEDS, STEPS = 500, (0, 1, 2), (1, 2, 4, 8)


def measure(name: str, sampling: SamplingConfig, seed: int, folder: Path) -> list[float]:
    """Agreement in %, 1000·KID, precision, recall, seconds per 100 digits; `folder` keeps the real digits' features."""
    source = find_model(name).settled()
    config = EvaluationConfig(name, draw=DIGITS, sampling=sampling, seed=seed, batch_size=100)
    samples = Samples(config, source, ALONE, source.load())
    begin = time.perf_counter()
    pixels = torch.cat([batch for _, batch in samples.batches()])
    seconds = (time.perf_counter() - begin) * 100 / DIGITS
    network = frozen.load("efficientnet")
    real = reference_features(network.pooled, network.name, "digits", samples.image_size, 64, ALONE, folder)
    batches = ((start, pixels[start : start + 64]) for start in range(0, DIGITS, 64))
    scores = compare(real, collect(network.pooled, batches, DIGITS, ALONE), network.measure)
    agreement = digit_agreement(pixels, samples.labels)
    return [100 * agreement, 1000 * scores["KID-EffLite0"], scores["precision"], scores["recall"], seconds]


def main(student: str) -> None:
    own = find_model(student).run.config()
    teacher, folder = find_model(own.teacher).run.config().sampling, find_model(own.teacher).results.folder
    rows = {f"teacher, {teacher.steps} steps": (own.teacher, teacher)}
    rows |= {f"student, {n}": (student, dataclasses.replace(own.sampling, steps=n)) for n in STEPS}
    print(f"{'':24}agreement    KID  precision  recall  seconds")
    for title, (name, sampling) in rows.items():
        for seed in SEEDS:
            values = zip(measure(name, sampling, seed, folder), (9.1, 7.1, 11.2, 8.2, 9.2), strict=True)
            print(f"{title:18}seed {seed}" + "".join(f"{value:{width}f}" for value, width in values), flush=True)


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
