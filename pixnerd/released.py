"""The authors' released weights: the layout of their checkpoints, and how to load them into our model.

Foreign files are read with `weights_only=True`, which unpickles tensors and nothing else.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from .config import RELEASED
from .errors import InputError
from .files import check_shapes, reachable, readable
from .model import PatchDenoiser
from .model_config import ModelConfig, TextModelConfig
from .text import build_network

RELEASED_NAMES = {  # released module → ours, class- and text-conditional; blocks are renamed separately
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


def load_released(source: str | Path, filename: str | None = None, device: torch.device | str = "cpu") -> PatchDenoiser:
    """A model with weights of the released PixNerd code, class- or text-conditional, in evaluation mode.

    The EMA weights are used if the file has them. All sizes are inferred from the tensors' shapes, since the file
    stores no configuration. The file is mapped into memory, not read: on a CPU the weights are the file's own pages,
    so the file has to stay in place.

    Args:
        source: a checkpoint file, or the id of a repository on the Hugging Face hub ("MCG-NJU/PixNerd-XL-P16-C2I").
        filename: which checkpoint of the repository, if it has several; by default, in the authors' repositories, the
            one that the published figures were measured with.
        device: where the model goes.

    Raises:
        InputError: missing, damaged or foreign file; missing or surplus weights, by name; hub out of reach.
    """
    path = reachable(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        path = download(str(source), filename)
    released = _map_released(path)
    try:
        with torch.device("meta"):
            model = _empty_model(released, 512 if "res512" in path.name else 256)
        blocks = model.config.blocks
        gate_values = _join_gate_values(_rename_released(released, blocks), blocks)
    except KeyError as error:
        raise InputError(f"{path} does not hold PixNerd's weights: {error.args[0]} is missing") from error
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # of shapes that are those of no model
        raise InputError(f"{path} does not hold PixNerd's weights: {str(error).splitlines()[0]}") from error
    del released  # drops the mapping, and with it the memory of pages that were read only to be copied
    weights = _rename_released(_map_released(path), blocks)
    for name in gate_values:
        for part in ("gate", "value"):
            del weights[name.replace("gate_value", part)]
    weights |= gate_values
    expected, found = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (model.state_dict(), weights)
    )
    check_shapes(path, expected, found)
    model.load_state_dict(weights, assign=True)
    return model.to(device, torch.float32).eval()


def reads_text(path: Path) -> bool:
    """Whether a file of the authors' code holds a text-conditional model. Raises InputError for any other file."""
    return "y_pos_embedding" in _map_released(path)


def download(repository: str, filename: str | None = None) -> Path:
    """The checkpoint of a hub repository, downloaded once (with a progress bar) into the hub's cache."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError("the hub needs the package huggingface_hub: pip install 'pixnerd[hub]'") from error
    if filename is None and repository in RELEASED:
        filename = RELEASED[repository].file
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
    """The denoiser's weights in the file, memory-mapped: nothing is read before it is used."""
    with readable(path):
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), dict):
        raise InputError(f"{path} has no state_dict; the released checkpoints keep their weights there")
    weights = _denoiser_weights({key: x for key, x in contents["state_dict"].items() if isinstance(key, str)})
    for name, value in weights.items():
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided):
            raise InputError(f"{path} does not hold PixNerd's weights: {name} is no tensor of floating-point numbers")
    return weights


def _denoiser_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("ema_denoiser.", "denoiser."):
        found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if found:
            return {key.replace("_orig_mod.", ""): value for key, value in found.items()}
    return {}


def _empty_model(released: dict[str, Tensor], image_size: int) -> PatchDenoiser:
    """The model that fits the weights, with sizes inferred from shapes. Raises KeyError naming what is missing.

    `image_size` is the class model's at patches of 16; the file does not say it.
    """

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
    # the training size is not stored: 256 or 512 pixels for the class model, 512 for text, with patches of 16
    if "y_pos_embedding" not in released:
        classes = rows("y_embedder.embedding_table.weight") - 1
        return build_network(ModelConfig(**sizes, image_size=image_size // 16 * patch_size), classes)
    text_blocks = {key.split(".")[1] for key in released if key.startswith("text_refine_blocks.")}
    config = TextModelConfig(
        **sizes,
        image_size=32 * patch_size,
        text_blocks=len(text_blocks),
        text_features=released["y_embedder.proj.weight"].shape[1],
        text_length=released["y_pos_embedding"].shape[1],
    )
    return build_network(config, None)


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
    """SwiGLU's gate and value in one matrix, as in our model and the text layout; the class layout has two."""
    joined = {}
    for index in range(blocks):
        gate, value = (weights.get(f"blocks.{index}.mlp.{part}.weight") for part in ("gate", "value"))
        if gate is not None and value is not None:
            joined[f"blocks.{index}.mlp.gate_value.weight"] = torch.cat((gate, value))
    return joined
