"""Few-step students of digits beside their teacher: agreement, kernel distance, precision, recall and time.

python -m tests.measure.few_steps runs/student               one student, from three seeds of the noise
python -m tests.measure.few_steps runs/both-0 runs/both-1 …  three students of one teacher, each with noise of its own
"""

import dataclasses
import sys
import time
from itertools import cycle
from pathlib import Path

import torch

from pixnerd import frozen
from pixnerd.config import EvaluationConfig, SamplingConfig
from pixnerd.distributed import ALONE
from pixnerd.evaluation import Samples
from pixnerd.metrics.features import collect, compare, reference_features
from pixnerd.metrics.nearest import digit_agreement
from pixnerd.model_source import find_model
from pixnerd.sampling import network_passes

DIGITS, SEEDS, STEPS = 500, (0, 1, 2), (8, 4, 2, 1)
STUDENT_T = 4.30  # of three values: their mean ± STUDENT_T · standard deviation / √3 is a 95 % interval
TITLES = "passes  agreement  1000·KID         precision  recall  seconds"


def measure(name: str, sampling: SamplingConfig, seed: int, folder: Path, average: str = "ema") -> list[float]:
    """Agreement in %, 1000·KID, precision, recall, seconds of processor time for 100 digits.

    `folder` keeps the real digits' features, `average` says which weights.
    """
    source = find_model(name).settled()
    config = EvaluationConfig(name, draw=DIGITS, sampling=sampling, seed=seed, average=average, batch_size=100)
    samples = Samples(config, source, ALONE, source.load(average))
    begin = time.process_time()
    pixels = torch.cat([batch for _, batch in samples.batches()])
    seconds = (time.process_time() - begin) * 100 / DIGITS
    network = frozen.load("efficientnet")
    real = reference_features(network.pooled, network.name, "digits", samples.image_size, 64, ALONE, folder)
    batches = ((start, pixels[start : start + 64]) for start in range(0, DIGITS, 64))
    scores = compare(real, collect(network.pooled, batches, DIGITS, ALONE), network.measure)
    agreement = digit_agreement(pixels, samples.labels)
    return [100 * agreement, 1000 * scores["KID-EffLite0"], scores["precision"], scores["recall"], seconds]


def row(passes: int, trials: list[list[float]]) -> str:
    """The means of three trials, KID with its 95 % interval, then the trials' agreement and KID."""
    values = torch.tensor(trials)  # [3, 5]
    agreement, kid, precision, recall, seconds = values.mean(0).tolist()
    half = STUDENT_T * float(values[:, 1].std()) / len(trials) ** 0.5
    means = f"{passes:6}{agreement:11.1f}{kid:10.1f} ± {half:4.1f}{precision:11.2f}{recall:8.2f}{seconds:9.2f}"
    return means + "   " + ", ".join(f"{trial[0]:.1f} {trial[1]:.1f}" for trial in trials)


def main(students: list[str]) -> None:
    own = find_model(students[0]).run.config()
    teacher, folder = find_model(own.teacher).run.config().sampling, find_model(own.teacher).results.folder
    rows = {
        "teacher, 25 even": ([own.teacher], dataclasses.replace(teacher, steps=25, shift=1.0)),
        "teacher, recipe": ([own.teacher], teacher),
    }
    rows |= {f"student, {n}": (students, dataclasses.replace(own.sampling, steps=n, shift=1.0)) for n in STEPS}
    for n in (8, 4):  # shifted by n − 1, the last step begins at t = ½
        rows[f"student, {n} shifted"] = (students, dataclasses.replace(own.sampling, steps=n, shift=n - 1.0))
    print(f"{'':20}{TITLES}   of each: agreement, KID")
    for title, (names, sampling) in rows.items():
        trials = [measure(name, sampling, seed, folder) for name, seed in zip(cycle(names), SEEDS, strict=False)]
        print(f"{title:20}{row(network_passes(sampling), trials)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
