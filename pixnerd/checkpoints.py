"""Weights on disk: a model in one file, and a training run's checkpoints.

Nothing is ever unpickled: all files are safetensors or JSON.
"""

import json
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .distributed import World, full_tensor, is_sharded
from .errors import InputError
from .files import check_shapes, make_folder, read_json, readable, save_tensors, sync, write_atomically, writing
from .model import PatchDenoiser
from .model_config import ModelConfig, TextModelConfig, model_config
from .text import build_network

SHARDS = "shards"  # the folder in a sharded run's checkpoint to which every process writes its part
STEP = r"step-(0|[1-9][0-9]*)"  # the name of a checkpoint's folder
LATEST = "latest"  # a text file beside the checkpoints that names the newest complete one


# --- a model in one file -------------------------------------------------------------------------------------------


def save_model(model: PatchDenoiser, path: Path) -> None:
    """Write the weights, with the configuration as metadata, so that the file alone suffices to rebuild the model."""
    save_tensors(model.state_dict(), path, _about(model))


def _about(model: nn.Module | None) -> dict[str, str]:
    """The metadata from which `load_model` rebuilds a network; other tensors have none."""
    return {"pixnerd": json.dumps(model.about())} if isinstance(model, PatchDenoiser) else {}


def load_model(path: Path, device: torch.device | str = "cpu") -> PatchDenoiser:
    """Rebuild a model that `save_model` wrote, in evaluation mode.

    Raises:
        InputError: the file is missing, truncated or not written by `save_model`.
    """
    config, num_classes = _read_about(path)
    with readable(path), torch.device("meta"):  # so that no weight is allocated twice
        model = build_network(config, num_classes)
    check_shapes(path, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, _shapes(path))
    with readable(path):
        model.load_state_dict(load_file(path, device=str(device)), assign=True)
    return model.eval()


def _read_about(path: Path) -> tuple[ModelConfig, int | None]:
    """The network's configuration and its number of classes, None for a text model, from a file of `save_model`."""
    with readable(path), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "pixnerd" not in metadata:
        raise InputError(f"{path} holds no PixNerd configuration; `pixnerd.load_released` reads the released weights")
    with readable(path):
        about = json.loads(metadata["pixnerd"])
        if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
            raise ValueError("its configuration is not that of a network")
        config, num_classes = model_config(about["config"]), about.get("num_classes")
        counts = type(num_classes) is int and 1 <= num_classes < 2**31
        if not isinstance(config, TextModelConfig) and not counts:
            raise ValueError(f"its number of classes is {num_classes!r}")
    return config, num_classes


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a file, of which only the header is read."""
    with readable(path), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no dictionary


# --- a training run's checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    models: dict[str, PatchDenoiser],
    optimizer: torch.optim.Optimizer,
    keep: int,
    world: World,
    keep_every: int | None = None,
    window: dict[str, Any] | None = None,
) -> Future[Path]:
    """Write `folder`/step-N, name it in `latest`, then drop all but the newest `keep`. Every process has to call it.

    Checkpoints whose step is a multiple of `keep_every` stay for good.

    Training may go on at once: the leading process copies the tensors to the CPU and writes them in a thread. Of a
    sharded model, every process first writes its own part of weights and optimiser; only the moving averages, which are
    written unsharded so that sampling need not know how the model was trained, are left to the thread.

    The checkpoint is written under a temporary name and renamed when complete, so a reader never sees half of one.

    Args:
        models: file name → model: "model", which `optimizer` trains, its moving averages "ema", …, and, if features are
            aligned, the "projector" trained along with it.
        window: the losses since the last log entry, for `read_window`.

    Returns:
        What the leading process is writing: its result is the checkpoint's folder, once that is complete, or a
        WriteError, after which the earlier checkpoints are as they were. The other processes get a finished future.
        No process may end before the leading one's is done: torchrun would kill the one that still writes.

    Raises:
        WriteError: in every process, if one of them cannot write its part of a sharded model, or make the folder.
    """
    target = folder / f"step-{step}"
    partial = folder / f".partial-step-{step}"
    try:
        with world.together():
            if world.leads:
                shutil.rmtree(partial, ignore_errors=True)
                make_folder(partial)
        shards, tensors = 0, {}
        if is_sharded(models["model"]):
            shards = _write_shards(partial / SHARDS, _training_tensors(models, optimizer), world)
            tensors = {name: _gathered(model, world) for name, model in models.items() if name != "model"}
        elif world.leads:
            live = {name: model.state_dict() for name, model in models.items()}
            live["optimizer"] = _optimizer_tensors(models, optimizer)
            tensors = {name: {key: w.to("cpu", copy=True) for key, w in part.items()} for name, part in live.items()}
    except BaseException:
        if world.leads:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if not world.leads:
        complete: Future[Path] = Future()
        complete.set_result(target)
        return complete
    state = {"step": step, "shards": shards, "window": window}
    files = {name: (part, _about(models.get(name))) for name, part in tensors.items()}
    thread = ThreadPoolExecutor(1, "checkpoint")
    written = thread.submit(_write_checkpoint, partial, target, files, state, keep, keep_every)
    thread.shutdown(wait=False)
    return written


def _write_checkpoint(
    partial: Path,
    target: Path,
    files: dict[str, tuple[dict[str, Tensor], dict[str, str]]],
    state: dict[str, Any],
    keep: int,
    keep_every: int | None,
) -> Path:
    """Write name → (tensors, metadata) and the state beside what is in `partial`, then publish it all as `target`."""
    try:
        with writing(target):
            for name, (tensors, about) in files.items():
                save_tensors(tensors, partial / f"{name}.safetensors", about)
            (partial / "state.json").write_text(json.dumps(state))
            for path in partial.rglob("*"):
                sync(path)
            _publish(partial, target, keep, keep_every)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _write_shards(folder: Path, tensors: dict[str, Tensor], world: World) -> int:
    """Every process writes its part of the training state; returns the number of files that they all wrote."""
    import torch.distributed.checkpoint as dcp

    with world.together():
        try:
            dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
        except dcp.CheckpointException as error:
            reason, _ = next(iter(error.failures.values()))
            with writing(folder):
                raise reason from None
    own = f"shard-{world.rank + 1:05d}-*.safetensors"  # a shared disk may show a process only its own files yet
    return world.count(len(list(folder.glob(own))))


def _publish(partial: Path, target: Path, keep: int, keep_every: int | None) -> None:
    """Give a complete checkpoint its name, then drop the oldest ones, see `save_checkpoint`."""
    folder = target.parent
    if target.exists():  # a damaged checkpoint; the resumed run has reached its step again
        shutil.rmtree(target)
    partial.rename(target)
    sync(folder)
    write_atomically(folder / LATEST, target.name + "\n")
    listed = numbered(folder)
    damaged = [path for number, path in listed if number > step_of(target) and _is_damaged(path)]  # resumed before them
    earlier = [(number, path) for number, path in listed if path not in damaged][:-keep]
    for old in (*damaged, *(path for number, path in earlier if not keep_every or number % keep_every)):
        retired = old.with_name(f".retired-{old.name}")  # hidden first, so that no reader finds it half removed
        old.rename(retired)
    for retired in folder.glob(".retired-*"):
        shutil.rmtree(retired)


def load_training_state(
    checkpoint: Path, models: dict[str, PatchDenoiser], optimizer: torch.optim.Optimizer, world: World
) -> int:
    """Fill models and optimiser, sharded or not, from a checkpoint folder, sharded or not; returns its step.

    Raises:
        InputError: in every process, if one of them cannot read the checkpoint, or it is of another network.
    """
    tensors = _training_tensors(models, optimizer)
    if (checkpoint / SHARDS).is_dir():
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may read all shards
            try:
                dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint / SHARDS)))
            except dcp.CheckpointException as error:  # in every process
                reason, _ = next(iter(error.failures.values()))
                with readable(checkpoint / SHARDS):
                    raise ValueError(str(reason)) from None
    else:
        paths = {file: checkpoint / f"{file}.safetensors" for file in (*models, "optimizer")}
        with world.together():  # before anything is filled, which processes that share a model do together
            for file, path in paths.items():
                live = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(f"{file}:")}
                check_shapes(path, live, {f"{file}:{name}": shape for name, shape in _shapes(path).items()})
        for file, path in paths.items():
            with readable(path):
                saved = load_file(path)
            for name, tensor in saved.items():
                _fill(tensors[f"{file}:{name}"], tensor)
    return step_of(checkpoint)


def _training_tensors(models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The complete training state: "file:name" → tensor; the live tensors, not copies."""
    weights = {f"{file}:{name}": w for file, model in models.items() for name, w in model.state_dict().items()}
    state = _optimizer_tensors(models, optimizer)
    return weights | {f"optimizer:{name}": tensor for name, tensor in state.items()}


@torch.no_grad()
def _fill(live: Tensor, saved: Tensor) -> None:
    saved = saved.to(live.device)
    if hasattr(live, "full_tensor"):  # a DTensor, of which this process holds a part
        from torch.distributed.tensor import distribute_tensor

        saved = distribute_tensor(saved, live.device_mesh, live.placements)
    live.copy_(saved)


def _gathered(model: nn.Module, world: World) -> dict[str, Tensor]:
    """A sharded model's full weights, gathered one by one on the CPU of the leading process."""
    weights = {}
    for name, tensor in model.state_dict().items():
        gathered = full_tensor(tensor)
        if world.leads:
            weights[name] = gathered.to("cpu", copy=True)  # it may be the live tensor
    return weights


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; None if there is none.

    A damaged checkpoint is skipped with a warning, and the one before it is used.

    Raises:
        InputError: there are checkpoints, but all of them are damaged.
    """
    damaged, listed = [], numbered(folder)
    for _, checkpoint in reversed(listed):
        try:
            check_checkpoint(checkpoint)
        except InputError as error:
            damaged.append((checkpoint.name, str(error)))
        else:
            break
    else:
        checkpoint = None
    if checkpoint is None and listed != numbered(folder):  # a training run wrote a checkpoint, and retired one
        return newest_checkpoint(folder)
    for name, fault in damaged:
        warnings.warn(f"checkpoint {name} is skipped: {fault}", stacklevel=2)
    if damaged and checkpoint is None:
        raise InputError(f"no checkpoint in {folder} can be read; the newest: {damaged[0][1]}")
    return checkpoint


def check_checkpoint(checkpoint: Path) -> None:
    """Raise InputError unless a checkpoint's files are all there and complete."""
    state = read_json(checkpoint / "state.json", "a checkpoint")
    if state.get("step") != step_of(checkpoint):
        raise InputError(f"{checkpoint} is of step {state.get('step')}, as its state.json says")
    shards = state.get("shards", 0)
    parts = sorted((checkpoint / SHARDS).glob("*.safetensors"))
    if len(parts) != shards:
        raise InputError(f"{checkpoint} has {len(parts)} of its {shards} shards")
    needed = {checkpoint / f"{name}.safetensors" for name in ("ema", *([] if parts else ["model", "optimizer"]))}
    for path in (*parts, *sorted(needed | set(checkpoint.glob("*.safetensors")))):
        with readable(path), safe_open(path, "pt"):  # reads the header and compares it with the file's length
            pass


def _is_damaged(checkpoint: Path) -> bool:
    try:
        check_checkpoint(checkpoint)
    except InputError:
        return True
    return False


def leaders_checkpoint(folder: Path, world: World) -> Path | None:
    """The leading process's newest checkpoint, on every process: on a shared disk their listings may differ.

    Raises:
        InputError: in every process, if one of them cannot read it.
    """
    with world.together():
        newest = newest_checkpoint(folder) if world.leads else None
    step = world.from_leader(step_of(newest) if newest else -1)
    if step < 0:
        return None
    checkpoint = folder / f"step-{step}"
    with world.together():
        if not world.leads:
            try:
                check_checkpoint(checkpoint)
            except InputError as error:
                found = f"process {world.rank} cannot read the checkpoint that process 0 found: {error}"
                raise InputError(found) from error
    return checkpoint


def load_newest(
    folder: Path, world: World, weights: str = "ema", device: torch.device | str = "cpu"
) -> tuple[Path, PatchDenoiser]:
    """The leading process's newest checkpoint and its model, the same on every process.

    A training run may retire the checkpoint while it is read; then the one that is newest by now is read.

    Raises:
        InputError: in every process: there is no checkpoint, or one of them cannot read it.
    """
    failed = None
    while True:
        checkpoint = leaders_checkpoint(folder, world)
        if checkpoint is None:
            raise InputError(f"run {folder.parent} has no checkpoint yet")
        try:
            with world.together():
                return checkpoint, load_model(checkpoint / f"{weights}.safetensors", device)
        except InputError:
            if checkpoint == failed:
                raise
            failed = checkpoint


def classes_of(checkpoint: Path) -> int | None:
    """The number of classes that a checkpoint's model tells apart; None for a text model."""
    return _read_about(checkpoint / "ema.safetensors")[1]


def read_window(checkpoint: Path) -> dict[str, Any] | None:
    """The losses since the last log entry, as `save_checkpoint` was given them; None from an earlier version."""
    return read_json(checkpoint / "state.json", "a checkpoint").get("window")


def _optimizer_tensors(models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments by name, those that it has not begun yet as the zeros with which it will."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if not optimizer.state[parameter]:
            zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
    names = {parameter: name for name, parameter in models["model"].named_parameters()}
    if "projector" in models:
        names |= {parameter: f"projector.{name}" for name, parameter in models["projector"].named_parameters()}
    return {f"{key}:{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}


def step_of(checkpoint: Path) -> int:
    """The number of completed steps, from a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints, oldest first."""
    matches = ((re.fullmatch(STEP, path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)
