"""Our class-conditional weights in the released layout, and what loading the largest such file costs.

python -m tests.released writes an XL/16 checkpoint (2.8 GB, float32) into a temporary folder and loads it in a fresh
process: peak resident memory beside the weights' size, and seconds.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from pixnerd import SIZES, PixNerd, load_released

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


def peak_gib() -> float:
    """The most memory this process was seen with, mapped files included (Linux; getrusage would count the parent's)."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def load_and_report(path: str) -> None:
    before, begin = peak_gib(), time.perf_counter()
    model = load_released(path)
    seconds = time.perf_counter() - begin
    loaded = peak_gib() - before
    total = sum(float(parameter.detach().sum()) for parameter in model.parameters())  # every page has to be there now
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**30
    print(f"weights {weights:.2f} GiB (checksum {total:.3f}), loaded in {seconds:.1f} s")
    print(f"peak memory over the empty process: {loaded / weights:.2f}x when loaded, ", end="")
    print(f"{(peak_gib() - before) / weights:.2f}x once every weight was read")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load_and_report(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "xl.ckpt"
            torch.save({"state_dict": as_released(PixNerd(SIZES["XL/16"], 1000))}, path)
            subprocess.run([sys.executable, "-m", "tests.released", str(path)], check=True)
