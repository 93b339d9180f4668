"""Four processes on a CPU (gloo) as two nodes of two: shards within a node, copies between nodes, in bfloat16."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pixnerd.training import train

from . import nodes_worker
from .test_distributed import tensors, torchrun

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    assert torchrun("tests.training.nodes_worker", folder, processes=4).wait() == 0
    return folder


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_nodes_hold_copies_of_shards_and_only_bfloat16_weights_travel(folder):
    assert read(folder, "seen") == {
        "placed": ["(Replicate(), Shard(dim=0)), mesh (2, 2)"],
        "held": ["0.5"],
        "gathered": ["torch.bfloat16 over 2"],
        "computing": ["torch.bfloat16"],
        "scattered": ["torch.float32 over 2"],
        "averaged": ["torch.float32 over 2"],
        "updated": ["torch.float32, gradient torch.float32"],
    }
    shards = list((folder / "straight" / "checkpoints").rglob("shards/*.safetensors"))
    stored = {tensor.dtype for path in shards for tensor in load_file(path).values()}
    assert stored == {torch.float32}


def test_stopped_and_resumed_is_the_same_run(folder):
    losses = read(folder, "losses")
    assert losses["resumed"] == losses["straight"]
    end = f"checkpoints/step-{nodes_worker.STEPS}"
    assert tensors(folder / "resumed" / end) == tensors(folder / "straight" / end)
    assert losses["straight"] == pytest.approx(losses["float32"], rel=0.01)
    assert losses["straight"] != losses["float32"]


def test_one_process_trains_and_resumes_the_same(folder, tmp_path):
    losses = read(folder, "losses")["float32"]
    alone = replace(nodes_worker.config(tmp_path, "alone", precision="float32"), shard=False)
    assert [float(record.loss) for record in train(alone, CPU)] == pytest.approx(losses, rel=1e-4)
    rest = replace(nodes_worker.config(tmp_path, "rest", precision="float32"), shard=False)
    shutil.copytree(folder / "float32", rest.out)
    shutil.rmtree(os.path.join(rest.out, "checkpoints", f"step-{nodes_worker.STEPS}"))
    assert [float(record.loss) for record in train(rest, CPU)] == pytest.approx(losses[3:], rel=1e-4)
