"""The compiled regions are two graphs, a block's and the head's, in every way to distribute and to recompute."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from pixnerd import PixNerd, frozen
from pixnerd.checkpoints import save_model
from pixnerd.distributed import leave
from pixnerd.model import ModelConfig
from pixnerd.model_source import student_config
from pixnerd.training import TrainConfig, loop, train

from ..conftest import randomised

MODEL = ModelConfig(width=16, heads=2, blocks=3, patch_size=8, image_size=16, field_width=4, field_blocks=2)
TEACHER = SimpleNamespace(name="a teacher", features=5, tokens=lambda images, grid: torch.ones(len(images), 4, 5))


@pytest.fixture
def alone_in_a_group(monkeypatch):
    """A process group of this process alone, in which models are wrapped all the same."""
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    leave()


def replicated(model, world):
    """DDP with buckets so small that every block's parameters fill several, as those of L/16 fill the usual ones."""
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.0005, gradient_as_bucket_view=True)
    wrapped.config = getattr(model, "config", None)
    return wrapped


@pytest.mark.parametrize("recompute", ["none", "head", "all"])
@pytest.mark.parametrize("way", ["one process", "DDP", "FSDP2"])
def test_two_graphs_without_breaks_or_recompilations(tmp_path, monkeypatch, request, way, recompute):
    """Four steps in two parts each; after the second one alignment ends, so the block that it read is no longer."""
    monkeypatch.setattr(frozen, "load", lambda source, device: TEACHER)
    monkeypatch.setattr(loop, "check_compiler", lambda device: None)  # its trial is a graph of its own
    if way != "one process":
        request.getfixturevalue("alone_in_a_group")
    if way == "DDP":
        monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 500)
        monkeypatch.setattr(loop, "replicate", replicated)
    compiled = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiled))
    torch._dynamo.reset()
    counters.clear()
    config = TrainConfig(
        out=str(tmp_path / "run"),
        data="synthetic",
        model=MODEL,
        steps=4,
        batch_size=4,
        accumulate=2,
        compile="on",
        precision="bfloat16",
        recompute=recompute,
        shard=way == "FSDP2",
        align="a teacher",
        align_block=2,
        align_until=2,
    )
    assert len([record.loss for record in train(config, torch.device("cpu"))]) == 4
    assert (compiled.frame_count, counters["stats"]["unique_graphs"]) == (2, 2)
    assert not counters["graph_break"]


@pytest.mark.parametrize("distil", ["shortcut", "meanflow"])
def test_students_are_distilled_with_compiled_networks(tmp_path, monkeypatch, distil):
    """The teacher's velocities come from compiled code, and the derivative along its path from plain code."""
    monkeypatch.setattr(loop, "check_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    save_model(randomised(PixNerd(MODEL, 10)), tmp_path / "teacher.safetensors")
    losses = {}
    for compiled in ("on", "off"):
        config = student_config(
            str(tmp_path / "teacher.safetensors"),
            out=str(tmp_path / compiled),
            data="synthetic",
            model=MODEL,
            distil=distil,
            steps=2,
            batch_size=16,
            compile=compiled,
            precision="float32",
        )
        losses[compiled] = [float(record.loss) for record in train(config, torch.device("cpu"))]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4)
