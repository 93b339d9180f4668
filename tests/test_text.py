import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from pixnerd import InputError, load, load_released, sample
from pixnerd.checkpoints import save_model
from pixnerd.layers import rotary_table
from pixnerd.sampling import SamplingConfig, sample_batches, sample_noise
from pixnerd.text import TEXT_SIZES, TextModelConfig, TextPixNerd

from .conftest import randomised

GOLDEN = "tests/golden/text_p4"
TINY = TextModelConfig(
    width=24,
    heads=2,
    blocks=2,
    patch_size=4,
    image_size=16,
    field_width=8,
    text_blocks=1,
    text_features=7,
    text_length=5,
)


@pytest.fixture(scope="module")
def golden():
    return load_file(f"{GOLDEN}.safetensors")


@pytest.fixture
def tiny():
    return randomised(TextPixNerd(TINY)).eval()


def test_released_weights_give_the_released_velocity(golden):
    v = load_released(f"{GOLDEN}.ckpt")(golden["x"], golden["t"], golden["y"])
    assert golden["v"].std() > 0.1
    assert (v - golden["v"]).abs().max() < 1e-4


def test_released_weights_decode_above_the_base_resolution(golden):
    model = load_released(f"{GOLDEN}.ckpt")
    v = model(golden["x_scaled"], golden["t"], golden["y"], base_resolution=(16, 16))
    assert golden["v_scaled"].std() > 0.1
    assert (v - golden["v_scaled"]).abs().max() < 1e-4


def test_released_sizes_are_inferred_from_shapes():
    assert load_released(f"{GOLDEN}.ckpt").config == TextModelConfig(
        width=32,
        heads=2,
        blocks=2,
        patch_size=4,
        image_size=128,
        field_width=16,
        text_blocks=1,
        text_features=24,
        text_length=6,
    )


def test_published_size():
    with torch.device("meta"):
        model = TextPixNerd(TEXT_SIZES["XXL/16"])
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(1171.5, abs=0.05)


def test_every_text_token_is_read_and_its_position_matters(tiny):
    x, t, text = torch.randn(1, 3, 16, 16), torch.tensor([0.5]), torch.randn(1, 5, 7)
    v = tiny(x, t, text)
    for token in range(5):
        changed = text.clone()
        changed[:, token] += 1
        assert not torch.allclose(tiny(x, t, changed), v, atol=1e-4), token
    assert not torch.allclose(tiny(x, t, text.flip(1)), v, atol=1e-4)


def test_guided_sampling_from_text(tiny):
    tiny.double()
    text, empty = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    noise = sample_noise((3, 16, 16), [0, 1]).double()
    x, times = noise, [0, 0.5, 1]
    with torch.no_grad():
        for t, w in zip(times[:-1], (1.0, 3.0), strict=True):  # (0, 1) leaves the step at t = 0 unguided
            v_c, v_u = (tiny(x, torch.full((2,), t, dtype=torch.float64), c) for c in (text, empty.expand(2, 5, 7)))
            x = x + 0.5 * (v_u + w * (v_c - v_u))
    got = sample(tiny, text, unconditional=empty, noise=noise, steps=2, guidance=3.0, interval=(0, 1))
    torch.testing.assert_close(got, x, atol=1e-9, rtol=1e-9)


def test_batches_of_text_share_the_empty_caption(tiny):
    """Which may be given in another precision."""
    tiny.double()
    text, empty = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(5, 7)
    config = SamplingConfig(2, guidance=3.0)
    batches = list(sample_batches(tiny, text, config, unconditional=empty, batch_size=2))
    expected = sample(tiny, text, config, unconditional=empty.double())
    torch.testing.assert_close(torch.cat(batches), expected, atol=1e-9, rtol=1e-9)
    with pytest.raises(InputError, match="guidance 3.0 from text needs `unconditional`"):
        sample_batches(tiny, text, config)


def test_text_in_bfloat16_is_read_in_the_networks_precision(tiny):
    """As encoders on a GPU give it."""
    x, t, text = torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 5, 7).bfloat16()
    assert tiny(x, t, text).equal(tiny(x, t, text.float()))


def test_text_models_survive_saving(tiny, tmp_path):
    save_model(tiny, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.config == TINY
    assert again.state_dict().keys() == tiny.state_dict().keys()
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in tiny.state_dict().items())


def test_recompute_changes_no_gradient(tiny):
    tiny.double().train()
    x, t = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    text = torch.randn(2, 5, 7, dtype=torch.float64)
    gradients = []
    for tiny.recompute in ("head", "none"):
        gradients.append(torch.autograd.grad(tiny(x, t, text).square().mean(), list(tiny.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("shape", "options", "sentence"),
    [
        ((2, 4, 7), {}, r"shape \(2, 4, 7\); this model reads \[B, 5, 7\]"),
        ((2, 5, 9), {}, "5 tokens of an encoder with 7 features"),
        ((2, 5, 7), {}, "guidance 3.5 from text needs `unconditional`"),
        ((2, 5, 7), {"unconditional": torch.zeros(3, 7)}, r"shape \(1, 3, 7\)"),
        (
            (2, 5, 7),
            {"guidance": 1.0, "size": (30, 16), "base_resolution": (16, 16)},
            "height 30 cannot be shared by the 4",
        ),
    ],
)
def test_bad_input(tiny, shape, options, sentence):
    with pytest.raises(InputError, match=sentence):
        sample(tiny, torch.randn(shape), steps=1, **options)


def test_configuration_checks_its_own_fields():
    with pytest.raises(InputError, match="model.text_blocks is 0"):
        dataclasses.replace(TINY, text_blocks=0)


def test_rows_end_at_the_number_of_columns_and_the_other_way_round(tiny):
    """As released; the golden vectors are square and would not notice."""
    ends = tiny.rotary_ends(2, 3)  # 2 rows of 3 columns
    cos, _ = rotary_table(2, 3, ends, 4, torch.float64, torch.device("cpu"))  # [6, 2]: by x and by y, frequency 1
    places = torch.tensor([[x, y] for y in (0, 3) for x in (0, 1, 2)], dtype=torch.float64)
    torch.testing.assert_close(cos, places.cos())
