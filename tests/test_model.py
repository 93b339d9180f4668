import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from pixnerd import SIZES, InputError, ModelConfig, PixNerd, load_released, plain
from pixnerd.model import velocity_from_image

from .conftest import SWITCHES, TINY, randomised

GOLDEN = "tests/golden/class_p4"


def test_released_weights_give_the_released_velocity():
    golden = load_file(f"{GOLDEN}.safetensors")
    model = load_released(f"{GOLDEN}.ckpt")
    v = model(golden["x"], golden["t"], golden["y"])
    assert golden["v"].std() > 0.1
    assert (v - golden["v"]).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=["square", "wide"])
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_network_equals_the_plain_one(switch, size):
    config = dataclasses.replace(TINY, **switch)
    model = randomised(PixNerd(config, num_classes=5)).double()
    x = torch.randn(3, config.channels, *size, dtype=torch.float64)
    t = torch.tensor([0.0, 0.4, 0.97], dtype=torch.float64)
    labels = torch.tensor([0, 3, 5])
    expected = plain.network(dict(model.named_parameters()), config, x, t, labels)
    torch.testing.assert_close(model(x, t, labels), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_recompute_changes_no_gradient(switch):
    model = randomised(PixNerd(dataclasses.replace(TINY, **switch), num_classes=5)).double().train()
    size = model.config.patch_size * 2
    x, t = torch.randn(2, model.config.channels, size, size, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    gradients = {}
    for recompute in ("head", "none"):
        model.recompute = recompute
        loss = model(x, t, torch.tensor([1, 5])).square().mean()
        gradients[recompute] = torch.autograd.grad(loss, list(model.parameters()))
    for one, other in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)
        assert one.isfinite().all()


@pytest.mark.parametrize(
    ("size", "millions", "giga_macs"), [("L/16", 452.1, 85.2), ("XL/16", 700.6, 134.3), ("L/16-linear", 457.1, 81.4)]
)
def test_published_sizes(size, millions, giga_macs):
    with torch.device("meta"):
        model = PixNerd(SIZES[size], num_classes=1000).eval()
        inputs = torch.randn(1, 3, 256, 256), torch.rand(1), torch.zeros(1, dtype=torch.long)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_macs, rel=0.01)


def test_initial_weights():
    torch.manual_seed(0)
    model = PixNerd(ModelConfig(width=256, heads=4, blocks=1, patch_size=16, image_size=32), num_classes=1000)
    bound = (6 / (768 + 256)) ** 0.5  # Xavier-uniform
    assert model.patch_embed.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.patch_embed.bias.eq(0).all()
    for weight in (model.label_embed.weight, model.time_embed.mlp[0].weight, model.time_embed.mlp[2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[0].modulation.weight.abs().max().item() == pytest.approx(
        1 / 16, rel=0.01
    )  # torch's default, not 0
    assert model(torch.randn(1, 3, 32, 32), torch.rand(1), torch.tensor([0])).eq(0).all()


def test_image_prediction_points_at_the_image():
    image, x_t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = torch.tensor([0.3, 0.99])
    v = velocity_from_image(image, x_t, t)
    torch.testing.assert_close(x_t[0] + 0.7 * v[0], image[0])
    torch.testing.assert_close(x_t[1] + 0.01 * v[1], image[1])
    assert velocity_from_image(image, x_t, torch.ones(2)).isfinite().all()


def test_no_label_is_the_last_label(tiny):
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    unconditional = tiny(x, t, torch.tensor([5]))
    assert not torch.allclose(unconditional, tiny(x, t, torch.tensor([4])))


@pytest.mark.parametrize(
    ("x", "t", "labels", "sentence"),
    [
        ((2, 3, 18, 16), 2, [0, 1], "18x16 does not fit patches of 4"),
        ((2, 3, 0, 16), 2, [0, 1], "0x16 does not fit patches of 4"),
        ((2, 1, 16, 16), 2, [0, 1], "1 channels"),
        ((3, 16, 16), 2, [0, 1], r"images have shape \(3, 16, 16\); \[B, C, H, W\] is needed"),
        ((2, 3, 16, 16), 1, [0, 1], "one entry for each of the 2 images"),
        ((2, 3, 16, 16), 2, [0, 6], "label 6 is outside 0 … 5"),
        ((2, 3, 16, 16), 2, [-1, 0], "label -1 is outside 0 … 5"),
    ],
)
def test_bad_input(tiny, x, t, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        tiny(torch.randn(x), torch.rand(t), torch.tensor(labels))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"width": 30, "heads": 4}, "7.5 channels per head"),
        ({"width": 24, "heads": 4}, "6 channels per head"),
        ({"head": "conv"}, "model.head is 'conv'; allowed: field, linear"),
        ({"encoding": "magic"}, "model.encoding is 'magic'; allowed: dct, sincos"),
        ({"weight_norm": "fc2"}, r"allowed: none, fc1, fc1\+fc2"),
        ({"prediction": "eps"}, "allowed: v, x"),
        ({"field_blocks": 0}, "model.field_blocks is 0"),
        ({"image_size": 18}, "18x18 does not fit patches of 4"),
    ],
)
def test_bad_configuration(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        dataclasses.replace(TINY, **changes)


def test_unknown_size_names_the_known_ones():
    with pytest.raises(InputError, match="'H/16' is unknown; known sizes: .*L/16"):
        SIZES["H/16"]


@pytest.mark.parametrize("tap", [0, 3])
def test_a_tap_is_one_of_the_blocks(tiny, tap):
    with pytest.raises(InputError, match=f"tap is {tap}; the model has blocks 1 … 2"):
        tiny(torch.randn(1, 3, 16, 16), torch.tensor([0.5]), torch.tensor([2]), tap=tap)


def test_labels_are_one_number_per_image(tiny):
    with pytest.raises(InputError, match=r"labels have shape \(2, 1\)"):
        tiny(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([[0], [1]]))


def test_base_resolution_of_the_same_size_changes_nothing(tiny):
    inputs = torch.randn(1, 3, 16, 8), torch.tensor([0.5]), torch.tensor([2])
    assert tiny(*inputs, base_resolution=(16, 8)).equal(tiny(*inputs))


def test_more_pixels_sample_the_same_fields(tiny):
    """The 4 × 4 pixels of a patch are every second one of 7 × 7: with equal noisy values they decode equally."""
    per_patch = torch.randn(1, 3, 4, 4)
    base = per_patch.repeat_interleave(4, 2).repeat_interleave(4, 3)
    full = per_patch.repeat_interleave(7, 2).repeat_interleave(7, 3)
    t, labels = torch.tensor([0.3]), torch.tensor([1])
    coarse = tiny(base, t, labels).unflatten(2, (4, 4)).unflatten(4, (4, 4))  # [1, 3, rows, 4, columns, 4]
    fine = tiny(full, t, labels, base_resolution=(16, 16)).unflatten(2, (4, 7)).unflatten(4, (4, 7))
    torch.testing.assert_close(fine[:, :, :, ::2, :, ::2], coarse, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(fine[:, :, :, 1::2, :, 1::2], coarse[:, :, :, :-1, :, :-1], atol=1e-2)


def test_base_resolution_has_to_fit(tiny):
    inputs = torch.randn(1, 3, 30, 32), torch.tensor([0.5]), torch.tensor([2])
    with pytest.raises(InputError, match="height 30 cannot be shared by the 4 patches of base height 16"):
        tiny(*inputs, base_resolution=(16, 16))
    linear = PixNerd(dataclasses.replace(TINY, head="linear"), 5)
    with pytest.raises(InputError, match="linear head decodes only at its base resolution"):
        linear(torch.randn(1, 3, 32, 32), torch.tensor([0.5]), torch.tensor([2]), base_resolution=(16, 16))
