"""The fused field: where it is refused, what it keeps, that its kernels compile for GPUs, and its numbers."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pixnerd import SIZES, InputError, PixNerd, model_config
from pixnerd.config import STUDENT_SAMPLING, TrainConfig
from pixnerd.cost import forward_flops, saved_activation_bytes
from pixnerd.text import build_network
from pixnerd.training import train

from .conftest import TINY

triton = pytest.importorskip("triton")
CPU = torch.device("cpu")


def test_its_numbers_in_the_interpreter():
    """In another process: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_fused.py"]
    root, environment = Path(__file__).parents[1], os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "linear"}, "model.head is linear"),
        ({"field_weights": "shared"}, "model.field_weights is shared"),
        ({"field_width": 65, "field_ratio": 1}, "matrices are 65x65; .* may have 8,192 entries"),
    ],
    ids=str,
)
def test_networks_that_it_does_not_compute_are_refused(changes, said):
    model = dataclasses.replace(TINY, **changes)
    with pytest.raises(InputError, match=f"field_kernel is fused and .*{said}"):
        TrainConfig(model=model, field_kernel="fused")
    with pytest.raises(InputError, match=said):
        PixNerd(model, 5, field_kernel="fused")
    TrainConfig(model=model)  # torch computes it


def test_published_sizes_are_served():
    for model in (SIZES["L/16"], SIZES["XL/16"], SIZES["XXL/16"]):
        TrainConfig(model=model, field_kernel="fused")


def test_a_student_that_differentiates_forward_is_refused():
    with pytest.raises(InputError, match="distil=meanflow differentiates forward"):
        TrainConfig(
            distil="meanflow",
            teacher="runs/quickstart",
            field_kernel="fused",
            sampling=STUDENT_SAMPLING,
        )


def test_a_cpu_is_refused_before_the_run_begins(tmp_path):
    config = TrainConfig(out=str(tmp_path / "run"), data="synthetic", model=TINY, steps=1, field_kernel="fused")
    with pytest.raises(InputError, match="runs on a GPU alone; this run's device is cpu"):
        train(config, CPU)
    assert not (tmp_path / "run").exists()


def test_a_machine_without_triton_is_told(monkeypatch):
    monkeypatch.setattr(model_config, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="triton is not installed"):
        PixNerd(TINY, 5, field_kernel="fused")
    TrainConfig(model=TINY, field_kernel="fused")  # such a machine still reads the run of another


@pytest.mark.parametrize(
    ("changes", "capability", "kernel"),
    [
        ({}, 9, "fused"),
        ({}, 8, "torch"),
        ({}, 12, "torch"),
        ({}, 0, "torch"),
        ({"field_kernel": "torch"}, 9, "torch"),
        ({"field_kernel": "fused"}, 8, "fused"),
        ({"precision": "float32"}, 9, "torch"),
        ({"shard": True}, 9, "torch"),
        ({"compile": "off"}, 9, "torch"),
        ({"model": dataclasses.replace(TINY, head="linear")}, 9, "torch"),
        ({"distil": "meanflow", "teacher": "runs/x", "sampling": STUDENT_SAMPLING}, 9, "torch"),
    ],
)
def test_the_kernel_is_chosen_where_it_was_timed(changes, capability, kernel):
    config = dataclasses.replace(TrainConfig(data="synthetic", model=TINY), **changes)
    assert config.kernel_on(capability) == kernel


def test_without_triton_it_is_not_chosen(monkeypatch):
    monkeypatch.setattr(model_config, "find_spec", lambda name: None)
    assert TrainConfig(data="synthetic", model=TINY).kernel_on(9) == "torch"


def test_a_network_with_the_kernel_does_not_compute_its_head_in_pieces():
    with torch.device("meta"):
        networks = [build_network(TINY, 5, "head", kernel) for kernel in ("torch", "fused")]
    assert [[n.recomputes_head(how) for how in ("none", "head", "all")] for n in networks] == [
        [False, True, True],
        [False, False, True],
    ]


def test_its_arithmetic_is_counted():
    with torch.device("meta"):
        networks = [build_network(TINY, 5, "head", kernel) for kernel in ("torch", "fused")]
    one, other = (forward_flops(network, 16) for network in networks)
    assert one == other > 0


@pytest.mark.parametrize(("size", "fused", "torch_head"), [("L/16", 334.0, 302.2), ("XL/16", 459.3, 411.4)])
def test_published_sizes_keep_little_more_than_with_recomputation(size, fused, torch_head):
    """MiB per image at 256 pixels in bfloat16; with the kernel, which recomputes the head, "head" adds nothing."""
    with torch.device("meta"):
        networks = [build_network(SIZES[size], 1000, "none", kernel) for kernel in ("fused", "torch")]
    kept = [saved_activation_bytes(networks[0], 256, how) / 2**20 for how in ("none", "head")]
    kept.append(saved_activation_bytes(networks[1], 256, "head") / 2**20)
    assert kept == pytest.approx([fused, fused, torch_head], abs=0.1)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus(monkeypatch, tmp_path, capability, dtype):
    """For the published field, 64 by 128, within the shared memory that a program may have."""
    from .measure.field_traffic import compiled

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for name in ("forward", "backward"):
        kernel = compiled(name, 0, capability, dtype)
        assert kernel.metadata.shared <= 163 * 1024
        assert kernel.asm["cubin"]
