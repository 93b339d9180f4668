import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnerd import fields, plain
from pixnerd.encodings import ENCODINGS
from pixnerd.fields import LinearHead, NeuralFieldHead, coordinate_table, unit_fan_in

from .conftest import SWITCHES, TINY, randomised

CPU = torch.device("cpu")
FIELD_SWITCHES = {name: switch for name, switch in SWITCHES.items() if switch.keys() <= {
    "field_blocks", "field_width", "field_ratio", "encoding", "weight_norm", "output_norm", "channels", "patch_size",
    "field_weights", "field_pixels"
}}  # fmt: skip


def field_head(config, condition_width=10):
    head = NeuralFieldHead(
        condition_width,
        config.channels,
        config.field_width,
        config.field_blocks,
        config.field_ratio,
        config.encoding,
        config.weight_norm,
        config.output_norm,
        config.field_weights,
        config.field_pixels,
    )
    return randomised(head).double()


def named(head):
    return {f"head.{name}": parameter for name, parameter in head.named_parameters()}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 2)])
def test_encodings_are_the_formulas(encoding, height, width):
    table = coordinate_table(encoding, height, width, torch.float64, CPU)
    expected = torch.tensor(
        [plain.encode_coordinate(encoding, k // width, k % width, height, width) for k in range(height * width)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(table, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("switch", FIELD_SWITCHES.values(), ids=FIELD_SWITCHES.keys())
@pytest.mark.parametrize("patch", [(4, 4), (2, 3)])
def test_field_equals_loops_over_pixels(switch, patch):
    config = dataclasses.replace(TINY, **switch)
    head = field_head(config)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, patch[0] * patch[1], config.channels, generator=generator, dtype=torch.float64)
    s = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    fast = head(pixels, s, patch, recompute=False)
    for m in range(3):
        slow = plain.field_of_patch(named(head), config, pixels[m], s[m], *patch)
        torch.testing.assert_close(fast[m], slow, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("pieces", [1, 4])
def test_recomputing_changes_no_gradient(pieces, monkeypatch):
    monkeypatch.setattr(fields, "PATCHES_PER_PIECE", -(-8 // pieces))
    head = field_head(TINY)
    pixels = torch.randn(8, 16, 3, dtype=torch.float64, requires_grad=True)
    s = torch.randn(8, 10, dtype=torch.float64, requires_grad=True)
    inputs = [pixels, s, *head.parameters()]
    kept = torch.autograd.grad(head(pixels, s, (4, 4), recompute=False).square().sum(), inputs)
    again = torch.autograd.grad(head(pixels, s, (4, 4), recompute=True).square().sum(), inputs)
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
        assert one.abs().sum() > 0


def saved_bytes(function):
    """Bytes of distinct tensors that autograd keeps for the backward pass of function()."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        out = function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), out


def test_recomputing_keeps_inputs_and_generated_weights_alone():
    head, (M, K, W, R) = field_head(TINY), (64, 16, 8, 16)
    pixels, s = torch.randn(M, K, 3, dtype=torch.float64), torch.randn(M, 10, dtype=torch.float64)
    kept, _ = saved_bytes(lambda: head(pixels, s, (4, 4), recompute=False))
    again, _ = saved_bytes(lambda: head(pixels, s, (4, 4), recompute=True))
    inputs = pixels.numel() + s.numel() + K * 64 + 2 * M * 2 * W * R  # two blocks
    weights = sum(block.generator.weight.numel() for block in head.blocks)
    assert 8 * inputs <= again <= 8 * (inputs + weights)
    assert again < kept / 4


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_are_generated_once_for_all_pieces(recompute, monkeypatch):
    """Also in the backward pass, which adds to each generator's gradient a single time."""
    monkeypatch.setattr(fields, "PATCHES_PER_PIECE", 2)
    head, calls = field_head(TINY), []
    for block in head.blocks:
        block.generator.register_forward_hook(lambda *_: calls.append("forward"))
        block.generator.weight.register_hook(lambda gradient: calls.append("gradient"))
    pixels, s = torch.randn(8, 16, 3, dtype=torch.float64), torch.randn(8, 10, dtype=torch.float64)
    head(pixels, s, (4, 4), recompute).sum().backward()
    assert calls == 2 * ["forward"] + 2 * ["gradient"]


def test_coordinates_are_shared_by_all_patches():
    """No tensor of size patches × pixels × 64 exists: the first Linear's coordinate part is one small table."""
    head = field_head(dataclasses.replace(TINY, field_blocks=1, field_width=4))
    pixels, s = torch.randn(50, 16, 3, dtype=torch.float64), torch.randn(50, 10, dtype=torch.float64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // 8)
            return out

    with Watch():
        head(pixels, s, (4, 4), recompute=False)
    assert 50 * 16 * 8 <= largest < 50 * 16 * 64


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(1e-3, 1e3))
def test_unit_fan_in_forgets_the_scale(fan_in, fan_out, scale):
    weight = torch.randn(2, fan_in, fan_out, dtype=torch.float64)
    unit = unit_fan_in(weight)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2, fan_out, dtype=torch.float64))
    torch.testing.assert_close(unit_fan_in(weight * scale), unit)


def test_unit_fan_in_of_zero_is_zero():
    assert unit_fan_in(torch.zeros(1, 3, 2)).eq(0).all()


@pytest.mark.parametrize("head", [NeuralFieldHead(10, 3, 8), LinearHead(10, 3, 4)], ids=["field", "linear"])
def test_untrained_heads_predict_zero(head):
    assert head(torch.randn(5, 16, 3), torch.randn(5, 10), (4, 4), recompute=False).eq(0).all()


def test_linear_head_does_not_see_the_pixels():
    head = randomised(LinearHead(10, 3, 4))
    s = torch.randn(5, 10)
    one, other = (head(torch.randn(5, 16, 3), s, (4, 4), recompute=False) for _ in range(2))
    assert one.equal(other)
    assert one.std() > 0


def test_tables_made_in_inference_mode_can_be_trained_with():
    coordinate_table.cache_clear()
    head = NeuralFieldHead(10, 3, 8)
    with torch.inference_mode():
        head(torch.randn(1, 35, 3), torch.randn(1, 10), (5, 7), recompute=False)
    head(torch.randn(1, 35, 3), torch.randn(1, 10), (5, 7), recompute=False).sum().backward()
