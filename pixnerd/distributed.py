"""One training run on many devices: which process this is, how a model is replicated or sharded, what all agree on.

torchrun starts one process for each device (of one machine or of many) and tells each its rank. A process that it did
not start is alone, and then nothing here costs anything.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError


@dataclass(frozen=True)
class World:
    """The processes of a program, seen from one of them."""

    rank: int
    """this process, 0 … size − 1"""
    size: int
    """how many there are"""
    device: torch.device
    """where this one computes"""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes logs and checkpoints."""
        return self.rank == 0

    def positions(self, batch_size: int) -> range:
        """This process's part of the global batch's positions 0 … batch_size − 1."""
        each = batch_size // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of every process's value, the same tensor shape, on every process."""
        return self.sum(value) / self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of every process's value, the same tensor shape, on every process."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """Every process's values [n], one after the other, [size · n]."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. Communicated over the CPU, so that no accelerator has to wait."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes)
        return bool(votes)

    def wait(self) -> None:
        """Return once every process has called this."""
        if self.size > 1:
            self.any(False)


def default_device() -> torch.device:
    """A GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def join(device: torch.device | None = None) -> World:
    """This process's world: what torchrun's environment says, or a world of its own.

    `device` is by default the process's GPU when there is one.
    """
    if "RANK" not in os.environ:
        return World(0, 1, device or default_device())
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    device = device or default_device()
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), device)


def leave() -> None:
    """Shut down communication with the other processes, at the end of a program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, world: World) -> None:
    """FSDP2: every process keeps a part of each weight, of its gradient and of the optimiser's state.

    A block's weights are gathered when it computes and let go after, so the memory for them shrinks with the number of
    processes. Source: Zhao et al. 2304.11277.
    """
    if not dist.is_initialized():
        raise InputError("shard is on, but this process is alone: start it with torchrun")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in (*getattr(model, "blocks", ()), *getattr(model, "text_blocks", ())):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether every process holds only a part of each weight."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # which a DTensor has


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor in full, its shards gathered; every process calls it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def replicate(model: nn.Module, world: World) -> nn.Module:
    """DDP: every process keeps the whole model, and gradients are averaged while the backward pass runs."""
    if world.size == 1 or is_sharded(model):
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    wrapped.config = getattr(model, "config", None)
    return wrapped


def bare(model: nn.Module) -> nn.Module:
    """The model itself, without what `replicate` put around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def exchange_gradients(model: nn.Module, exchange: bool) -> None:
    """Whether the next backward pass ends with the gradients of all processes: only the last of a step has to."""
    if is_sharded(model):
        model.set_requires_gradient_sync(exchange)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = exchange  # what its context manager no_sync sets
