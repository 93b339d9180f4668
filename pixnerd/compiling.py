"""torch.compile: which parts of a network it compiles, and when that pays."""

from collections.abc import Callable

import torch

from .config import Compile, SamplingConfig
from .cost import forward_flops
from .errors import InputError
from .fields import NeuralFieldHead
from .model import PatchDenoiser
from .sampling import network_passes

WORTH_COMPILING = 3e16  # FLOP of sampling, five minutes of an A100 at 1e14 FLOP/s; compiling takes up to one


def check_compiler(device: torch.device) -> None:
    """Raise InputError unless torch.compile works, which needs a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler, header or Triton: each raises its own
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"torch.compile does not work on this machine ({reason}): "
            "install a C++ compiler such as g++, or do without it by --compile off"
        ) from error


def compile_regions(model: PatchDenoiser, any_batch: bool = False) -> None:
    """torch.compile each repeated part separately: as fast as the whole model at once, and compiled only once.

    Two graphs in all, one of a block and one of the head. torch would cut a block's graph wherever one of DDP's buckets
    of gradients ends; the blocks are pieces enough to send gradients while others are computed.

    With `any_batch`, for sampling, where a guided step has twice the images and the last batch fewer: the second size
    that either part meets compiles it for every size from 2 on, so four graphs serve them all, and one more a single
    image. Otherwise the head is compiled anew for each number of patches.
    """
    torch._dynamo.config.optimize_ddp = False
    for block in model.blocks:
        block.compile()
    if isinstance(model.head, NeuralFieldHead):
        model.head.decode = torch.compile(model.head.decode, dynamic=None if any_batch else False)


def pays(setting: Compile, device_type: str, flops: Callable[[], float]) -> bool:
    """Whether to compile for sampling that takes so many floating-point operations, counted only if it matters."""
    return setting == "on" or (setting == "auto" and device_type == "cuda" and flops() >= WORTH_COMPILING)


def compile_to_sample(
    setting: Compile, model: PatchDenoiser, guide: PatchDenoiser | None, images: int, config: SamplingConfig
) -> None:
    """Compile a model that will sample so many images, and its guide, if it has one, where the setting says so.

    Raises:
        InputError: torch.compile does not work on this machine.
    """
    device = model.patch_embed.weight.device

    def flops() -> float:
        return images * network_passes(config) * forward_flops(model, model.config.image_size)

    if pays(setting, device.type, flops):
        check_compiler(device)
        for network in (model, guide):
            if network is not None:
                compile_regions(network, any_batch=True)
