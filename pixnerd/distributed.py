"""One training run on many devices: which process this is, how models are replicated or sharded, what is exchanged.

torchrun starts one process per device (on one machine or many) and tells each its rank. A process that was not started
by torchrun is on its own, and then everything here is free.
"""

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a program, seen from one of them."""

    rank: int
    """number of this process, 0 … size − 1"""
    size: int
    """number of processes"""
    device: torch.device
    """device of this process"""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes logs and checkpoints."""
        return self.rank == 0

    def positions(self, batch_size: int) -> range:
        """This process's share of the positions 0 … batch_size − 1 in the global batch."""
        each = batch_size // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes, on every process."""
        return self.sum(value) / self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on every process."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """The values [n] of all processes, concatenated by rank: [size · n]."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.count(int(flag)) > 0

    def count(self, number: int) -> int:
        """The sum of a whole number over all processes. Communicated between CPUs, so no accelerator has to wait."""
        if self.size == 1:
            return number
        total = torch.tensor(number)
        dist.all_reduce(total)
        return int(total)

    def leader_first(self, work: Callable[[], T]) -> T:
        """`work()` in the leading process and then, unless it raised, in the others: they find what it cached.

        Raises:
            InputError: in every process but the leading one, if it raised anything there.
        """
        if self.size == 1:
            return work()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            task = pool.submit(work) if self.leads else None
            # many short waits, since a long one would exceed the limit of half an hour for a message
            while not self.any(task is not None and bool(concurrent.futures.wait([task], timeout=1).done)):
                pass
        if self.any(task is not None and task.exception() is not None):
            if task is None:
                raise InputError("the leading process has refused the input, see its message")
            raise task.exception()
        return task.result() if task is not None else work()

    def from_leader(self, value: T) -> T:
        """The leading process's value, on every process. Communicated between CPUs."""
        if self.size == 1:
            return value
        values = [value if self.leads else None]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """If the block raises an InputError in any process, raise one with the same sentence in all of them.

        Without it, the others would wait for ever for the process that gave up. The sentence is that of the lowest
        rank. Every process has to enter the block, and nothing in it may wait for another process after an error.
        """
        refusal: InputError | None = None
        try:
            yield
        except InputError as error:
            refusal = error
        refusals: list[InputError | None] = [refusal]
        if self.size > 1 and self.any(refusal is not None):
            refusals = [None] * self.size
            dist.all_gather_object(refusals, refusal)
        first = next((error for error in refusals if error is not None), None)
        if first is not None:
            first.shared = True
            raise first


ALONE = World(0, 1, torch.device("cpu"))  # reads a file without waiting for other processes


def default_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def capability(device: torch.device) -> int:
    """The major compute capability of an NVIDIA GPU, 9 for an H100; 0 for another device."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def join(device: torch.device | None = None) -> World:
    """This process's world: the one described by torchrun's environment, or a world of one process.

    `device` defaults to the process's own GPU, if there is one.

    Raises:
        InputError: the environment describes only a part of a world, or more processes than this machine has GPUs.
    """
    if "RANK" not in os.environ:
        device = device or default_device()
        _use(device)
        return World(0, 1, device)
    _check_environment()
    if device is None and torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(f"this is process {local} of this machine, which has {gpus} GPUs: 0 … {gpus - 1} may run")
        device = torch.device("cuda", local)
    device = device or default_device()
    _use(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), device)


def _use(device: torch.device) -> None:
    """Make a GPU that is named by its number the current one, on which kernels of Triton run."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _check_environment() -> None:
    """Raise InputError unless the environment has what torchrun sets."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(
            f"the environment has RANK={os.environ['RANK']} but no {', no '.join(missing)}: "
            "start the processes with torchrun, or unset RANK to use this one alone"
        )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise InputError(f"the environment has {name}={os.environ[name]!r}; it has to be a whole number")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise InputError(f"the environment has RANK={rank} and WORLD_SIZE={size}; ranks are 0 … WORLD_SIZE − 1")


def leave() -> None:
    """Shut down communication with the other processes, at the end of a program."""
    if dist.is_initialized():
        sharding_mesh.cache_clear()
        dist.destroy_process_group()


def check_sharding() -> None:
    """Raise InputError unless there are processes to share a model."""
    if not dist.is_initialized():
        raise InputError("shard is on, but this process is alone: start it with torchrun")


def shard(model: nn.Module, world: World, bf16: bool) -> None:
    """FSDP2: every process keeps a part of each weight, of its gradient and of its optimiser state.

    A block's weights are gathered while it computes and freed afterwards, so memory per process shrinks with the number
    of processes. Source: Zhao et al. 2304.11277. With `bf16` weights are gathered in bfloat16, half the traffic, and
    gradients are summed in float32; what a process keeps is float32. Inputs are left to autocast, which casts those of
    matrix products alone: times and positions need float32.
    """
    check_sharding()
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    mesh = sharding_mesh(world.device.type, world.size)
    for block in (*getattr(model, "blocks", ()), *getattr(model, "text_blocks", ())):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@functools.lru_cache(maxsize=1)  # every mesh has communicators of its own
def sharding_mesh(device_type: str, processes: int) -> "DeviceMesh":
    """The processes among which weights are sharded: within each node if there are several, else all of them.

    Several nodes hold the same shards and average their gradients (HSDP), so that weights travel within a node alone.
    Nodes of different sizes, or of one process each, are treated as one.
    """
    from torch.distributed.device_mesh import init_device_mesh

    sizes: list[int] = [0] * processes
    dist.all_gather_object(sizes, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    node = sizes[0]
    if set(sizes) != {node} or not 1 < node < processes or processes % node:
        return init_device_mesh(device_type, (processes,))
    return init_device_mesh(device_type, (processes // node, node), mesh_dim_names=("nodes", "processes"))


def is_sharded(model: nn.Module) -> bool:
    """Whether every process holds only a part of each weight."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, or its shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # only a DTensor has it


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from its shards; every process has to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def replicate(model: nn.Module, world: World) -> nn.Module:
    """DDP: every process keeps a full copy of the model; gradients are averaged during the backward pass."""
    if world.size == 1 or is_sharded(model):
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    wrapped.config = getattr(model, "config", None)
    return wrapped


def bare(model: nn.Module) -> nn.Module:
    """The model itself, without the wrapper that `replicate` adds."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def exchange_gradients(model: nn.Module, exchange: bool) -> None:
    """Set whether the next backward pass exchanges gradients: only the last one of a step has to."""
    if is_sharded(model):
        model.set_requires_gradient_sync(exchange)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = exchange  # as DDP's context manager no_sync does
