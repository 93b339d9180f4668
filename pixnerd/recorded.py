"""CUDA graphs: the kernels of a small batch, recorded once and from then on started by a single call.

A network has well over a thousand kernels. For a few images a GPU is done with each before the processor has started
the next, and waits. A recording starts them all at once; they are the same kernels, and the images are the same bit for
bit. Under autocast a recording casts the weights in every pass, which sampling otherwise does once for all steps. No
GPU has run this yet: tests.measure.gpu_checks compares and times it (`recorded_sampling`).
"""

import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cost import forget_tables, forward_flops
from .errors import InputError
from .model import PatchDenoiser
from .text import build_network

SMALL = 4e12  # FLOP of a pass, some 10 ms of an H100, an estimate: above, the processor is ahead of the GPU anyway
FIRST = 3  # a shape that is met so often is recorded, since sampling in few steps is over before that pays
MOST = 16  # recordings that a network keeps


class Recording(NamedTuple):
    """The kernels of a pass, and the places in memory that they read and write."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def replay(self, *inputs: Tensor) -> Tensor:
        """The output for other inputs of the same shapes."""
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.output.clone()


def record(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: Any) -> Recording:
    """Record what `function` does with inputs of these shapes; weights are read where they lie, at each replay.

    Recordings that share a memory pool may overwrite what others left there, but for their outputs.
    """
    places, graph = tuple(x.clone() for x in inputs), torch.cuda.CUDAGraph()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function(*places)  # compiles and allocates whatever does so at first
    torch.cuda.current_stream().wait_stream(aside)
    _forget()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = function(*places)
    finally:
        _forget()
    return Recording(graph, places, output)


def _forget() -> None:
    """Tables and cast weights that outlive a pass: a recording makes its own, since others may be dropped later."""
    forget_tables()
    torch.clear_autocast_cache()


class RecordedForward:
    """A network's forward pass, from recordings where that pays: small batches, without gradients."""

    def __init__(self, model: PatchDenoiser):
        self.model = weakref.ref(model)  # which holds this in turn: a cycle would keep the GPU's memory
        config = model.config
        with torch.device("meta"):
            flops = forward_flops(build_network(config, model.num_classes), config.image_size)
        self.most_values = SMALL / flops * config.channels * config.image_size**2  # of all images of a pass
        self.met: Counter[Hashable] = Counter()
        self.recordings: dict[Hashable, Recording] = {}
        self.pool: Any = None

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor,
        base_resolution: tuple[int, int] | None = None,
        tap: int | None = None,
        r: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the network's own forward pass."""
        model = self.model()

        def compute(x: Tensor, t: Tensor, condition: Tensor, r: Tensor | None = None) -> Any:
            return type(model).forward(model, x, t, condition, base_resolution, tap, r)

        inputs = (x, t, condition) if r is None else (x, t, condition, r)
        if torch.is_grad_enabled() or tap is not None or x.numel() > self.most_values:
            return compute(*inputs)
        shapes = tuple((y.shape, y.dtype) for y in inputs)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = shapes, base_resolution, autocast, torch.is_inference_mode_enabled()
        self.met[key] += 1
        if key not in self.recordings:
            if self.met[key] < FIRST or len(self.recordings) == MOST:
                return compute(*inputs)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.recordings[key] = record(compute, inputs, self.pool)
        return self.recordings[key].replay(*inputs)


def record_small_batches(model: PatchDenoiser) -> None:
    """Have a network record its passes without gradients of small batches, and replay them.

    Raises:
        InputError: the network is not on an NVIDIA GPU.
    """
    device = model.patch_embed.weight.device
    if device.type != "cuda":
        raise InputError(f"CUDA graphs are asked for and the network is on {device.type}; they need an NVIDIA GPU")
    model.forward = RecordedForward(model)
