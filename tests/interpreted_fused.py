"""The fused kernels' numbers, computed by Triton's interpreter; tests/test_fused.py runs this in a process of its own.

TRITON_INTERPRET=1 has to be set before Triton is imported: TRITON_INTERPRET=1 pytest tests/interpreted_fused.py
"""

import pytest
import torch
import triton.language as tl
from torch.nn import functional as F
from triton.runtime.interpreter import InterpreterBuilder

from pixnerd import fields, fused
from pixnerd.fields import FieldBlock, NeuralFieldHead

from .conftest import randomised

SHAPES = {  # patches, pixels, width, ratio
    "powers of two": (2, 64, 16, 2),
    "odd pixels, two tiles": (2, 69, 8, 4),
    "odd width": (3, 21, 5, 3),
    "one pixel, ratio 1": (2, 1, 24, 1),
}
NORMS = "none", "fc1", "fc1+fc2"


def block_and_inputs(shape, weight_norm, dtype=torch.float32):
    M, K, W, ratio = shape
    generator = torch.Generator().manual_seed(3)
    block = randomised(FieldBlock(10, W, ratio, weight_norm)).to(dtype)
    h, upstream = torch.randn(2, M, K, W, generator=generator).to(dtype)
    weights = torch.randn(M, 2 * W * ratio * W, generator=generator).to(dtype)
    return block, h.requires_grad_(), weights.requires_grad_(), upstream


def values_and_gradients(compute, gain, h, weights, upstream):
    out = compute(h, weights)
    return out, *torch.autograd.grad(out, (h, weights, gain), upstream.to(out.dtype))


def both(shape, weight_norm, change=lambda h, weights: None):
    """What the kernels give in float32 and what the operators of torch give in float64."""
    block, h, weights, upstream = block_and_inputs(shape, weight_norm)
    with torch.no_grad():
        change(h, weights)
    block.kernel = "fused"
    found = values_and_gradients(block.field, block.norm.weight, h, weights, upstream)
    block = block.double()
    block.kernel = "torch"
    exact = [x.detach().double().requires_grad_() for x in (h, weights)]
    return found, values_and_gradients(block.field, block.norm.weight, *exact, upstream)


@pytest.mark.parametrize("weight_norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients_are_those_of_torch(shape, weight_norm):
    found, exact = both(shape, weight_norm)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        scale = other.abs().max()  # products of W numbers around 1, so float32's rounding is that of the largest
        torch.testing.assert_close(one.double() / scale, other / scale, atol=2e-6, rtol=0)
        assert scale > 0.1


@pytest.mark.parametrize("weight_norm", NORMS)
def test_values_are_those_of_torch_in_float32(weight_norm):
    block, h, weights, _ = block_and_inputs((2, 16, 8, 2), weight_norm)
    expected = block.field(h, weights)
    block.kernel = "fused"
    torch.testing.assert_close(block.field(h, weights), expected, atol=2e-6, rtol=2e-6)


def test_columns_too_short_to_scale_have_the_gradient_of_torch():
    def shorten(h, weights):
        fc1, fc2 = (part.unflatten(1, (8, -1)) for part in (weights[:, :128], weights[:, 128:]))
        fc1[:, :, 3] = 0
        fc1[:, :, 5] *= 1e-14
        fc2.reshape(-1, 16, 8)[:, :, 2] = 0

    found, exact = both((2, 16, 8, 2), "fc1+fc2", shorten)
    for one, other in zip(found, exact, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one.double() / other.abs().max(), other / other.abs().max(), atol=2e-6, rtol=0)
    assert exact[2].abs().max() > 1e8  # the gradient of a column of zeros


@pytest.fixture
def products_of_bfloat16(monkeypatch):
    """As a GPU has them; the interpreter would multiply the bits of bfloat16 as whole numbers."""
    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return plain(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("products_of_bfloat16")
def test_under_autocast_its_error_is_that_of_bfloat16():
    """The interpreter cuts numbers off where a GPU rounds them, which errs twice as much."""
    errors = {}
    for kernel in ("torch", "fused"):
        torch.manual_seed(0)
        block = randomised(FieldBlock(10, 16, 2, "fc1+fc2", kernel))
        h, s = torch.randn(4, 32, 16), torch.randn(4, 10)
        with torch.autocast("cpu", torch.bfloat16):
            h = F.linear(h, torch.eye(16))
            out = block(h, s)
            weights = block.generate(s)
        assert (out.dtype, weights.dtype) == (torch.bfloat16, torch.bfloat16)
        out.float().square().sum().backward()
        assert block.generator.weight.grad.dtype == torch.float32
        block.kernel = "torch"
        exact = block.double().field(h.double(), weights.double())
        errors[kernel] = (out - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert errors["fused"] < 2 * errors["torch"] < 0.01


def test_the_operator_is_one_that_torch_can_trace():
    block, h, weights, _ = block_and_inputs((2, 16, 8, 2), "fc1")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused._field_block, (h, weights, block.norm.weight, "fc1"), test_utils=checks)


def test_compiled_without_a_break():
    block, h, weights, upstream = block_and_inputs((2, 16, 8, 2), "fc1+fc2")
    block.kernel = "fused"
    expected = values_and_gradients(block.field, block.norm.weight, h, weights, upstream)
    compiled = torch.compile(block.field, backend="aot_eager", fullgraph=True)
    found = values_and_gradients(compiled, block.norm.weight, h, weights, upstream)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("field_pixels", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_head_with_the_kernel_is_the_head(monkeypatch, recompute, field_pixels):
    """Also where pieces are computed again, and where the first block's input is one tensor that patches share."""
    monkeypatch.setattr(fields, "PATCHES_PER_PIECE", 3)
    found = {}
    for kernel in ("torch", "fused"):
        head = randomised(NeuralFieldHead(10, 3, 8, field_pixels=field_pixels, kernel=kernel))
        pixels, s = torch.randn(2, 6, 16, 10, generator=torch.Generator().manual_seed(1))
        s = s[:, 0].clone().requires_grad_()
        out = head(pixels[..., :3], s, (4, 4), recompute)
        found[kernel] = [out, *torch.autograd.grad(out.square().sum(), [s, *head.parameters()])]
    for one, other in zip(*found.values(), strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one / scale, other / scale, atol=1e-5, rtol=0)


def test_results_repeat_with_every_configuration(monkeypatch):
    """The list that a GPU chooses from: a tile of any size gives the same, but for the order of sums."""
    block, h, weights, upstream = block_and_inputs((1, 69, 8, 2), "fc1+fc2")
    block.kernel = "fused"
    results = []
    for forward, backward in zip(fused.FORWARD, fused.BACKWARD, strict=True):
        monkeypatch.setattr(fused.forward_kernel, "configs", [forward])
        monkeypatch.setattr(fused.backward_kernel, "configs", [backward])
        results.append(values_and_gradients(block.field, block.norm.weight, h, weights, upstream))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)
