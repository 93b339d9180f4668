"""Weights on disk: a model in one file, and a training run's checkpoints.

Nothing is ever unpickled: all files are safetensors or JSON.
"""

import json
import re
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .distributed import World, full_tensor, is_sharded
from .errors import InputError
from .files import read_json, readable, sync, write_atomically
from .model import PatchDenoiser
from .model_config import model_config
from .text import build_network

SHARDS = "shards"  # the folder in a sharded run's checkpoint to which every process writes its part
LATEST = "latest"  # a text file beside the checkpoints that names the newest complete one


# --- a model in one file -------------------------------------------------------------------------------------------


def save_model(model: PatchDenoiser, path: Path) -> None:
    """Write the weights, with the configuration as metadata, so that the file alone suffices to rebuild the model."""
    save_file(model.state_dict(), path, _about(model))


def _about(model: nn.Module) -> dict[str, str]:
    """The metadata from which `load_model` rebuilds a network; a projector has none."""
    return {"pixnerd": json.dumps(model.about())} if isinstance(model, PatchDenoiser) else {}


def load_model(path: Path, device: torch.device | str = "cpu") -> PatchDenoiser:
    """Rebuild a model that `save_model` wrote, in evaluation mode.

    Raises:
        InputError: the file is missing, truncated or not written by `save_model`.
    """
    with readable(path), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "pixnerd" not in metadata:
        raise InputError(f"{path} holds no PixNerd configuration; `pixnerd.load_released` reads the released weights")
    with torch.device("meta"):  # so that no weight is allocated twice
        about = json.loads(metadata["pixnerd"])
        model = build_network(model_config(about["config"]), about.get("num_classes"))
    with readable(path):
        model.load_state_dict(load_file(path, device=str(device)), assign=True)
    return model.eval()


# --- a training run's checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    models: dict[str, PatchDenoiser],
    optimizer: torch.optim.Optimizer,
    keep: int,
    world: World,
) -> Path:
    """Write `folder`/step-N, name it in `latest`, then drop all but the newest `keep`. Every process has to call it.

    The checkpoint is written under a temporary name and renamed when complete, so a reader never sees half of one. The
    leading process writes everything; for a sharded model, every process writes its own part, and the moving averages
    are written unsharded beside them, so that sampling need not know how the model was trained.

    Args:
        models: file name → model: "model", which `optimizer` trains, its moving averages "ema", …, and, if features are
            aligned, the "projector" trained along with it.
    """
    target = folder / f"step-{step}"
    partial = folder / f".partial-step-{step}"
    if world.leads:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.wait()
    if is_sharded(models["model"]):
        import torch.distributed.checkpoint as dcp

        writer = dcp.HuggingFaceStorageWriter(str(partial / SHARDS), save_distributed=True)
        dcp.save(_training_tensors(models, optimizer), storage_writer=writer)
        full = {name: _gathered(model, world) for name, model in models.items() if name != "model"}
    else:
        full = {name: model.state_dict() for name, model in models.items()}
        if world.leads:
            save_file(_optimizer_tensors(models, optimizer), partial / "optimizer.safetensors")
    world.wait()
    if not world.leads:
        return target
    for name, weights in full.items():
        save_file(weights, partial / f"{name}.safetensors", _about(models[name]))
    shards = len(list((partial / SHARDS).glob("*.safetensors")))
    (partial / "state.json").write_text(json.dumps({"step": step, "shards": shards}))
    for path in partial.rglob("*"):
        sync(path)
    if target.exists():  # a damaged checkpoint; the resumed run has reached its step again
        shutil.rmtree(target)
    partial.rename(target)
    sync(folder)
    write_atomically(folder / LATEST, target.name + "\n")
    for _, old in _numbered(folder)[:-keep]:
        retired = old.with_name(f".retired-{old.name}")  # hidden first, so that no reader finds it half removed
        old.rename(retired)
    for retired in folder.glob(".retired-*"):
        shutil.rmtree(retired)
    return target


def load_training_state(checkpoint: Path, models: dict[str, PatchDenoiser], optimizer: torch.optim.Optimizer) -> int:
    """Fill models and optimiser, sharded or not, from a checkpoint folder, sharded or not; returns its step."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
    tensors = _training_tensors(models, optimizer)
    if (checkpoint / SHARDS).is_dir():
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may read all shards
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint / SHARDS)))
    else:
        for file in (*models, "optimizer"):
            for name, saved in load_file(checkpoint / f"{file}.safetensors").items():
                _fill(tensors[f"{file}:{name}"], saved)
    return json.loads((checkpoint / "state.json").read_text())["step"]


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
            weights[name] = gathered.cpu()
    return weights


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; None if there is none.

    A damaged checkpoint is skipped with a warning, and the one before it is used.

    Raises:
        InputError: there are checkpoints, but all of them are damaged.
    """
    damaged = []
    for _, checkpoint in reversed(_numbered(folder)):
        try:
            shards = read_json(checkpoint / "state.json", "a checkpoint").get("shards", 0)
            parts = sorted((checkpoint / SHARDS).glob("*.safetensors"))
            if len(parts) != shards:
                raise InputError(f"{checkpoint} has {len(parts)} of its {shards} shards")
            files = parts or [checkpoint / f"{name}.safetensors" for name in ("model", "optimizer")]
            for path in (*files, checkpoint / "ema.safetensors"):
                with readable(path), safe_open(path, "pt"):  # reads the header and compares it with the file's length
                    pass
        except InputError as error:
            warnings.warn(f"checkpoint {checkpoint.name} is skipped: {error}", stacklevel=2)
            damaged.append(str(error))
        else:
            return checkpoint
    if damaged:
        raise InputError(f"no checkpoint in {folder} can be read; the newest: {damaged[0]}")
    return None


def classes_of(checkpoint: Path) -> int | None:
    """The number of classes that a checkpoint's model tells apart; None for a text model."""
    with readable(checkpoint / "ema.safetensors"), safe_open(checkpoint / "ema.safetensors", "pt") as file:
        return json.loads(file.metadata()["pixnerd"]).get("num_classes")


def load(path: str | Path, *, weights: str = "ema", device: torch.device | str = "cpu") -> PatchDenoiser:
    """A trained model in evaluation mode.

    Args:
        path: a run's folder (its newest readable checkpoint is used), a checkpoint's folder, or a .safetensors file.
        weights: which file of a checkpoint: "ema", the moving average; "ema-0.999", an extra one with this decay;
            "model", the weights as the optimiser left them, which a sharded run does not write in one file.
        device: where the model goes.

    Raises:
        InputError: there is nothing to load, or it cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return load_model(path, device)
    if not path.is_dir():
        raise InputError(
            f"{path} does not exist; a run's folder, a checkpoint's folder or a .safetensors file is needed"
        )
    if (path / "checkpoints").is_dir():
        checkpoint = newest_checkpoint(path / "checkpoints")
        if checkpoint is None:
            raise InputError(f"run {path} has no checkpoint yet")
        path = checkpoint
    return load_model(path / f"{weights}.safetensors", device)


def _optimizer_tensors(models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in models["model"].named_parameters()}
    if "projector" in models:
        names |= {parameter: f"projector.{name}" for name, parameter in models["projector"].named_parameters()}
    return {f"{key}:{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints, oldest first."""
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)
