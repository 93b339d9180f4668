"""How long a training step takes, against the same network written as its equations read.

python -m tests.measure.step_time

Forward, backward and AdamW at the digits-cpu recipe's sizes, variants interleaved in one run, medians. The plain
network is `plain.py` in float32 with torch's default optimiser; it computes the same loss (checked before the timing).
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from pixnerd import PixNerd, flow, recipes, training

from .. import plain
from ..conftest import randomised

ROUNDS = 25
RECIPE = recipes.RECIPES["digits-cpu"]
CONFIG = dataclasses.replace(RECIPE.model, channels=1)


def draw() -> tuple[torch.Tensor, ...]:
    """image, labels, noise, t of one batch."""
    shape = (RECIPE.batch_size, 1, CONFIG.image_size, CONFIG.image_size)
    image, noise = torch.rand(shape) * 2 - 1, torch.randn(shape)
    return image, torch.randint(0, 11, shape[:1]), noise, torch.rand(shape[0])


def plain_loss(model: PixNerd, image, labels, noise, t):
    """flow.loss with the plain network."""
    x_t = flow.interpolate(image, noise, t)
    v = plain.network(dict(model.named_parameters()), CONFIG, x_t, t, labels)
    weight = ((1 - t) / 0.05).clamp(max=1) if CONFIG.prediction == "x" else torch.ones_like(t)
    return (((v - (image - noise)) * weight.view(-1, 1, 1, 1)) ** 2).mean()


def plain_step() -> Callable[[], None]:
    model = PixNerd(CONFIG, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad()
        plain_loss(model, *draw()).backward()
        optimizer.step()

    return step


def package_step(bf16: bool, compiled: bool, recompute: str) -> Callable[[], None]:
    model = PixNerd(CONFIG, 10, recompute).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if compiled:
        training.compile_regions(model)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = flow.loss(model, *draw()).mean
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    batch, model = draw(), randomised(PixNerd(CONFIG, 10))
    torch.testing.assert_close(flow.loss(model, *batch).mean, plain_loss(model, *batch), rtol=1e-4, atol=0)

    variants = {
        "plain, float32, eager": plain_step(),
        "package, float32, eager": package_step(False, False, "none"),
        "package, float32, eager, head recomputed": package_step(False, False, "head"),
    }
    if recipes.cpu_can_compile():
        variants["package, float32, compiled"] = package_step(False, True, "none")
        variants["package, float32, compiled, head recomputed"] = package_step(False, True, "head")
        variants["package, bfloat16, compiled"] = package_step(True, True, "none")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round in tqdm(range(ROUNDS + 3)):
        for name, step in variants.items():
            begin = time.perf_counter()
            step()
            if round >= 3:  # the first ones compile and warm up
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {RECIPE.batch_size}, median of {ROUNDS}"
    )
    for name, median in medians.items():
        print(f"{median / medians['plain, float32, eager']:6.3f}  {name}")


if __name__ == "__main__":
    main()
