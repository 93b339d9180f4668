"""Damaged runs, checkpoints, released weights and references, made from good ones with a seed, through the real doors.

.venv/bin/python -m tests.measure.fuzz_runs --cases 1500

Prints how many were read and how many were refused with one sentence; ends with exit code 1 if anything else happened:
another exception, more than a minute for one case, something unpickled, or a file changed that had only to be read.
"""

import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pixnerd.training.meters
from pixnerd import InputError, load, load_released, sample
from pixnerd.checkpoints import newest_checkpoint, save_model
from pixnerd.cli import parse
from pixnerd.config import EvaluationConfig, TrainConfig
from pixnerd.distributed import ALONE
from pixnerd.evaluation import row_settings
from pixnerd.frozen.text_encoder import CachedEncoder
from pixnerd.metrics.features import reference_features
from pixnerd.metrics.images import open_images
from pixnerd.model import PatchDenoiser
from pixnerd.model_source import each_checkpoint, find_model
from pixnerd.runs import Run
from pixnerd.training import train

from ..training.test_training import CPU, config_for
from .fuzz_data import prepared_case
from .fuzzing import Use, files_of, keeping, mutated, mutated_json, run_cases

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATES = Path(tempfile.mkdtemp())
SETTINGS = {"steps": 4, "checkpoint_every": 2, "log_every": 1, "keep_checkpoints": 2}
NAMES = (
    "",
    ".",
    "\0",
    "\udcff",
    "x" * 5000,
    "/dev/null",
    "@",
    "@all",
    "@1,2",
    "MCG-NJU/PixNerd-XL-P16-C2I\0",
    "~",
    *(
        f"{kind}:{path}"
        for kind in ("folder", "prepared", "captions", "shards", "imagenet")
        for path in ("", "\0", "x" * 300)
    ),
)
STEPS = ("", "0", "-1", "007", "٢", "2", "2,2", "step-2", "step-", "all", "9" * 5000, "\0", "../step-2", "1e3", "2/")


# --- good files, made once -------------------------------------------------------------------------------------------


@functools.cache
def good_run(sharded: bool) -> Path:
    """A run of four steps with two checkpoints, samples and an evaluation."""
    folder = TEMPLATES / ("sharded" if sharded else "run")
    if sharded:
        torch.distributed.init_process_group("gloo", init_method=f"file://{TEMPLATES}/meeting", rank=0, world_size=1)
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0"
        os.environ.update(WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    list(train(config_for(folder, **SETTINGS, shard=sharded, extra_ema_decays=(0.5,)), CPU))
    if sharded:
        torch.distributed.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    run = Run(folder)
    run.save_samples(torch.zeros(4, 3, 16, 16), torch.arange(4), columns=2)
    run.save_evaluation(asked(folder), {"FID": 1.0, "IS": 2.0})
    return folder


def asked(folder: Path) -> dict[str, Any]:
    """What an evaluation of that run is looked up with."""
    return row_settings(EvaluationConfig(str(folder), reference="digits", draw=4))


@functools.cache
def good_file(name: str) -> Path:
    """Released weights as `pixnerd convert` writes them."""
    path = TEMPLATES / f"{name}.safetensors"
    save_model(load_released(GOLDEN / f"{name}.ckpt"), path)
    return path


class Foreign:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.mark),)


# --- doors -----------------------------------------------------------------------------------------------------------


def draw_with(model: PatchDenoiser) -> None:
    """A sample of one step."""
    images = sample(model, model.example_condition(), steps=1, guidance=1.0)
    assert images.shape[2:] == (model.config.image_size,) * 2


def each(*uses: Use) -> Use:
    """All of them, each of which has to be fine or refused by one sentence; refused if one is."""

    def use() -> None:
        refusals = []
        for one in uses:
            try:
                one()
            except InputError as error:
                refusals.append(error)
        for error in sorted(refusals, key=lambda error: "\n" not in str(error))[:1]:
            raise error

    return use


def readers_of(folder: Path) -> Use:
    """Everything that reads a run and leaves it as it is."""
    run, name = Run(folder), str(folder)
    return each(
        lambda: draw_with(load(folder)),
        run.config,
        run.classes,
        run.read_log,
        run.metrics,
        run.load_samples,
        lambda: run.evaluation(asked(folder)),
        lambda: load(f"{name}@4"),
        lambda: load(folder, weights="ema-0.5"),
        lambda: load(folder / "checkpoints" / "step-4", weights="ema-0.5"),
        lambda: find_model(name).config(load(folder)),
        lambda: find_model(name).content(),
        lambda: [find_model(one).load() for one in each_checkpoint(f"{name}@all")],
        lambda: newest_checkpoint(run.checkpoints),
        lambda: list(open_images(name).batches(3)),
        lambda: parse(["sample", name, "--count", "4"]),
    )


def resuming(folder: Path, **changes: Any) -> Use:
    """Resume a run that has no steps left, or those after the last checkpoint that is whole."""
    config = config_for(folder, **{**SETTINGS, "extra_ema_decays": (0.5,), **changes})
    run, rewritten = Run(folder), {"config.json", "log.jsonl", "latest"}

    def may_change(path: Path) -> bool:
        return path.name in rewritten or any(part.startswith("step-") for part in path.parts)

    def resume() -> None:
        logged = run.log_path.read_bytes() if run.log_path.is_file() else b""
        try:
            list(train(config, CPU))
        except InputError:
            assert run.log_path.read_bytes() == logged, "a refused run lost its log"
            raise

    return keeping(folder, resume, may_change)


# --- cases -----------------------------------------------------------------------------------------------------------


def damage(path: Path, draw: random.Random) -> None:
    """Damage a file, half of the JSON ones so that they remain JSON; sometimes remove it."""
    content = path.read_bytes()
    if draw.random() < 0.03:
        return path.unlink()
    if path.suffix == ".json" and draw.random() < 0.6:
        content = mutated_json(content.decode(), draw).encode()
    elif path.suffix == ".safetensors" and draw.random() < 0.5:
        content = with_mutated_header(content, draw)
    elif path.suffix == ".jsonl" and draw.random() < 0.6:
        lines = content.decode().splitlines()
        number = draw.randrange(len(lines))
        lines[number] = mutated_json(lines[number], draw)
        content = "".join(f"{line}\n" for line in lines).encode()
    else:
        content = mutated(content, draw)
    path.write_bytes(content)


def with_mutated_header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with one entry of its header, or of the configuration in it, replaced, removed or doubled."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = header.get("__metadata__", {}).get("pixnerd")
    if about and draw.random() < 0.6:
        header["__metadata__"]["pixnerd"] = mutated_json(about, draw)
        text = json.dumps(header)
    elif draw.random() < 0.2:
        names = [name for name in header if name != "__metadata__"]
        header[draw.choice(names)], header[draw.choice(("x", *names))] = (header[draw.choice(names)] for _ in range(2))
        text = json.dumps(header)
    else:
        text = mutated_json(json.dumps(header), draw)
    return len(text.encode()).to_bytes(8, "little") + text.encode() + content[8 + length :]


def run_case(folder: Path, draw: random.Random, sharded: bool = False, part: str = "checkpoints") -> Use:
    """A run with a damaged file."""
    run = folder / "run"
    shutil.copytree(good_run(sharded), run)
    if part == "checkpoints":
        newest = run / "checkpoints" / "step-4"
        chosen = draw.choice(sorted([*files_of(newest), run / "checkpoints" / "latest"]))
    else:
        chosen = draw.choice([run / name for name in ("config.json", "classes.json", "log.jsonl", "metrics.json")])
    damage(chosen, draw)
    if part == "checkpoints" and draw.random() < 0.2:  # so that there is no other
        shutil.rmtree(run / "checkpoints" / "step-2")
    readers = keeping(run, readers_of(run))
    if draw.random() < 0.3:
        save = functools.partial(Run(run).save_evaluation, {"network": "x"}, {"FID": 0.5})
        return each(readers, keeping(run, save, lambda path: path.name == "metrics.json"))
    return each(readers, resuming(run))


def sharded_case(folder: Path, draw: random.Random) -> Use:
    return run_case(folder, draw, sharded=True)


def settings_case(folder: Path, draw: random.Random) -> Use:
    return run_case(folder, draw, part="settings")


def file_case(folder: Path, draw: random.Random) -> Use:
    """A model in one file."""
    path = folder / "model.safetensors"
    shutil.copy(good_file(draw.choice(("class_p4", "text_p4"))), path)
    damage(path, draw)
    source = find_model(path) if path.is_file() else None
    more = (lambda: source.sampling, source.content) if source else ()
    return keeping(folder, each(lambda: draw_with(load(path)), *more, lambda: train(started_from(path), CPU)))


def started_from(path: Path) -> TrainConfig:
    """A run that starts from the class-conditional weights."""
    model = load(good_file("class_p4")).config
    return config_for(path.parent / "new", start_from=str(path), model=model)


def released_case(folder: Path, draw: random.Random) -> Use:
    """A file of the authors' code: bytes damaged, or other contents."""
    path, mark = folder / "model.ckpt", folder / "unpickled"
    shutil.copy(GOLDEN / f"{draw.choice(('class_p4', 'text_p4'))}.ckpt", path)
    if draw.random() < 0.5:
        path.write_bytes(mutated(path.read_bytes(), draw, near=0.5))
    else:
        contents = torch.load(path, weights_only=True)
        for _ in range(draw.choice((1, 1, 3))):
            change_released(contents, Foreign(mark), draw)
        torch.save(contents, path, _use_new_zipfile_serialization=draw.random() < 0.8)

    def use() -> None:
        try:
            each(lambda: draw_with(load_released(path)), lambda: load(path), lambda: find_model(path).sampling)()
        finally:
            assert not mark.exists(), "something was unpickled"

    return keeping(folder, use)


def change_released(contents: dict[str, Any], foreign: Foreign, draw: random.Random) -> None:
    state = contents.get("state_dict")
    if not isinstance(state, dict) or not state or draw.random() < 0.1:
        contents[draw.choice(("state_dict", "x"))] = draw.choice((foreign, None, 1, [], {}, {"x": foreign}))
        return
    name = draw.choice([name for name in state if "denoiser" in str(name)] or list(state))
    value = state[name]
    values = [foreign, None, 1.0, "x", [value], *(torch.zeros(shape) for shape in ((), 0, (0, 0), (1, 1, 1)))]
    if isinstance(value, torch.Tensor):
        values += [value[:1], value[:0], value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value]
        values += [value.long(), value.half(), value.to_sparse(), value * float("nan"), value[None], value.cfloat()]
        values += [value.expand(3, *value.shape), value.to("meta")]
    match draw.randrange(4):
        case 0:
            del state[name]
        case 1:
            state[draw.choice((7, None, str(name) + ".x", str(name).replace("0", "99999"), "ema_denoiser."))] = value
        case _:
            state[name] = draw.choice(values)


def samples_case(folder: Path, draw: random.Random) -> Use:
    """samples.npz of a run."""
    path = folder / "samples.npz"
    write_arrays(path, draw, {"arr_0": np.zeros((4, 16, 16, 3), np.uint8), "labels": np.arange(4)})
    (folder / "config.json").write_bytes((good_run(False) / "config.json").read_bytes())
    run = Run(folder)
    return keeping(folder, each(run.load_samples, lambda: list(open_images(folder).batches(3))))


def reference_case(folder: Path, draw: random.Random) -> Use:
    """A reference .npz of the ADM suite, and the features that are kept of one."""
    path = folder / "real.npz"
    moments = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    arrays = {"arr_0": np.arange(4 * 64 * 3, dtype=np.uint8).reshape(4, 8, 8, 3), **moments}

    def pooled(images: torch.Tensor) -> dict[str, torch.Tensor]:
        means = images.float().mean((2, 3))
        return {"pool": means, "spatial": means[:, :2], "logits": means}

    def read() -> None:
        found = reference_features(pooled, "inception", str(path), 8, 3, ALONE, folder)
        assert [len(mean) for mean, _ in found.gaussians.values()] == [3, 2]

    kept = folder / "reference-inception.safetensors"
    if draw.random() < 0.3:
        np.savez(path, **arrays)
        reference_features(pooled, "inception", str(path), 8, 3, ALONE, folder)
        damage(kept, draw)
    else:
        write_arrays(path, draw, arrays)
    return keeping(folder, each(read, lambda: list(open_images(path).batches(3))), lambda path: path == kept)


def write_arrays(path: Path, draw: random.Random, arrays: dict[str, np.ndarray]) -> None:
    """A damaged .npz: bytes, or arrays of another kind or shape."""
    name = draw.choice(list(arrays))
    array = arrays[name]
    if draw.random() < 0.5:
        match draw.randrange(8):
            case 0:
                del arrays[name]
            case 1:
                arrays[name] = np.array([Foreign(path.parent / "unpickled")], dtype=object)
            case 2:
                arrays[name] = array[:0]
            case 3:
                arrays[name] = array[None]
            case 4:
                arrays[name] = array.astype(draw.choice((np.float32, np.int64, np.complex128, "U1")))
            case 5:
                arrays[name] = np.asfortranarray(array)
            case 6:
                arrays[name] = array.reshape(-1)[:1].reshape(())
            case 7:
                arrays[name] = array * np.nan
    save = draw.choice((np.savez, np.savez_compressed))
    save(path, **arrays)
    if draw.random() < 0.6:
        path.write_bytes(mutated(path.read_bytes(), draw, near=draw.choice((0.1, 0.6))))


def names_case(folder: Path, draw: random.Random) -> Use:
    """Names that nothing has, and strange things in a run's folder."""
    run = folder / "run"
    shutil.copytree(good_run(False), run)
    extra = (
        run / "checkpoints" / draw.choice(("step-007", "step-", f"step-{'9' * 200}", "step-٢", "step-5", ".retired-x"))
    )
    extra.mkdir() if draw.random() < 0.5 else extra.write_bytes(b"")
    name = draw.choice(NAMES) if draw.random() < 0.5 else f"{run}@{draw.choice(STEPS)}"
    uses = [
        lambda: load(name),
        lambda: load(run),
        lambda: [find_model(one).content() for one in each_checkpoint(name)],
        lambda: load_released(name),
        lambda: Run(name).config(),
        lambda: Run(name).read_log(),
        lambda: open_images(name, 16),
        lambda: parse(["sample", *([] if name.startswith("-") else [name])]) if name else None,
        lambda: train(config_for(folder / "new", start_from=name or "x"), CPU),
        lambda: train(config_for(folder / "new", data=name), CPU),
        lambda: row_settings(EvaluationConfig(str(run), reference=name or "x", draw=4)),
    ]
    return keeping(folder, each(*uses))


class Encoder:
    """A text encoder of two features and three tokens."""

    name, content, features, length = "two", "", 2, 3

    def __call__(self, captions: list[str]) -> torch.Tensor:
        return torch.ones(len(captions), 3, 2)


def text_cache_case(folder: Path, draw: random.Random) -> Use:
    """A caption's features in the cache."""
    CachedEncoder(Encoder(), folder)(["a cat"])
    [path] = folder.rglob("*.safetensors")
    damage(path, draw)

    def use() -> None:
        assert CachedEncoder(Encoder(), folder)(["a cat"]).shape == (1, 3, 2)

    return use


KINDS = {
    "checkpoint": run_case,
    "settings": settings_case,
    "model file": file_case,
    "released weights": released_case,
    "sharded checkpoint": sharded_case,
    "samples": samples_case,
    "reference": reference_case,
    "names": names_case,
    "text cache": text_cache_case,
    "prepared": prepared_case,
}


def main() -> None:
    torch.set_num_threads(1)
    pixnerd.training.meters.matmul_rate = lambda *_: 1.0  # measuring a machine's best takes longer than a case
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        good_run(False), good_run(True)  # before anything that unpickles is replaced
        run_cases(KINDS, 1500)
    finally:
        shutil.rmtree(TEMPLATES)


if __name__ == "__main__":
    main()
