"""The network's linear layer where oneDNN multiplies, whatever this machine's processor would choose."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pixnerd import linear as module
from pixnerd.layers import SwiGLU
from pixnerd.linear import Linear, linear

from .conftest import randomised

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch comes without oneDNN")


class Other(torch.Tensor):
    """A kind of tensor that oneDNN's operators do not know."""


SIZES = st.sampled_from([1, 7, 40, 129, 300])


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch):
    monkeypatch.setattr(module, "BY_ONEDNN", True)


@pytest.fixture
def calls(monkeypatch):
    """The products that oneDNN computes, as (rows, columns) of the result."""
    found, multiply = [], module._onednn

    def note(x, weight, bias=None):
        found.append((len(x), len(weight)))
        return multiply(x, weight, bias)

    monkeypatch.setattr(module, "_onednn", note)
    return found


def leaves(*tensors):
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


@given(st.sampled_from([(), (1,), (50,), (300,), (3, 50), (2, 3, 129), (2, 0), (0, 300)]), SIZES, SIZES, st.booleans())
def test_values_and_gradients_are_those_of_float64(rows, K, N, has_bias):
    """Within a millionth of the sum of the terms' sizes."""
    given_ = [torch.randn(*rows, K), torch.randn(N, K), *([torch.randn(N)] if has_bias else [])]
    gradient = torch.randn(*rows, N)

    def compute(product, convert):
        inputs = leaves(*map(convert, given_))
        y = product(*inputs)
        return y, *torch.autograd.grad(y, inputs, convert(gradient))

    ours, exact = compute(linear, lambda tensor: tensor), compute(F.linear, torch.Tensor.double)
    sizes = compute(F.linear, lambda tensor: tensor.double().abs())
    for found, wanted, size in zip(ours, exact, sizes, strict=True):
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        assert ((found.double() - wanted).abs() <= 1e-6 * size).all()


def test_large_products_are_onednns_and_small_ones_are_not(calls):
    """256 rows of 200 numbers to 300: forward, the input's gradient, the weights' gradient."""
    x, weight = leaves(torch.randn(256, 200), torch.randn(300, 200))
    linear(x, weight).backward(torch.randn(256, 300))
    assert calls == [(256, 300), (256, 200), (300, 200)]
    calls.clear()
    linear(*leaves(torch.randn(31, 500), torch.randn(500, 500))).sum().backward()
    linear(*leaves(torch.randn(200, 20), torch.randn(20, 20))).sum().backward()
    assert not calls


@pytest.mark.parametrize("M", [130, 700])  # either operand of the weights' gradient is the one that is copied
def test_operands_that_are_no_plain_matrices(calls, M):
    """A slice, a transpose and an expanded gradient, each of them as large as oneDNN's products are."""
    wide, weight = torch.randn(M, 400), torch.randn(300, 200)
    for x in (wide[:, 100:300], torch.randn(200, M).t(), torch.randn(1, 200).expand(M, 200)):
        for gradient in (torch.randn(1, 300).expand(M, 300), torch.randn(300, M).t(), torch.randn(M, 400)[:, :300]):
            given_ = leaves(x, weight)
            found = torch.autograd.grad(linear(*given_), given_, gradient)
            exact = gradient.double() @ weight.double(), gradient.double().t() @ x.double()
            for ours, theirs in zip(found, exact, strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))
    assert len(calls) == 9 * 3


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_may_change_and_keeps_nothing(calls, frozen):
    """As with nn.Linear: what no gradient needs is not kept, and may change before the backward pass."""
    operands = list(leaves(torch.randn(256, 200), torch.randn(300, 200)))
    operands[frozen].requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda kept: kept
    ):
        y = linear(*operands)
    assert kept == [operands[frozen].shape]
    with torch.no_grad():
        operands[1 - frozen].add_(1)
    y.sum().backward()
    assert len(calls) == 2


def test_wrong_shapes_are_refused_in_torchs_words_and_unusual_biases_taken():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(256, 200), torch.randn(300, 201))
    x, weight = torch.randn(256, 200), torch.randn(300, 200)
    torch.testing.assert_close(linear(x, weight, torch.ones(1)), F.linear(x, weight) + 1)


def test_second_derivatives():
    """Of the squared gradients, as a penalty on them needs."""
    found = []
    x, weight, bias, gradient = torch.randn(200, 150), torch.randn(160, 150), torch.randn(160), torch.randn(200, 160)
    for compute, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        inputs = leaves(x.to(dtype), weight.to(dtype), bias.to(dtype))
        first = torch.autograd.grad(compute(*inputs).tanh(), inputs, gradient.to(dtype), create_graph=True)
        found.append(torch.autograd.grad(sum(part.square().mean() for part in first), inputs))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_elsewhere_it_is_torchs(calls, monkeypatch):
    """Under autocast, in float64 or bfloat16, with forward derivatives, vmap, other tensors, and where MKL is fast."""
    x, weight = torch.randn(256, 200), torch.randn(300, 200)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16):
        assert linear(x.to(dtype), weight.to(dtype)).dtype == dtype
    y, change = torch.func.jvp(lambda x: linear(x, weight), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(change, weight.sum(1).expand(256, 300), rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = linear(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), weight)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, change)
    both = torch.func.vmap(lambda x: linear(x, weight))(torch.stack((x, x)))
    torch.testing.assert_close(both, torch.stack((y, y)), rtol=1e-4, atol=1e-4)
    other = torch.nn.Parameter(weight).as_subclass(Other)
    assert isinstance(linear(x, other), Other)
    monkeypatch.setattr(module, "BY_ONEDNN", False)
    assert linear(x, weight).equal(F.linear(x, weight))
    assert not calls


def test_a_compiled_layer_is_one_graph_with_onednns_products(calls):
    """For any number of rows: what is large enough is decided inside of the operator, not by a guard."""
    torch._dynamo.reset()
    layer, counter = randomised(SwiGLU(200, 300)), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, dynamic=True, fullgraph=True)
    for rows in (2, 20, 40):
        x = torch.randn(rows, 5, 200)
        expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        calls.clear()
        found = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()))
        assert len(calls) == (0 if rows < 20 else 3 if rows < 40 else 5)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert counter.frame_count == 1


def test_its_arithmetic_is_counted():
    x, weight = leaves(torch.randn(256, 200), torch.randn(300, 200))
    with FlopCounterMode(display=False) as counter:
        linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 256 * 200 * 300


@pytest.mark.parametrize(
    ("processor", "capability", "expected"),
    [
        ("vendor_id\t: AuthenticAMD", "AVX512", True),
        ("vendor_id\t: AuthenticAMD", "AVX2", False),
        ("vendor_id\t: GenuineIntel", "AVX512", False),
    ],
)
@pytest.mark.parametrize("on_linux", [True, False])
def test_it_is_chosen_where_mkl_uses_half_of_the_width(processor, capability, expected, on_linux, monkeypatch):
    about = {module.Path("/proc/cpuinfo"): processor} if on_linux else {}
    monkeypatch.setattr(module.Path, "is_file", lambda path: path in about)
    monkeypatch.setattr(module.Path, "read_text", lambda path: about[path])
    monkeypatch.setattr(module.platform, "processor", lambda: "" if on_linux else processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for mkl in (True, False):
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda mkl=mkl: mkl)
        assert module.onednn_is_faster() == (expected and mkl)


def test_a_layer_has_torchs_weights():
    layer = Linear(5, 3)
    assert isinstance(layer, torch.nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
