"""What a model is told: captions chosen on the device from the tokens of the loader's workers."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pixnerd import data
from pixnerd.conditions import Captions, Labels
from pixnerd.frozen.text_encoder import TransformersEncoder
from pixnerd.text import TextModelConfig
from pixnerd.training import TrainConfig, train
from pixnerd.training.batches import StepImages

CAPTIONS = [("a cat", "a red cat", "a blue dog"), ("a",), ("blue cat", "red"), ("a dog a dog a dog", "dog")]


@pytest.fixture
def conditions(tiny_folder):
    return Captions(TransformersEncoder(tiny_folder, length=6), CAPTIONS)


def test_choosing_among_tokens_is_choosing_among_captions(conditions):
    g = torch.Generator().manual_seed(0)
    indices = torch.randint(4, (200,), generator=g)
    dropped, choice = torch.rand(200, generator=g) < 0.3, torch.rand(200, generator=g)
    choice[:3] = torch.tensor([0, 1 / 3, 1 - 2**-24])  # the ends, and one where float32 products would round up
    with warnings.catch_warnings(record=True):
        expected = conditions.of_images(indices, indices, dropped, choice)
        tokens = conditions.tokenizer(indices.tolist())
        found = conditions.of_images(indices, indices, dropped, choice, tokens)
    assert torch.equal(found, expected)
    assert len({row.numpy().tobytes() for row in found}) == 9  # eight captions and none
    assert tokens.counts.tolist() == [len(CAPTIONS[index]) for index in indices]
    assert int(tokens.lengths.max()) == 8  # of the longest, before it was cut: six words, a beginning and an end


def test_choosing_among_tokens_never_waits_for_the_device(conditions):
    """A fake tensor has no values: reading one on the host, as tolist() or a condition do, raises an error."""
    tokens = conditions.tokenizer([0, 1, 2])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        some = [mode.from_tensor(x) for x in (torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.rand(3))]
        faked = type(tokens)(*map(mode.from_tensor, tokens))
        assert conditions.of_images(some[0], some[0], some[1], some[2], faked).shape == (3, 6, 12)
        with pytest.raises(Exception, match="aten._local_scalar_dense"):
            some[2].tolist()


def test_a_worker_hands_over_the_tokens_of_its_images(conditions, tmp_path, tiny_folder):
    """Without them the training process would tokenise, at every step."""
    config = config_for(tmp_path, tiny_folder)
    dataset = data.load("synthetic", 16)
    loaded = StepImages(
        {16: dataset}, config, range(2, 6), lambda indices: conditions.tokenizer([i % 4 for i in indices])
    )[1]
    expected = conditions.tokenizer([index % 4 for index in loaded.indices.tolist()])
    assert all(torch.equal(*pair) for pair in zip(loaded.tokens, expected, strict=True))


def test_labels_need_no_worker():
    assert Labels(3).tokenizer is None


def config_for(folder, tiny_folder, **changes):
    """A run with captions of up to six tokens, of which the network reads four."""
    shape = {"width": 16, "heads": 2, "blocks": 1, "patch_size": 8, "image_size": 16, "field_width": 4}
    model = TextModelConfig(**shape, field_blocks=1, text_blocks=1, text_features=12, text_length=4)
    options = {"model": model, "text_encoder": str(tiny_folder), "steps": 4, "batch_size": 8, **changes}
    return TrainConfig(out=str(folder), data="synthetic", **options)


def captioned(name, image_size):
    """Gratings under captions of words that the encoder knows, each image with one of its own."""
    gratings = data.open_data_set(name, image_size)
    words = ("a", "red", "blue", "cat", "dog")
    gratings.captions = [(f"{words[i % 5]} {words[i // 5 % 5]}",) for i in range(len(gratings))]
    return gratings


def test_features_computed_in_each_step_train_as_those_in_a_file_do(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(data, "load", captioned)
    losses = {}
    for cached in (True, False):
        config = config_for(tmp_path / str(cached), tiny_folder, cache_text=cached, learning_rate=1e-2, steps=8)
        losses[cached] = [float(record.loss) for record in train(config, torch.device("cpu"))]
    assert losses[False] == pytest.approx(losses[True], rel=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_warns_once_of_long_captions(tmp_path, monkeypatch, tiny_folder, workers):
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path / "data"))
    config = config_for(tmp_path / "run", tiny_folder, cache_text=False, workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(train(config, torch.device("cpu")))
    cut = [str(warning.message) for warning in caught if "is cut to" in str(warning.message)]
    assert len(cut) == 1
    assert cut[0].startswith("caption of 6 tokens is cut to 4: 'stripes at ")
