"""What training costs, counted again from the sizes alone and by hand."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pixnerd import SIZES, PixNerd
from pixnerd.cost import (
    COPIED,
    MATMUL_SIDE,
    copy_rate,
    forward_flops,
    matmul_rate,
    saved_activation_bytes,
    state_bytes,
    training_rate,
)
from pixnerd.encodings import coordinate_table
from pixnerd.layers import rotary_table
from pixnerd.text import TEXT_SIZES, TextPixNerd

from .conftest import TINY

CPU = torch.device("cpu")


def on_meta(config, recompute="head"):
    with torch.device("meta"):
        return PixNerd(config, 1000, recompute)


def multiply_adds(config, size):
    """Multiply-adds for one image in the model's matrices and its attention, computed from the sizes."""
    N, K, D, C = (size // config.patch_size) ** 2, config.patch_size**2, config.width, config.channels
    W, R = config.field_width, config.field_width * config.field_ratio
    embed = N * C * K * D + 256 * D + D * D
    block = 6 * D * D + N * (4 * D * D + 3 * D * int(8 * D / 3)) + 2 * N * N * D
    field = K * 64 * W + N * K * C * W + config.field_blocks * (N * D * 2 * W * R + N * K * 2 * W * R) + N * K * W * C
    return embed + config.blocks * block + field


@pytest.mark.parametrize(("size", "published"), [("L/16", 84.9), ("XL/16", 134.0)])
def test_a_forward_pass_multiplies_what_its_sizes_say(size, published):
    flops = forward_flops(on_meta(SIZES[size]), 256)
    assert flops == 2 * multiply_adds(SIZES[size], 256)
    assert flops / 2e9 == pytest.approx(published, abs=0.05)


def ticking(monkeypatch, tick):
    """Make the clock advance by `tick` seconds at every reading."""
    readings = iter(range(1000))
    monkeypatch.setattr("pixnerd.cost.time.perf_counter", lambda: next(readings) * tick)


def test_matmul_rate_is_the_products_arithmetic_by_its_time(monkeypatch):
    assert 1e8 < matmul_rate(CPU, torch.float32) < 1e14  # any CPU
    monkeypatch.setitem(MATMUL_SIDE, "cpu", 64)
    ticking(monkeypatch, 0.5)
    assert matmul_rate(CPU, torch.float32) == 2 * 64**3 / 0.5


def test_copy_rate_is_what_is_read_and_written_by_its_time(monkeypatch):
    monkeypatch.setitem(COPIED, "cpu", 4096)
    readings = iter(range(100))
    monkeypatch.setattr("pixnerd.cost.clock", lambda: next(readings) * 0.5)
    assert copy_rate(CPU) == 2 * 4096 / 0.5


def test_state_is_five_numbers_per_weight():
    """Weight, gradient, two moments, moving average."""
    model = on_meta(TINY)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert state_bytes(model) == 20 * weights
    assert state_bytes(model, averages=3) == 28 * weights
    assert 8 * state_bytes(model, shards=8) == pytest.approx(20 * weights, abs=8)


def test_saved_activations_are_those_written_down_by_hand():
    """One block and the linear head, in float32: exactly the tensors that derivatives need."""
    config = replace(TINY, blocks=1, head="linear")
    N, K, D, H = 16, 16, 24, config.heads
    hidden = int(8 * D / 3)
    conditions = [
        256,  # features of the time
        D,  # before and
        D,  # after the SiLU between the time embedding's two matrices
        2,  # the label, 8 bytes
        D,  # time + label, before and
        D,  # after the SiLU
        6 * D,  # shifts, scales and gates, since the gates multiply
        2 * D,  # 1 + scale, twice
    ]
    attention = [
        N * D,  # x, for its norm
        N,  # its inverse mean square
        N * D,  # the normalised x, multiplied by the scale
        N * D,  # the input of the matrix for queries, keys and values
        3 * N * D,  # queries and keys, for their norms, and values
        2 * N * H,  # the norms of queries and keys
        2 * N * D,  # both, rotated
        N * D,  # the attention's output, which the next matrix reads
        32 * H,  # log-sum-exp of the attention, for queries in groups of 32
        N * D,  # what the gate multiplies
    ]
    mlp = [
        N * D,  # x
        N,  # its inverse mean square
        N * D,  # the normalised x
        N * D,  # modulated
        2 * N * hidden,  # gate and value
        N * hidden,  # SiLU of the gate
        N * hidden,  # their product
        N * D,  # what the gate multiplies
    ]
    ends = [
        N * K * 3,  # the image's patches
        N * D,  # token + time, before and
        N * D,  # after the SiLU
    ]
    floats = sum(map(sum, (conditions, attention, mlp, ends)))
    assert saved_activation_bytes(on_meta(config), 16, "none", torch.float32) == 4 * floats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("text", [False, True], ids=["labels", "text"])
def test_the_more_is_recomputed_the_less_is_kept(dtype, text):
    with torch.device("meta"):
        model = TextPixNerd(TEXT_SIZES["text-nano/8"]) if text else PixNerd(SIZES["micro/8"], 10)
    none, head, everything = (saved_activation_bytes(model, 32, how, dtype) for how in ("none", "head", "all"))
    assert none > head > everything > 0
    assert saved_activation_bytes(model, 32, dtype=dtype) == head  # the model's own setting
    assert 3 * none < saved_activation_bytes(model, 64, "none", dtype) < 4 * none  # 4 times the tokens


@pytest.mark.parametrize(
    ("size", "none", "head", "everything"),
    [("L/16", 463.5, 302.2, 29.1), ("XL/16", 718.2, 411.4, 48.9)],
)
def test_published_sizes_keep_bfloat16(size, none, head, everything):
    """MiB per image at 256 pixels. With norms in float32, as CUDA's autocast has them, XL/16 keeps 919, 572, 49."""
    model = on_meta(SIZES[size])
    kept = [saved_activation_bytes(model, 256, how) / 2**20 for how in ("none", "head", "all")]
    assert kept == pytest.approx([none, head, everything], abs=0.1)


def test_counting_leaves_no_trace(tiny):
    """Neither in the model nor in its cached tables; and the values of the weights do not matter."""
    before = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    x, t, labels = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 5])
    v = tiny(x, t, labels)
    assert saved_activation_bytes(tiny, 16, "none") == saved_activation_bytes(on_meta(TINY), 16, "none")
    assert (tiny.training, tiny.recompute) == (False, "head")
    assert not torch.is_autocast_enabled("cuda")
    assert rotary_table.cache_info().currsize == coordinate_table.cache_info().currsize == 0
    torch.testing.assert_close(tiny(x, t, labels), v, rtol=0, atol=0)
    torch.testing.assert_close(tiny.state_dict(), before, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_keeps_what_was_counted(dtype):
    def kept(images):
        storages = set()
        x, t = torch.randn(images, 3, 64, 64, device="cuda"), torch.rand(images, device="cuda")
        labels = torch.zeros(images, dtype=torch.long, device="cuda")
        with (
            saved_tensors_hooks(lambda y: storages.add(y.untyped_storage()) or y, lambda y: y),
            torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            model(x, t, labels)
        return sum(storage.nbytes() for storage in storages)

    model = PixNerd(replace(SIZES["L/16"], blocks=2, image_size=64), 10, "none").cuda().train()
    assert kept(3) - kept(2) == pytest.approx(saved_activation_bytes(model, 64, dtype=dtype), rel=0.05)


def test_training_rate_counts_images(monkeypatch):
    ticking(monkeypatch, 0.5)  # a step reads the clock twice
    model = PixNerd(TINY, 5)
    before = model.label_embed.weight.clone()
    assert training_rate(model, 16, images=6, dtype=torch.float32, steps=2) == 12
    assert not torch.equal(model.label_embed.weight, before)
