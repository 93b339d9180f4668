"""Weights on disk: our own safetensors, a training's checkpoints, and the layout of the released PixNerd weights.

Nothing is ever unpickled: our files are safetensors and JSON, foreign ones are read with `weights_only=True`.
"""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .distributed import World
from .errors import InputError
from .model import ModelConfig, PixNerd
from .text import TextModelConfig, TextPixNerd

SHARDS = "shards"  # the folder, in a sharded training's checkpoint, where every process has written its part
LATEST = "latest"  # a text file beside the checkpoints that names the newest complete one


# --- a model in one file -------------------------------------------------------------------------------------------


def save_model(model: PixNerd | TextPixNerd, path: Path) -> None:
    """Write the weights, with the configuration in the file's metadata, so that the file alone rebuilds the model."""
    save_file(model.state_dict(), path, _about(model))


def _about(model: nn.Module) -> dict[str, str]:
    if not isinstance(model, (PixNerd, TextPixNerd)):
        return {}
    about: dict[str, Any] = {"config": dataclasses.asdict(model.config)}
    if isinstance(model, PixNerd):
        about["num_classes"] = model.num_classes
    return {"pixnerd": json.dumps(about)}


def load_model(path: Path, device: torch.device | str = "cpu") -> PixNerd | TextPixNerd:
    """Rebuild a model that `save_model` wrote, in evaluation mode.

    Raises:
        InputError: the file is missing, truncated, or not one of ours.
    """
    with readable(path), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "pixnerd" not in metadata:
        raise InputError(f"{path} holds no PixNerd configuration; `pixnerd.load_released` reads the released weights")
    with torch.device("meta"):  # nothing is allocated twice
        about = json.loads(metadata["pixnerd"])
        if "num_classes" in about:
            model = PixNerd(ModelConfig(**about["config"]), about["num_classes"])
        else:
            model = TextPixNerd(TextModelConfig(**about["config"]))
    with readable(path):
        model.load_state_dict(load_file(path, device=str(device)), assign=True)
    return model.eval()


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what reading a missing or damaged file raises into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (SafetensorError, json.JSONDecodeError, OSError, EOFError, pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or not a checkpoint: {reason}") from error


# --- a training's checkpoints --------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    models: dict[str, PixNerd | TextPixNerd],
    optimizer: torch.optim.Optimizer,
    keep: int,
    world: World,
) -> Path:
    """Write `folder`/step-N, then name it in `latest` and drop all but the newest `keep`. Every process calls it.

    The checkpoint is written beside its place and renamed when complete: a reader never sees half of one. The leading
    process writes everything; of a sharded model, every process writes its own part, and the moving averages are
    written whole beside them, so that whoever samples need not know how the training was spread.

    Args:
        models: file name → model: "model", which `optimizer` trains, its moving averages "ema", …, and, where features
            are aligned, the "projector", which is trained with it.
    """
    target = folder / f"step-{step}"
    partial = folder / f".partial-step-{step}"
    if world.leads:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.wait()
    if is_sharded(models["model"]):
        writer = dcp.HuggingFaceStorageWriter(str(partial / SHARDS), save_distributed=True)
        dcp.save(_training_tensors(models, optimizer), storage_writer=writer)
        whole = {name: _whole(model, world) for name, model in models.items() if name != "model"}
    else:
        whole = {name: model.state_dict() for name, model in models.items()}
        if world.leads:
            save_file(_optimizer_tensors(models, optimizer), partial / "optimizer.safetensors")
    world.wait()
    if not world.leads:
        return target
    for name, weights in whole.items():
        save_file(weights, partial / f"{name}.safetensors", _about(models[name]))
    shards = len(list((partial / SHARDS).glob("*.safetensors")))
    (partial / "state.json").write_text(json.dumps({"step": step, "shards": shards}))
    for path in partial.rglob("*"):
        _sync(path)
    if target.exists():  # a damaged one that a resumed training has reached again
        shutil.rmtree(target)
    partial.rename(target)
    _sync(folder)
    write_atomically(folder / LATEST, target.name + "\n")
    for _, old in _numbered(folder)[:-keep]:
        retired = old.with_name(f".retired-{old.name}")  # out of sight first: no reader meets it half removed
        old.rename(retired)
    for retired in folder.glob(".retired-*"):
        shutil.rmtree(retired)
    return target


def load_training_state(
    checkpoint: Path, models: dict[str, PixNerd | TextPixNerd], optimizer: torch.optim.Optimizer
) -> int:
    """Fill models and optimiser, whole or sharded, from a checkpoint folder, whole or sharded; returns its step."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
    tensors = _training_tensors(models, optimizer)
    if (checkpoint / SHARDS).is_dir():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may read what many wrote
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint / SHARDS)))
    else:
        for file in (*models, "optimizer"):
            for name, saved in load_file(checkpoint / f"{file}.safetensors").items():
                _fill(tensors[f"{file}:{name}"], saved)
    return json.loads((checkpoint / "state.json").read_text())["step"]


def is_sharded(model: nn.Module) -> bool:
    """Whether every process holds a part of each weight only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _training_tensors(models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a training goes on from: "file:name" → tensor, the live ones."""
    weights = {f"{file}:{name}": w for file, model in models.items() for name, w in model.state_dict().items()}
    state = _optimizer_tensors(models, optimizer)
    return weights | {f"optimizer:{name}": tensor for name, tensor in state.items()}


@torch.no_grad()
def _fill(live: Tensor, saved: Tensor) -> None:
    saved = saved.to(live.device)
    if isinstance(live, DTensor):
        saved = distribute_tensor(saved, live.device_mesh, live.placements)
    live.copy_(saved)


def _whole(model: nn.Module, world: World) -> dict[str, Tensor]:
    """A sharded model's weights, gathered one after the other, on the CPU of the leading process."""
    weights = {}
    for name, tensor in model.state_dict().items():
        gathered = tensor.full_tensor()
        if world.leads:
            weights[name] = gathered.cpu()
    return weights


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, None when there is none.

    A damaged one is named in a warning and the one before it is used.

    Raises:
        InputError: there are checkpoints and every one is damaged.
    """
    damaged = []
    for _, checkpoint in reversed(_numbered(folder)):
        try:
            state = checkpoint / "state.json"
            with readable(state):
                shards = json.loads(state.read_text()).get("shards", 0)
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


def load(path: str | Path, *, weights: str = "ema", device: torch.device | str = "cpu") -> PixNerd | TextPixNerd:
    """A trained model in evaluation mode.

    Args:
        path: a run's folder (its newest readable checkpoint is taken), a checkpoint's folder, or a .safetensors file.
        weights: which of a checkpoint's files: "ema", the moving average; "ema-0.999", an extra one of this decay;
            "model", the weights as the optimiser left them, which a sharded training does not write whole.
        device: where the model goes.

    Raises:
        InputError: nothing there, or what is there cannot be read.
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


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader sees the old or the new text, never half of one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    _sync(partial)
    partial.replace(path)


def _optimizer_tensors(models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in models["model"].named_parameters()}
    if "projector" in models:
        names |= {parameter: f"projector.{name}" for name, parameter in models["projector"].named_parameters()}
    return {f"{key}:{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints, oldest first."""
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def _sync(path: Path) -> None:
    """Make sure that a file or a folder's entries are on the disk, not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the released weights ------------------------------------------------------------------------------------------

RELEASED_NAMES = {  # released module → ours, class- and text-conditional; blocks are renamed apart
    "s_embedder.proj": "patch_embed",
    "t_embedder.mlp": "time_embed.mlp",
    "y_embedder.embedding_table": "label_embed",
    "y_embedder.proj": "text_embed",
    "y_embedder.norm": "text_norm",
    "x_embedder.embedder.0": "head.embed",
    "final_layer.norm": "head.norm",
    "final_layer.linear": "head.out",
}
RELEASED_BLOCK_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "attn.qkv",
    "attn.qkv_x": "attn.qkv",
    "attn.kv_y": "attn.text_kv",
    "attn.q_norm": "attn.q_norm",
    "attn.k_norm": "attn.k_norm",
    "attn.proj": "attn.proj",
    "adaLN_modulation.0": "modulation",
}
# the two layouts name the SwiGLU's matrices differently; the class model's w1 and w3 are joined afterwards
RELEASED_CLASS_MLP = {"mlp.w1": "mlp.gate", "mlp.w3": "mlp.value", "mlp.w2": "mlp.out"}
RELEASED_TEXT_MLP = {"mlp.w12": "mlp.gate_value", "mlp.w3": "mlp.out"}
RELEASED_FIELD_NAMES = {"param_generator1.0": "generator", "norm": "norm"}


def load_released(
    source: str | Path, filename: str | None = None, device: torch.device | str = "cpu"
) -> PixNerd | TextPixNerd:
    """A model with weights of the released PixNerd code, class- or text-conditional, in evaluation mode.

    The EMA weights are taken when the file has them. Every size is read off the tensors' shapes, since such a file
    stores nothing about the model. The file is mapped into memory, not read: on a CPU the weights are the file's own
    pages, so the file has to stay where it is.

    Args:
        source: a checkpoint file, or the id of a repository on the Hugging Face hub ("MCG-NJU/PixNerd-XL-P16-C2I").
        filename: which checkpoint of the repository, where it has several.
        device: where the model goes.

    Raises:
        InputError: missing, damaged or foreign file; missing or surplus weights, by name; hub out of reach.
    """
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        path = _download(str(source), filename)
    released = _map_released(path)
    try:
        with torch.device("meta"):
            model = _empty_model(released)
    except KeyError as error:
        raise InputError(f"{path} does not hold PixNerd's weights: {error.args[0]} is missing") from error
    blocks, is_text = model.config.blocks, isinstance(model, TextPixNerd)
    gate_values = {} if is_text else _join_gate_values(_rename_released(released, blocks), blocks)
    del released  # with the last tensor the mapping goes, and the memory of what was read only to be copied
    weights = _rename_released(_map_released(path), blocks)
    for name in gate_values:
        for part in ("gate", "value"):
            del weights[name.replace("gate_value", part)]
    weights |= gate_values
    expected = model.state_dict()
    missing, surplus = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or surplus:
        raise InputError(f"{path} does not fit: missing {missing or 'nothing'}, surplus {surplus or 'nothing'}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)} and not {tuple(expected[name].shape)}"
            raise InputError(f"{path} does not fit: {name} has shape {shapes}")
    model.load_state_dict(weights, assign=True)
    return model.to(device, torch.float32).eval()


def _download(repository: str, filename: str | None) -> Path:
    """The checkpoint of a hub repository, downloaded once (with a progress bar) into the hub's cache."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError("the hub needs the package huggingface_hub: pip install 'pixnerd[hub]'") from error
    try:
        if filename is None:
            names = [name for name in huggingface_hub.list_repo_files(repository) if name.endswith(".ckpt")]
            if len(names) != 1:
                found = ", ".join(names) or "none"
                raise InputError(f"{repository} has {len(names)} checkpoints ({found}); name one with `filename`")
            (filename,) = names
        return Path(huggingface_hub.hf_hub_download(repository, filename))
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{repository} is no file here and could not be fetched from the Hugging Face hub: {reason}"
        ) from error


def _map_released(path: Path) -> dict[str, Tensor]:
    """The denoiser's weights in the file, mapped: nothing is read before somebody looks at it."""
    with readable(path):
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), dict):
        raise InputError(f"{path} has no state_dict; the released checkpoints keep their weights there")
    return _denoiser_weights(contents["state_dict"])


def _denoiser_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("ema_denoiser.", "denoiser."):
        found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if found:
            return {key.replace("_orig_mod.", ""): value for key, value in found.items()}
    return {}


def _empty_model(released: dict[str, Tensor]) -> PixNerd | TextPixNerd:
    """The model that the weights are of, all sizes inferred from shapes. Raises KeyError naming what is missing."""

    def rows(name: str) -> int:
        return len(released[name])

    generators = [int(key.split(".")[1]) for key in released if ".param_generator1." in key and key.endswith("weight")]
    if not generators:
        raise KeyError("param_generator1")
    first = min(generators)
    width, patch_inputs = released["s_embedder.proj.weight"].shape
    channels, field_width = rows("final_layer.linear.weight"), rows(f"blocks.{first}.norm.weight")
    patch_size = math.isqrt(patch_inputs // channels)
    sizes = {
        "width": width,
        "heads": width // rows("blocks.0.attn.q_norm.weight"),
        "blocks": first,
        "patch_size": patch_size,
        "channels": channels,
        "field_width": field_width,
        "field_blocks": len(generators),
        "field_ratio": rows(f"blocks.{first}.param_generator1.0.weight") // (2 * field_width**2),
    }
    # the size it was trained at is not stored: 256 pixels for the class model, 512 for text, both in patches of 16
    if "y_pos_embedding" not in released:
        classes = rows("y_embedder.embedding_table.weight") - 1
        return PixNerd(ModelConfig(**sizes, image_size=16 * patch_size), classes)
    text_blocks = {key.split(".")[1] for key in released if key.startswith("text_refine_blocks.")}
    config = TextModelConfig(
        **sizes,
        image_size=32 * patch_size,
        text_blocks=len(text_blocks),
        text_features=released["y_embedder.proj.weight"].shape[1],
        text_length=released["y_pos_embedding"].shape[1],
    )
    return TextPixNerd(config)


def _rename_released(released: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    is_text = "y_pos_embedding" in released
    block_names = RELEASED_BLOCK_NAMES | (RELEASED_TEXT_MLP if is_text else RELEASED_CLASS_MLP)
    weights: dict[str, Tensor] = {}
    for key, tensor in released.items():
        module, _, leaf = key.rpartition(".")
        if key == "y_pos_embedding":
            weights["text_positions"] = tensor
            continue
        if match := re.fullmatch(r"(blocks|text_refine_blocks)\.(\d+)\.(.+)", module):
            kind, index, inner = match[1], int(match[2]), match[3]
            if kind == "text_refine_blocks":
                ours = f"text_blocks.{index}.{block_names.get(inner, inner)}"
            elif index < blocks:
                ours = f"blocks.{index}.{block_names.get(inner, inner)}"
            else:
                ours = f"head.blocks.{index - blocks}.{RELEASED_FIELD_NAMES.get(inner, inner)}"
        else:
            stem = next((name for name in RELEASED_NAMES if module == name or module.startswith(name + ".")), None)
            ours = module if stem is None else RELEASED_NAMES[stem] + module.removeprefix(stem)
        weights[f"{ours}.{leaf}"] = tensor
    return weights


def _join_gate_values(weights: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Our SwiGLU keeps gate and value in one matrix; the class-conditional layout has two."""
    joined = {}
    for index in range(blocks):
        gate, value = (weights.get(f"blocks.{index}.mlp.{part}.weight") for part in ("gate", "value"))
        if gate is not None and value is not None:
            joined[f"blocks.{index}.mlp.gate_value.weight"] = torch.cat((gate, value))
    return joined
