"""Arithmetic and traffic of operators, counted while they run, and the time below which they cannot come."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# what only makes room moves nothing
NOTHING_MOVED = {aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.detach}
NOTHING_MOVED |= {aten.new_empty, aten.new_empty_strided}
# what these are given first they do not read: the room for their result, or a tensor of the same shape
OVERWRITING = {
    aten.copy_,
    aten.fill_,
    aten.zero_,
    aten.normal_,
    aten.uniform_,
    aten._foreach_zero_,
    aten._foreach_copy_,
}
OVERWRITING |= {aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like}
OVERWRITING |= {aten.new_zeros, aten.new_ones, aten.new_full}


class Roofs(NamedTuple):
    """What a device can do at best, measured."""

    matmul: float
    """FLOP/s of a large matrix product in the precision of the network"""
    copy: float
    """bytes per second, read and written"""


class Counts(NamedTuple):
    """What some operators compute and move."""

    flops: int
    """of matrix products and attention, two for each multiply-add"""
    bytes: int
    """that every operator by itself reads and writes, as if no cache kept anything from one to the next"""
    bound_seconds: float
    """the least time on a device with these roofs: for each operator the later of arithmetic and traffic"""


class OperatorCounter(TorchDispatchMode):
    """Counts FLOPs and bytes of every eager operator that runs inside, the backward pass and the optimiser included.

    Operators that only look at a tensor differently, such as transpose, or only make room for one, move nothing.
    """

    def __init__(self, roofs: Roofs):
        super().__init__()
        self.roofs, self.flops, self.bytes, self.bound_seconds = roofs, 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func.overloadpacket in NOTHING_MOVED:
            return result
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        moved = sum(map(_nbytes, [*_read(func, args, kwargs), *_written(func, args, kwargs, result)]))
        self.flops, self.bytes = self.flops + flops, self.bytes + moved
        self.bound_seconds += max(flops / self.roofs.matmul, moved / self.roofs.copy)
        return result

    @property
    def counts(self) -> Counts:
        return Counts(self.flops, self.bytes, self.bound_seconds)


def _read(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors whose values an operator reads: its arguments, without those that it only overwrites."""
    only_written = {argument.name for argument in func._schema.arguments if argument.is_out}
    given = args[1:] if func.overloadpacket in OVERWRITING else args
    return _tensors((given, {name: value for name, value in kwargs.items() if name not in only_written}))


def _written(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> list[Tensor]:
    """The tensors that an operator writes: new ones, and the arguments that it changes."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    inside = _tensors([named[name] for name in changed if name in named])
    known = {id(tensor) for tensor in inside}
    return inside + [tensor for tensor in _tensors(result) if id(tensor) not in known]


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's values; what is repeated by `expand` counts once."""
    values = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        values *= size if stride else 1
    return values * tensor.element_size() if tensor.numel() else 0


def count_operators(action: Callable[[], object], roofs: Roofs) -> Counts:
    """What an action's eager operators compute and move."""
    with OperatorCounter(roofs) as counter:
        action()
    return counter.counts


def profile_operators(action: Callable[[], object], steps: int = 3) -> list[dict[str, Any]]:
    """Where the time of an action goes, operator by operator, the longest first, without what each of them calls.

    Name, calls and seconds a step, and the share of the whole.
    """
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            action()
    found = [
        (event.key, event.count, event.self_device_time_total if cuda else event.self_cpu_time_total)
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CPU  # kernels have rows of their own beside their operators'
    ]
    whole = sum(time for _, _, time in found) or 1
    rows = [
        {"operator": name, "calls": calls / steps, "seconds": time / steps / 1e6, "share": time / whole}
        for name, calls, time in found
    ]
    return sorted(rows, key=lambda row: -row["seconds"])
