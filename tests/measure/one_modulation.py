"""The adaLN vectors of all blocks: from one product for each block, from one for all, and from one of joined weights.

python -m tests.measure.one_modulation

Forward and backward, in float32 on a CPU, in bfloat16 on a GPU if there is one; interleaved in one run. `one` keeps
the weights of all blocks in one parameter, which checkpoints do not; `joined` puts them together in every step.
"""

import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from pixnerd.distributed import default_device
from pixnerd.model_config import SIZES
from pixnerd.recipes import RECIPES

ROUNDS = 9
SETTINGS = [("digits", RECIPES["digits-cpu"].model, 64), ("L/16", SIZES["L/16"], 32), ("XL/16", SIZES["XL/16"], 32)]
SETTINGS += [("XL/16, one image", SIZES["XL/16"], 1)]


def vectors(way: str, c: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """c [B, D] and weights [6·D, D] of each block, or [blocks·6·D, D] of all → [B, 6·D] of each block."""
    if way == "each":
        return [F.linear(c, weight) for weight in weights]
    rows = weights[0] if way == "one" else torch.cat(weights)  # [blocks·6·D, D]
    return list(F.linear(c, rows).split(6 * c.shape[1], dim=-1))


def main() -> None:
    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, medians of {ROUNDS}, relative to each"
    )
    for name, model, images in SETTINGS:
        width = model.width
        c = torch.randn(images, width, device=device, requires_grad=True)
        each = [torch.randn(6 * width, width, device=device, requires_grad=True) for _ in range(model.blocks)]
        one = [torch.cat(each).detach().requires_grad_()]
        seconds: dict[str, list[float]] = {"each": [], "one": [], "joined": []}
        for _ in range(ROUNDS + 1):
            for way, times in seconds.items():
                weights = one if way == "one" else each
                synchronize()
                begin = time.perf_counter()
                with torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
                    found = vectors(way, c, weights)
                torch.autograd.grad(found, [c, *weights], [torch.ones_like(part) for part in found])
                synchronize()
                times.append(time.perf_counter() - begin)
        medians = {way: statistics.median(times[1:]) for way, times in seconds.items()}  # the first warms up
        ratios = ", ".join(f"{way} {medians[way] / medians['each']:.2f}" for way in ("one", "joined"))
        print(f"{name}: {1000 * medians['each']:.2f} ms; {ratios}")


if __name__ == "__main__":
    main()
