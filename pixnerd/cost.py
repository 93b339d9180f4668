"""What training costs in arithmetic, memory and time, and how fast this device can be at best."""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from . import flow
from .encodings import coordinate_table
from .layers import rotary_table
from .linear import linear
from .model import PatchDenoiser
from .model_config import ModelConfig, Recompute

MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}  # large enough to reach the device's full speed
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes, more than any cache holds


def forward_flops(model: PatchDenoiser, size: int) -> int:
    """Floating-point operations for one image's velocity, two for each multiply-add of a matrix product.

    Args:
        model: best created under `torch.device("meta")`, since only shapes matter.
        size: side in pixels that the head decodes from the tokens of the model's own image size.
    """
    device, base = model.patch_embed.weight.device, (model.config.image_size,) * 2
    x = torch.empty(1, model.config.channels, size, size, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, torch.empty(1, device=device), model.example_condition(), None if base == (size, size) else base)
    return counter.get_total_flops()


def step_flops(model: PatchDenoiser, size: int, recompute: Recompute | None = None) -> int:
    """Floating-point operations of forward and backward pass for one image, what is recomputed included.

    The backward pass counts as two forward passes, the usual estimate. For the arguments see `forward_flops`;
    `recompute` replaces the model's own setting.
    """
    device, base = model.patch_embed.weight.device, (model.config.image_size,) * 2
    x, t = torch.empty(1, model.config.channels, size, size, device=device), torch.empty(1, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, model.example_condition(), None if base == (size, size) else base)
    counts, name = counter.get_flop_counts(), type(model).__name__
    head = sum(counts[f"{name}.head"].values()) if f"{name}.head" in counts else 0
    head -= sum(sum(c.values()) for module, c in counts.items() if module.endswith(".generator"))  # its output is kept
    blocks = sum(sum(counts[f"{name}.blocks.{number}"].values()) for number in range(model.config.blocks))
    recompute = recompute or model.recompute
    again = head * model.recomputes_head(recompute) + blocks * (recompute == "all")
    return 3 * counter.get_total_flops() + again


def clock() -> float:
    """Seconds on a clock, read once the GPU in use, if there is one, has done all its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def best_of_ten(work: Callable[[], object]) -> float:
    """The fewest seconds that ten trials take."""
    seconds = []
    for _ in range(10):
        begin = clock()
        work()
        seconds.append(clock() - begin)
    return min(seconds)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured floating-point operations per second of a large square layer's product, the best of ten."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / best_of_ten(lambda: linear(a, b))


def copy_rate(device: torch.device) -> float:
    """Measured bytes per second that copying a large tensor reads and writes, the best of ten."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_of_ten(lambda: target.copy_(source))


def generated_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the fields' generated weights for one image of config.image_size pixels, and of their gradients."""
    if config.head != "field" or config.field_weights != "generated":
        return 0  # a shared field's vectors are negligible
    patches = (config.image_size // config.patch_size) ** 2
    return patches * config.field_blocks * 2 * config.field_ratio * config.field_width**2 * dtype.itemsize


def state_bytes(model: PatchDenoiser, averages: int = 1, shards: int = 1) -> int:
    """Bytes of training's persistent tensors on each of `shards` devices, among which they are divided.

    Weights, gradients, AdamW's two moments and the moving averages, all in float32.
    """
    return -(-4 * sum(p.numel() for p in model.parameters()) * (1 + 1 + 2 + averages) // shards)


class FusedAttention(TorchFunctionMode):
    """Selects the attention kernels that a GPU would use, even where there is no GPU.

    Otherwise attention would keep the N × N probabilities, which the fused kernels recompute.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        if q.dtype == torch.bfloat16:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]


def saved_activation_bytes(
    model: PatchDenoiser,
    size: int,
    recompute: Recompute | None = None,
    dtype: torch.dtype = torch.bfloat16,
    decoded: int | None = None,
) -> int:
    """Bytes that each additional image of a batch makes a GPU keep from the forward pass for the backward pass.

    Counted from shapes, without a GPU or its memory, for eager operators; torch.compile may keep more or less. Whatever
    does not grow with the batch, such as weights and their copies in `dtype`, does not count; see `state_bytes`. Nor
    does what the backward pass recomputes, one block or one piece of the head at a time.

    Args:
        model: on any device; "meta" is best, since only shapes matter.
        size: side of the images in pixels, which the transformer sees at this size.
        recompute: replaces the model's own setting.
        dtype: torch.bfloat16 for autocast, or torch.float32.
        decoded: side that the head decodes from these tokens; by default the same.
    """
    model = copy.copy(model)  # shares the weights, which functional_call replaces
    model.recompute, model.training = recompute or model.recompute, True
    two, three = (_saved_bytes(model, size, decoded or size, images, dtype) for images in (2, 3))
    return three - two  # not 2 − 1: a batch of one has axes that need no copy


def _saved_bytes(model: PatchDenoiser, size: int, decoded: int, images: int, dtype: torch.dtype) -> int:
    """Bytes of everything that a forward pass saves, weights included; views of one storage count once."""
    storages = set()

    def keep(tensor: Tensor) -> Tensor:
        storages.add(tensor.untyped_storage())
        return tensor

    device = torch.device("cuda")
    forget_tables()  # cached real tensors must not mix with fake ones, nor afterwards the other way round
    try:
        with FakeTensorMode(), device, torch.enable_grad(), _cuda_autocast(dtype), FusedAttention():
            weights = {n: torch.empty(p.shape, requires_grad=True) for n, p in model.named_parameters()}
            x, t = torch.empty(images, model.config.channels, decoded, decoded), torch.empty(images)
            condition = model.example_condition(images, device)
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                functional_call(model, weights, (x, t, condition, None if decoded == size else (size, size)))
            return sum(storage.nbytes() for storage in storages)
    finally:
        forget_tables()


@contextlib.contextmanager
def _cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Like torch.autocast("cuda"), which switches itself off where there is no GPU; this does not."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


def forget_tables() -> None:
    """Empty the caches of tables, which belong to whoever computed them: real, fake, or part of a CUDA graph."""
    rotary_table.cache_clear()
    coordinate_table.cache_clear()


def training_rate(model: PatchDenoiser, size: int, images: int, dtype: torch.dtype, steps: int = 5) -> float:
    """Measured images per second on one device: forward, backward and AdamW on random images, the median step.

    Args:
        model: on the device to measure; its weights change.
        size: side of the images in pixels.
        images: batch size.
        dtype: torch.bfloat16 for autocast, or torch.float32.
        steps: steps to time, at least 1, after three that compile and create AdamW's moments.
    """
    device = model.patch_embed.weight.device
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    x = torch.rand(images, model.config.channels, size, size, device=device) * 2 - 1
    noise, t, condition = torch.randn_like(x), torch.rand(images, device=device), model.example_condition(images)
    seconds = []
    for _ in range(3 + steps):
        begin = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = flow.loss(model, x, condition, noise, t).mean
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return images / statistics.median(seconds[3:])
