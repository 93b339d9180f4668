"""A GPU that only knows shapes, precisions and devices: enough to run a training step without one."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pixnerd.cost import FusedAttention, forget_tables
from pixnerd.frozen import preprocess
from pixnerd.randomness import _normal_table
from pixnerd.training import losses

CUDA = torch.device("cuda")


@contextlib.contextmanager
def fake_gpu(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Tensors are fake and on "cuda", under autocast to `dtype`. Reading a value of one raises, as do mixed devices."""
    tables = losses._constants, preprocess.constants, _normal_table

    def forget():
        forget_tables()
        for table in tables:
            table.cache_clear()

    forget()
    try:
        with (
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
            mock.patch("torch.cuda.is_bf16_supported", return_value=True),
            mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)),
            mock.patch.object(nn.Module, "to", moved),
            FakeTensorMode(allow_non_fake_inputs=True),
            FusedAttention(),
            torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            yield
    finally:
        forget()


def moved(network: nn.Module, device: torch.device) -> nn.Module:
    """nn.Module.to for fake weights, which cannot be moved in place."""
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.detach().to(device), weight.requires_grad))
        for name, values in module.named_buffers(recurse=False):
            setattr(module, name, values.to(device))
    return network


class Operators(TorchDispatchMode):
    """Counts operators that compute, by name; notes copies between devices, and counts those that the CPU waits for."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.copies: list[str] = []
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view:
            self.counts[str(func)] += 1
        tensors = [x for x in (*args, *(kwargs or {}).values(), result) if isinstance(x, Tensor)]
        if len({tensor.device.type for tensor in tensors if tensor.ndim}) > 1:
            self.copies.append(str(func))
            self.waits += not (kwargs or {}).get("non_blocking", False)
        return result


def backward(loss: Tensor, gradient: Tensor | None = None) -> dict[Tensor, Tensor]:
    """The gradient of every leaf: autograd's own engine asks the GPU for a context, so its nodes are called here.

    `gradient` is that of the loss itself, by default ones.

    Like the engine it requires the device of what a gradient belongs to, sums over axes that were broadcast, and casts.
    """
    order, seen, stack = [], set(), [(loss.grad_fn, False)]
    while stack:  # depth first: a node comes after everything that it hands gradients to
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(parent, False) for parent, _ in node.next_functions if parent is not None]
    waiting = {node: [None] * len(node._input_metadata) for node in order}
    waiting[loss.grad_fn][loss.output_nr] = torch.ones_like(loss) if gradient is None else gradient
    leaves = {}
    for node in reversed(order):
        gradients = waiting.pop(node)
        for number, (gradient, expected) in enumerate(zip(gradients, node._input_metadata, strict=True)):
            if gradient is not None:
                assert gradient.device == expected.device, (node.name(), gradient.device)
                gradients[number] = gradient.sum_to_size(expected.shape).to(expected.dtype)
        if hasattr(node, "variable"):
            leaves[node.variable] = gradients[0]
            continue
        # one identity for the whole pass, so that a checkpoint recomputes once
        with torch.no_grad(), mock.patch("torch._C._current_graph_task_id", return_value=0):
            results = node(*gradients) if callable(node) else node.apply(*gradients)  # the package's own operators
        results = results if isinstance(results, tuple) else (results,)
        results = results[: len(node.next_functions)]  # arguments of own operators that are no tensors come last
        for (parent, number), gradient in zip(node.next_functions, results, strict=True):
            if parent is not None and gradient is not None:
                before = waiting[parent][number]
                waiting[parent][number] = gradient if before is None else before + gradient
    return leaves
