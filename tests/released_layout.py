"""Our class-conditional weights in the layout of the released ones."""

import re

from torch import Tensor

from pixnerd import PixNerd

OUTER = {
    "patch_embed": "s_embedder.proj",
    "time_embed.mlp.0": "t_embedder.mlp.0",
    "time_embed.mlp.2": "t_embedder.mlp.2",
    "label_embed": "y_embedder.embedding_table",
    "head.embed": "x_embedder.embedder.0",
    "head.norm": "final_layer.norm",
    "head.out": "final_layer.linear",
}


def as_released(model: PixNerd) -> dict[str, Tensor]:
    """The state_dict that the released code would have written for this model's EMA."""
    released = {}
    for key, tensor in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if match := re.fullmatch(r"head\.blocks\.(\d+)\.(generator|norm)", module):
            inner = "param_generator1.0" if match[2] == "generator" else "norm"
            name = f"blocks.{model.config.blocks + int(match[1])}.{inner}"
        elif module.endswith("mlp.gate_value"):
            gate, value = tensor.chunk(2)
            block = module.removesuffix("gate_value")
            released[f"ema_denoiser.{block}w1.weight"] = gate.clone()
            released[f"ema_denoiser.{block}w3.weight"] = value.clone()
            continue
        else:
            name = OUTER.get(module, module.replace("modulation", "adaLN_modulation.0").replace("mlp.out", "mlp.w2"))
        released[f"ema_denoiser.{name}.{leaf}"] = tensor
    return released
