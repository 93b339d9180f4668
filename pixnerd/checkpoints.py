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
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import InputError
from .model import ModelConfig, PixNerd
from .text import TextModelConfig, TextPixNerd

LATEST = "latest"  # a text file beside the checkpoints that names the newest complete one


# --- a model in one file -------------------------------------------------------------------------------------------


def save_model(model: PixNerd | TextPixNerd, path: Path) -> None:
    """Write the weights, with the configuration in the file's metadata, so that the file alone rebuilds the model."""
    about: dict[str, Any] = {"config": dataclasses.asdict(model.config)}
    if isinstance(model, PixNerd):
        about["num_classes"] = model.num_classes
    save_file(model.state_dict(), path, {"pixnerd": json.dumps(about)})


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
    folder: Path, step: int, model: PixNerd, ema: PixNerd, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write `folder`/step-N with model, EMA and optimiser, then name it in `latest` and drop all but the newest `keep`.

    The checkpoint is written beside its place and renamed when complete: a reader never sees half of one.
    """
    target = folder / f"step-{step}"
    partial = folder / f".partial-step-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, partial / "model.safetensors")
    save_model(ema, partial / "ema.safetensors")
    save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step}))
    for path in partial.iterdir():
        _sync(path)
    if target.exists():  # a damaged one that a resumed training has reached again
        shutil.rmtree(target)
    partial.rename(target)
    _sync(folder)
    write_atomically(folder / LATEST, target.name + "\n")
    for _, old in _numbered(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_training_state(checkpoint: Path, model: PixNerd, ema: PixNerd, optimizer: torch.optim.Optimizer) -> int:
    """Fill model, EMA and optimiser from a checkpoint folder; returns its step."""
    device = str(next(model.parameters()).device)
    model.load_state_dict(load_file(checkpoint / "model.safetensors", device))
    ema.load_state_dict(load_file(checkpoint / "ema.safetensors", device))
    tensors = load_file(checkpoint / "optimizer.safetensors")
    state = {}
    for index, (name, _) in enumerate(model.named_parameters()):
        state[index] = {key: tensors[f"{key}:{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((checkpoint / "state.json").read_text())["step"]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, None when there is none.

    A damaged one is named in a warning and the one before it is used.

    Raises:
        InputError: there are checkpoints and every one is damaged.
    """
    damaged = []
    for _, checkpoint in reversed(_numbered(folder)):
        try:
            for name in ("model", "ema", "optimizer"):
                path = checkpoint / f"{name}.safetensors"
                with readable(path), safe_open(path, "pt"):  # reads the header and compares it with the file's length
                    pass
            path = checkpoint / "state.json"
            with readable(path):
                json.loads(path.read_text())
        except InputError as error:
            warnings.warn(f"checkpoint {checkpoint.name} is skipped: {error}", stacklevel=2)
            damaged.append(str(error))
        else:
            return checkpoint
    if damaged:
        raise InputError(f"no checkpoint in {folder} can be read; the newest: {damaged[0]}")
    return None


def load(
    path: str | Path, *, weights: Literal["ema", "model"] = "ema", device: torch.device | str = "cpu"
) -> PixNerd | TextPixNerd:
    """A trained model in evaluation mode.

    Args:
        path: a run's folder (its newest readable checkpoint is taken), a checkpoint's folder, or a .safetensors file.
        weights: the moving average, or the weights as the optimiser left them (files hold just one of them).
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


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
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
    with readable(path):
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), dict):
        raise InputError(f"{path} has no state_dict; the released checkpoints keep their weights there")
    released = _denoiser_weights(contents["state_dict"])
    try:
        with torch.device("meta"):
            model = _empty_model(released)
    except KeyError as error:
        raise InputError(f"{path} does not hold PixNerd's weights: {error.args[0]} is missing") from error
    weights = _rename_released(released, model.config.blocks)
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
    for index in range(0 if is_text else blocks):  # our SwiGLU keeps gate and value in one matrix
        gate, value = (weights.pop(f"blocks.{index}.mlp.{part}.weight", None) for part in ("gate", "value"))
        if gate is not None and value is not None:
            weights[f"blocks.{index}.mlp.gate_value.weight"] = torch.cat((gate, value))
    return weights
