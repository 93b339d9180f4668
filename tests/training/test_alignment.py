"""Alignment with tiny random DINOv2s that the tests create; EfficientNet if its wheel is installed."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnerd import InputError, frozen
from pixnerd.frozen.dinov2 import Dinov2
from pixnerd.frozen.efficientnet import EfficientNet
from pixnerd.training.losses import CachedTokens, Projector, alignment_loss

from ..conftest import randomised


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_projector_is_three_layers():
    projector = Projector(6, 10)
    assert [tuple(p.shape) for p in projector.parameters()] == [(6, 6), (6,), (6, 6), (6,), (10, 6), (10,)]
    x, (a, b, c) = random(2, 5, 6).float(), list(projector)[::2]
    silu = lambda z: z * torch.sigmoid(z)
    torch.testing.assert_close(projector(x), c(silu(b(silu(a(x))))))


def test_loss_is_the_plain_cosine_averaged_over_tokens():
    projected, target = random(2, 3, 5, 7)
    expected = [
        np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(p, q, strict=True)])
        for p, q in zip(projected.numpy(), target.numpy(), strict=True)
    ]
    torch.testing.assert_close(alignment_loss(projected, target).numpy(), np.array(expected))
    halves = projected.bfloat16(), target.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment_loss(*halves)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), alignment_loss(*(half.double() for half in halves)), rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 99), st.floats(0.01, 100))
def test_the_length_of_features_does_not_count(seed, scale):
    projected, target = random(2, 3, 4, 5, seed=seed)
    loss = alignment_loss(projected, target)
    torch.testing.assert_close(alignment_loss(scale * projected, target), loss)
    torch.testing.assert_close(alignment_loss(projected, scale * target), loss)
    torch.testing.assert_close(alignment_loss(-projected, target), 2 - loss)
    torch.testing.assert_close(alignment_loss(scale * target, target), torch.zeros(3, dtype=torch.float64))


def test_loss_trains_a_projector_and_refuses_another_shape():
    projector = randomised(Projector(4, 6))
    alignment_loss(projector(random(2, 3, 4).float()), random(2, 3, 6).float()).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in projector.parameters())
    with pytest.raises(InputError, match=r"\(2, 3, 6\) cannot be aligned with a teacher's \(2, 4, 6\)"):
        alignment_loss(torch.zeros(2, 3, 6), torch.zeros(2, 4, 6))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """Folders with random DINOv2s of 8 features, named by what is special about them."""
    transformers = pytest.importorskip("transformers")
    base = {"image_size": 28, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    models = {
        "plain": transformers.Dinov2Model(transformers.Dinov2Config(**base, patch_size=14)),
        "registers": transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**base, patch_size=14, num_register_tokens=3)
        ),
        "patch 7": transformers.Dinov2Model(transformers.Dinov2Config(**base, patch_size=7)),
    }
    folder = tmp_path_factory.mktemp("dinov2")
    for name, model in models.items():
        randomised(model).save_pretrained(folder / name)
    return folder


def bicubic(inputs, outputs):
    """The matrix [outputs, inputs] of bicubic resizing without antialiasing: Keys' kernel, a = −3/4, edges repeated."""
    matrix = np.zeros((outputs, inputs))
    for row in range(outputs):
        centre = (row + 0.5) * inputs / outputs - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - tap)
            near = 1.25 * d**3 - 2.25 * d**2 + 1
            far = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[row, min(max(tap, 0), inputs - 1)] += near if d <= 1 else far
    return matrix


@pytest.mark.parametrize(("kind", "extra"), [("plain", 1), ("registers", 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_dinov2_sees_normalised_images_at_14_pixels_per_token(dinov2, kind, extra, channels):
    transformers = pytest.importorskip("transformers")
    images = random(2, channels, 48, 32).float().clamp(-1, 1)
    rgb = np.repeat(images.numpy(), 3, 1) if channels == 1 else images.numpy()
    rgb = (rgb.astype(float) / 2 + 0.5 - np.array([[[0.485]], [[0.456]], [[0.406]]])) / np.array(
        [[[0.229]], [[0.224]], [[0.225]]]
    )
    rgb = bicubic(48, 42) @ rgb @ bicubic(32, 28).T
    model = transformers.AutoModel.from_pretrained(dinov2 / kind)
    with torch.no_grad():
        hidden = model(torch.from_numpy(rgb).float()).last_hidden_state
    assert hidden.shape == (2, extra + 6, 8)
    teacher = Dinov2(dinov2 / kind)
    with torch.autocast("cpu", torch.bfloat16):  # which must not reach the teacher
        tokens = teacher.tokens(images.requires_grad_(), (3, 2))
    assert not tokens.requires_grad
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, hidden[:, extra:], rtol=1e-4, atol=1e-4)
    assert (teacher.name, teacher.features) == (str(dinov2 / kind), 8)
    assert not teacher.network.training
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())


def test_unsuitable_teachers_are_refused(dinov2, tiny_folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is a dinov2 with patch size 7; a DINOv2 with patch size 14 is needed"):
        frozen.load(str(dinov2 / "patch 7"))
    with pytest.raises(InputError, match="is a bert with patch size None"):
        frozen.load(str(tiny_folder))
    with pytest.raises(InputError, match="could not be loaded from a folder or the hub"):
        frozen.load(str(tmp_path))
    with pytest.raises(InputError, match="images have 2 channels"):
        frozen.load(str(dinov2 / "plain")).tokens(torch.zeros(1, 2, 16, 16), (1, 1))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="needs the package transformers"):
        frozen.load(str(dinov2 / "plain"))


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    return frozen.load("efficientnet")


def test_efficientnet_gives_block_10_at_16_pixels_per_token(efficientnet):
    assert isinstance(efficientnet, EfficientNet)
    assert (efficientnet.name, efficientnet.features) == ("efficientnet", 112)
    seen = []
    hook = efficientnet.network._blocks[10].register_forward_hook(lambda *call: seen.append(call[2]))
    images = random(1, 3, 224, 224).float().clamp(-1, 1).requires_grad_()
    tokens = efficientnet.tokens(images, (14, 14))
    efficientnet.network.extract_features(images)
    hook.remove()
    assert seen[1].shape == (1, 112, 14, 14)
    assert tokens.shape == (1, 196, 112)
    assert not tokens.requires_grad
    torch.testing.assert_close(tokens[0, 14 * 3 + 5], seen[1][0, :, 3, 5])


def test_efficientnet_resizes_to_the_grid_and_reads_grey(efficientnet):
    images = random(2, 1, 16, 24).float().clamp(-1, 1)  # patches of 8
    tokens = efficientnet.tokens(images, (2, 3))
    assert tokens.shape == (2, 6, 112)
    larger = torch.nn.functional.interpolate(images, (32, 48), mode="bicubic", antialias=True).clamp(-1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(efficientnet.tokens(larger.repeat(1, 3, 1, 1), (2, 3)), tokens)
    with pytest.raises(InputError, match="images have 4 channels"):
        efficientnet.tokens(torch.zeros(1, 4, 16, 16), (1, 1))


class Counting:
    def __init__(self):
        self.seen = []

    def __call__(self, images, grid):
        self.seen += images[:, 0, 0, 0].tolist()
        return images[:, 0, 0, 0].view(-1, 1, 1).expand(-1, grid[0] * grid[1], 2) + torch.tensor([0.0, 1.0])


def test_the_cache_asks_for_each_key_once():
    inner = Counting()
    cached = CachedTokens(inner)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(-1, 3, 8, 8)
    keys = [(7, False), (7, True), (9, False), (3, False)]
    first = cached(images[[0, 1, 0]], (1, 2), [keys[0], keys[1], keys[0]])
    assert first.tolist() == [[[0, 1]] * 2, [[1, 2]] * 2, [[0, 1]] * 2]
    assert inner.seen == [0, 1]
    again = cached(images[[3, 1, 2, 0]], (1, 2), [keys[3], keys[1], keys[2], keys[0]])
    assert again[:, 0, 0].tolist() == [3, 1, 2, 0]
    assert inner.seen == [0, 1, 3, 2]
    cached(images, (1, 2), keys)
    assert inner.seen == [0, 1, 3, 2]
    assert cached(images[:1], (2, 2), keys[:1]).shape == (1, 4, 2)  # another grid is a miss
    assert inner.seen == [0, 1, 3, 2, 0]


def test_a_hit_equals_the_miss_before_it():
    cached = CachedTokens(Counting())
    images = torch.full((1, 3, 8, 8), 1 / 3)
    miss, hit = (cached(images, (1, 1), [5]) for _ in range(2))
    assert miss.equal(hit)
    assert miss.dtype == torch.float32
    torch.testing.assert_close(miss[0, 0, 0], torch.tensor(1 / 3), rtol=2**-8, atol=0)  # bfloat16
