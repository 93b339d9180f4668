"""Everything that runs on a GPU, on a fake one: shapes, precisions and devices fit, and nothing waits for a value."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pixnerd import PixNerd, flow, frozen, randomness, sampling
from pixnerd.conditions import Labels
from pixnerd.config import SamplingConfig
from pixnerd.data import to_uint8
from pixnerd.distributed import World
from pixnerd.layers import RMSNorm
from pixnerd.metrics import statistics
from pixnerd.model import ModelConfig
from pixnerd.randomness import Purpose
from pixnerd.runs import Run
from pixnerd.solvers import SOLVERS, STUDENT_SOLVER
from pixnerd.text import TEXT_SIZES, TextPixNerd
from pixnerd.training import TrainConfig, batches, loop, losses

from .fake_gpu import CUDA, Operators, backward, fake_gpu

MODEL = ModelConfig(width=64, heads=2, blocks=2, patch_size=16, image_size=64, field_width=16, field_blocks=2)
TEXT = TEXT_SIZES["text-nano/8"]
BF16 = torch.bfloat16


def class_model(recompute="head", **changes):
    with CUDA:
        return PixNerd(dataclasses.replace(MODEL, **changes), 10, recompute).train()


def text_model(recompute="head"):
    with CUDA:
        return TextPixNerd(TEXT, recompute).train()


def fused_model(recompute="head"):
    pytest.importorskip("triton")
    with CUDA:
        return PixNerd(MODEL, 10, recompute, "fused").train()


def batch_for(model, size=None, images=2):
    """image, condition, noise and t."""
    size = size or model.config.image_size
    with CUDA:
        image = torch.empty(images, model.config.channels, size, size)
        return image, model.example_condition(images), torch.empty_like(image), torch.empty(images)


def check_gradients(loss, *networks):
    """Every weight that is trained has a gradient of its own shape, in float32."""
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "cuda")
    gradients = backward(loss)
    for weight in (weight for network in networks for weight in network.parameters()):
        assert (gradients[weight].shape, gradients[weight].dtype) == (weight.shape, torch.float32)


@pytest.mark.parametrize("recompute", ["none", "head", "all"])
@pytest.mark.parametrize("make", [class_model, text_model, fused_model])
def test_losses_and_gradients(make, recompute):
    with fake_gpu():
        model = make(recompute)
        found = flow.loss(model, *batch_for(model), tap=1)
        assert found.tokens.dtype == BF16
        assert (found.clean.shape, found.clean.dtype) == ((2, 3, *(model.config.image_size,) * 2), torch.float32)
        check_gradients(found.mean + found.tokens.float().mean(), model)


@pytest.mark.parametrize(
    "changes", [{"prediction": "x"}, {"head": "linear"}, {"encoding": "none"}, {"encoding": "sincos"}], ids=str
)
def test_the_ablations_switches(changes):
    with fake_gpu():
        model = class_model(**changes)
        check_gradients(flow.loss(model, *batch_for(model)).mean, model)


def test_sizes_above_the_base_resolution():
    with fake_gpu():
        model = class_model()
        check_gradients(flow.loss(model, *batch_for(model, size=128), (64, 64)).mean, model)


@pytest.mark.parametrize(("dtype", "precision"), [(BF16, BF16), (torch.float32, torch.float32)])
def test_norms_run_in_the_networks_precision(dtype, precision):
    """Also where the backward pass runs them again."""
    seen = []
    with fake_gpu(dtype):
        model = class_model("all")
        for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
            norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
        backward(flow.loss(model, *batch_for(model)).mean)
    assert len(seen) == 2 * (2 * 4 + 2 + 1)  # four in each block, one in each of the field's, one before the output
    assert set(seen) == {(precision, precision)}


def test_every_product_of_a_block_has_rows_of_whole_16_bytes():
    """Width 80 gives 213 hidden numbers, which alone would not."""
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.extend(x.shape for x in args if x.ndim == 2 and x.dtype == BF16)
            return func(*args, **(kwargs or {}))

    with fake_gpu(), Products():
        model = class_model(width=80, blocks=1)
        backward(flow.loss(model, *batch_for(model)).mean)
    assert model.blocks[0].mlp.out.in_features == 213
    assert sum(216 in shape for shape in seen) >= 4  # W₂ and its input, forward and backward
    assert not [shape for shape in seen if 213 in shape or 426 in shape]


# --- loss terms and their networks ------------------------------------------------------------------------------------


@pytest.fixture
def dinov2(tmp_path):
    """A DINOv2 of random weights in a folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    return frozen.load(str(tmp_path / "dinov2"))


@pytest.fixture
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    return frozen.load("efficientnet")


def test_frequency_weighted_loss():
    with fake_gpu():
        model = class_model()
        config = TrainConfig(model=MODEL, frequency_quality=85)
        measured = flow.loss(model, *batch_for(model), measure=losses.velocity_measure(config))
        check_gradients(measured.mean, model)


def test_perceptual_loss(monkeypatch, efficientnet):
    monkeypatch.setattr(frozen, "load", lambda source, device: efficientnet.to(device))
    config = TrainConfig(model=MODEL, perceptual="efficientnet")
    with fake_gpu():
        model = class_model()
        [term] = losses.loss_terms(config, World(0, 1, CUDA))
        image, condition, noise, t = batch_for(model)
        found = flow.loss(model, image, condition, noise, t)
        value = term.value(found, SimpleNamespace(image=image, t=t))
        assert (value.shape, value.dtype) == ((), torch.float32)
        check_gradients(found.mean + value, model)


def test_a_teachers_tokens_are_kept_in_main_memory():
    with fake_gpu():
        cached = losses.CachedTokens(lambda images, grid: images.new_empty(len(images), 4, 8))
        with CUDA:
            images = torch.empty(3, 3, 32, 32)
        for _ in range(2):
            found = cached(images, (2, 2), "aba")
            assert (found.shape, found.dtype, found.device.type) == ((3, 4, 8), torch.float32, "cuda")
        assert [(kept.device.type, kept.dtype) for kept in cached._memory.values()] == [("cpu", BF16)] * 2


@pytest.mark.parametrize("teacher", ["dinov2", "efficientnet"])
def test_alignment_with_a_teacher(monkeypatch, request, teacher):
    network = request.getfixturevalue(teacher)
    monkeypatch.setattr(frozen, "load", lambda source, device: network.to(device))
    config = TrainConfig(model=MODEL, align=teacher, align_block=2)
    with fake_gpu():
        model = class_model()
        [term] = losses.loss_terms(config, World(0, 1, CUDA))
        image, condition, noise, t = batch_for(model)
        found = flow.loss(model, image, condition, noise, t, tap=term.tap)
        target = network.tokens(image, (4, 4))
        assert (target.shape, target.dtype, target.device.type) == ((2, 16, network.features), torch.float32, "cuda")
        value = term.value(found, SimpleNamespace(image=image))
        check_gradients(found.mean + value, model, term.trained)


def test_random_draws_are_made_on_the_gpu():
    with fake_gpu():
        with CUDA:
            positions = torch.arange(3)
        drawn = randomness.normal(randomness.random_bits(0, Purpose.TRAINING_STEP, 1, 0, positions, count=6))
        assert (drawn.shape, drawn.dtype, drawn.device.type) == ((3, 6), torch.float32, "cuda")


def test_statistics_are_computed_on_the_gpu():
    with fake_gpu():
        moments = statistics.Moments(4, CUDA)
        with CUDA:
            features = torch.empty(8, 4)
        moments.add(features)
        found = moments.mean, moments.covariance, statistics.neighbour_distance(features, half=False)
        assert [(f.shape, f.device.type) for f in found] == [((4,), "cuda"), ((4, 4), "cuda"), ((8,), "cuda")]


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers(monkeypatch, solver):
    monkeypatch.setattr("pixnerd.model.check_labels", lambda *_: None)  # it reads values, before sampling begins
    student = solver == STUDENT_SOLVER
    config = SamplingConfig(steps=3, solver=solver, guidance=1.0 if student else 2.0, interval=(0.1, 0.9))
    with fake_gpu():
        model = class_model().eval()
        model.config = dataclasses.replace(model.config, student=student)
        states = list(sampling.trajectory(model, [0, 10], config))
        assert [state.step for state in states] == [1, 2, 3]
        for state in states:
            assert (state.x.shape, state.x.dtype, state.x.device.type) == ((2, 3, 64, 64), torch.float32, "cuda")
        assert to_uint8(states[-1].x).dtype == torch.uint8


def test_sampling_from_text():
    with fake_gpu():
        model = text_model().eval()
        text = torch.empty(2, TEXT.text_length, TEXT.text_features)
        image = sampling.sample(model, text, unconditional=text[0], steps=2, size=(48, 48), base_resolution=(32, 32))
        assert (image.shape, image.device.type) == ((2, 3, 48, 48), "cuda")


# --- a whole training step --------------------------------------------------------------------------------------------


def accumulate(loss):
    for weight, gradient in backward(loss).items():
        weight.grad = gradient if weight.grad is None else weight.grad + gradient


@pytest.mark.parametrize("align", [False, True], ids=["plain", "aligned"])
def test_a_step_never_waits_for_the_gpu_and_has_few_operators(monkeypatch, request, align):
    """Reading a value of a fake tensor raises; copies from the CPU are a batch's pixels, labels and indices alone."""
    config = TrainConfig(model=MODEL, batch_size=4, noise="philox", horizontal_flip=True, clip=1.0, decode_sizes=())
    if align:
        network = request.getfixturevalue("dinov2")
        monkeypatch.setattr(frozen, "load", lambda source, device: network.to(device))
        config = dataclasses.replace(config, align="a teacher", align_block=2)
    monkeypatch.setattr(torch.Tensor, "backward", accumulate)
    world, conditions = World(0, 1, CUDA), Labels(10)
    with fake_gpu():
        pixels, labels = torch.empty(4, 3, 64, 64, dtype=torch.uint8), torch.empty(4, dtype=torch.long)
        one = batches.LoadedImages(pixels, labels, labels.clone(), tokens=None)
        monkeypatch.setattr(batches, "DataLoader", lambda *_, **__: [one, one])
        run = Run("a folder that is not there")
        job = loop.Job(
            config,
            run,
            {64: [None] * 9},
            conditions,
            losses.VelocityLoss(config),
            losses.loss_terms(config, world),
            world,
        )
        state = loop.build_state(job, None)
        steps = batches.step_batches(config, job.datasets, conditions, 0, world)
        for _ in range(2):  # the first step makes the tables and AdamW's moments
            with Operators() as operators:
                loss = loop.compute_gradients(job, state, next(steps))
                loop.update_weights(job, state)
        assert loss.device.type == "cuda"
    assert operators.copies == 3 * ["aten._to_copy.default"]
    assert operators.waits == 0
    assert operators.counts.total() < (1220 if align else 1050)  # 1158 and 994 with torch 2.15


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_checks_for_a_real_gpu_say_that_they_need_one(tmp_path):
    command = [sys.executable, "-m", "tests.measure.gpu_checks"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "These checks need a GPU, and torch finds none here.\n"


def test_what_inductor_makes_of_a_layer_is_counted():
    """x [M, K] in float32 and in bfloat16 and a weight [N, K]: three products, their bytes and time, what is kept."""
    from .measure import compiled_step

    compiled_step.read_patterns()
    M, K, N = 512, 256, 128

    def layer(x, weight):
        return nn.functional.silu(nn.functional.linear(x, weight))

    def count(M, K, N, dtype):
        return compiled_step.forward_and_backward(layer, [torch.empty(M, K, dtype=dtype), torch.empty(N, K)], 1)

    with fake_gpu(), CUDA:
        found, cast, large = count(M, K, N, torch.float32), count(M, K, N, BF16), count(4096, 4096, 4096, BF16)
    assert found.flops == cast.flops == 3 * 2 * M * K * N
    assert 5 <= found.kernels <= 9  # three products, SiLU both ways, and the casts to bfloat16 and back
    products = 2 * 3 * (M * K + K * N + M * N)
    casts = (4 + 2) * (M * K + K * N)  # to bfloat16, and the gradients to float32
    assert products + 2 * casts <= found.bytes <= 2 * (products + 2 * casts)
    assert found.saved == cast.saved == 2 * (M * K + M * N)  # x and the product; of the given x itself, too
    assert found.copies == cast.copies == 2 * K * N
    assert found.bytes > cast.bytes
    assert found.seconds == pytest.approx([found.bytes / rate for rate in compiled_step.RATES.values()])
    assert large.seconds[0] > large.flops / compiled_step.MATMUL > large.bytes / 2 / compiled_step.RATES["H100"]
    assert (found * 3).kernels == 3 * found.kernels


def test_the_fused_head_moves_less_once_compiled():
    pytest.importorskip("triton")
    from .measure import compiled_step

    compiled_step.read_patterns()
    with fake_gpu(), CUDA:
        model = PixNerd(MODEL, 10, "none")
        torch_kept, torch_again, fused = (
            compiled_step.package_head(model, kernel, again)
            for kernel, again in (("torch", "none"), ("torch", "head"), ("fused", "none"))
        )
        plain = compiled_step.plain_head(model)
    assert fused.bytes < torch_kept.bytes < min(plain.bytes, torch_again.bytes)
    assert torch_again.saved < fused.saved < torch_kept.saved < plain.saved
    assert torch_kept.flops < torch_again.flops
    assert torch_kept.flops < fused.flops
    assert fused.kernels < torch_kept.kernels < torch_again.kernels
