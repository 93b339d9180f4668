"""Projects with invented records, studies and runs, in which the field helps where it should."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from pixnerd.runs import SWEEP, Run
from pixnerd.studies.record import write_record
from pixnerd.studies.study import expand, read_study

ROOT = Path(__file__).parents[2]
NOISE = ROOT / "notebooks" / "studies" / "noise.yaml"
HEADS = ["linear", "linear-skip", "field", "field-no-pixels", "field-no-coordinates", "shared"]


def quality(choices, random):
    """An invented velocity error: v is hard for heads that have to carry the noise through a narrow token."""
    ratio = float(choices.get("ratio", "1.5"))
    carries = choices["head"] in ("linear", "field-no-pixels")
    burden = 0.12 * np.log2(1 + ratio) * (choices.get("prediction", "v") == "v") * carries
    gain = {"field": 0.02, "shared": 0.012, "field-no-coordinates": 0.008}.get(choices["head"], 0.0)
    return 0.32 + 0.03 * np.log2(1 + ratio) + burden - gain + random.normal(0, 0.002)


def measures(run, random):
    """Invented scores, and the velocity error by tenth of t."""
    shared = np.random.default_rng(list(run.repeat.encode())).normal(0, 0.01)
    error = quality(run.choices, random) + shared
    size = run.config.model.image_size
    wide = {"linear": 0.55, "linear-skip": 0.56, "field": 1.0, "shared": 0.7}.get(run.choices["head"], 0.9)
    scores = {
        "velocity_error": error,
        "fd": 900 * error + random.normal(0, 4),
        "kid": 2 * error + random.normal(0, 0.01),
        "class_agreement": min(0.99, 0.9 - error + random.normal(0, 0.01)),
        "sharpness": 1 + error / 2 + random.normal(0, 0.01),
        "loss": error * 1.1,
        "gradient_norm": 0.2 + error / 5 + random.normal(0, 0.01),
        "gradient_spikes": float(random.integers(3)),
        "seconds_per_step": wide * 0.16 * (1 + size / 64) * (1 + random.normal(0, 0.02)),
        "parameters": 1.2 + wide,
        "step_gflop": 0.08 * wide * size / 16,
        "activations_mib": 0.4 * wide * (size / 16) ** 2,
    }
    place = (np.arange(10) + 0.5) / 10
    by_t = error * (0.6 + 1.6 * (place - 0.45) ** 2 + 0.9 * place**8)
    return {name: round(float(value), 6) for name, value in scores.items()}, [round(float(e), 6) for e in by_t]


def sheet(run, error):
    """Sixteen tiles of coloured discs, the same for every arm, the noisier the larger the error."""
    side = run.config.model.image_size
    shapes, speckle = np.random.default_rng(7), np.random.default_rng(run.index)
    grid = np.full((4 * (side + 1) + 1, 4 * (side + 1) + 1, 3), 128, np.uint8)
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    for tile in range(16):
        centre, colour = shapes.uniform(0.3, 0.7, 2), shapes.uniform(30, 230, 3)
        inside = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 0.08)[..., None]
        image = np.where(inside, colour, 245.0) + speckle.normal(0, 160 * max(0, error - 0.33), (side, side, 3))
        row, column = divmod(tile, 4)
        top, left = 1 + row * (side + 1), 1 + column * (side + 1)
        grid[top : top + side, left : left + side] = image.clip(0, 255)
    return Image.fromarray(grid)


def make_run(run, study, random, steps=40, pictures=True):
    """A run that is done without being made, in its folder."""
    (run.folder / SWEEP).mkdir(parents=True)
    planned = {"repeat": run.repeat, "choices": run.choices, "config": run.config.to_dict()}
    planned["measure"] = dataclasses.asdict(study.measure)
    (run.folder / SWEEP / "planned.json").write_text(json.dumps(planned))
    made = {"pixnerd": "0.1.0", "commit": None, "torch": "2.15.0", "machine": "invented", "threads": 1, "device": "cpu"}
    (run.folder / SWEEP / "made.json").write_text(json.dumps({"made": [made]}))
    (run.folder / "config.json").write_text(json.dumps(run.config.to_dict()))
    scores, by_t = measures(run, random)
    (run.folder / "metrics.json").write_text(
        json.dumps({"study": {"wanted": {}, "scores": scores, "error_by_t": by_t}})
    )
    log = []
    for step in range(1, steps + 1):
        loss = scores["loss"] + 1.2 * np.exp(-step / 6) + random.normal(0, 0.004)
        norm = scores["gradient_norm"] + 0.8 * np.exp(-step / 4)
        log.append({"step": 20 * step, "loss": float(loss), "gradient_norm": float(norm), "images_per_second": 200.0})
    (run.folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    if pictures and run.repeat == str(study.seeds[0]):
        sheet(run, scores["velocity_error"]).save(run.folder / "sheet.webp", "WEBP", lossless=True)


def copy_study(project, file=NOISE, name=None, **parts):
    """A study file in a project's notebooks/studies, with other parts; returns its path."""
    content = yaml.safe_load(file.read_text()) | parts
    if "axes" in parts:  # those of the file may name others
        content = {key: value for key, value in content.items() if key not in ("adjust", "leave_out")}
    path = project / "notebooks" / "studies" / f"{name or file.stem}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    path.write_text(comment + yaml.safe_dump(content, sort_keys=False))
    return path


def record(project, path, missing=(), **options):
    """The record of a study of invented runs, all but those numbered `missing`, as `--record` writes it."""
    random = np.random.default_rng(5)
    study = read_study(path)
    plan = expand(study, project / "made" / study.name)
    for run in plan:
        if run.index not in missing:
            make_run(run, study, random, **options)
    with contextlib.chdir(project):
        write_record(path, study, plan)
    shutil.rmtree(project / "made")
    return plan


def loose_run(project, name, config, steps=None, loss=0.4):
    """A folder of a training run that belongs to no study; `steps`: how many of them were made."""
    run = Run(project / "runs" / name)
    run.folder.mkdir(parents=True)
    run.config_path.write_text(json.dumps(dataclasses.replace(config, out=str(run.folder)).to_dict()))
    for step in range(config.log_every, (steps or config.steps) + 1, config.log_every):
        entry = {"step": step, "loss": loss + 1 / step, "gradient_norm": 0.3, "images_per_second": 100.0}
        run.log(entry)
    return run


def add_samples(run, colour, count=100, side=32):
    """Samples as `pixnerd sample` writes them, of one colour and with some noise."""
    noise = np.random.default_rng(colour).normal(0, 20, (count, side, side, 3))
    images = (np.array([colour, 120, 255 - colour]) + noise).clip(0, 255).astype(np.uint8)
    np.savez_compressed(run.folder / "samples.npz", arr_0=images, labels=np.arange(count) // 10)
    return images


def with_more_seeds(index, seeds):
    """An index whose first study has further seeds, each a noisy copy of the last one that it has."""
    (study, *_), random = index["studies"], np.random.default_rng(1)
    last = [run for run in study["runs"] if run["repeat"] == study["runs"][-1]["repeat"]]
    for seed in range(int(last[0]["repeat"]) + 1, seeds):
        for run in last:
            measures = {name: value * (1 + 0.02 * random.normal()) for name, value in run["measures"].items()}
            study["runs"].append(run | {"index": len(study["runs"]), "repeat": str(seed), "measures": measures})
    return index
