"""Inception with random weights: the layout of its features does not depend on them."""

import pytest
import torch
from torch.nn import functional as F
from torch_fidelity import feature_extractor_inceptionv3

from pixnerd import InputError
from pixnerd.frozen.inception import Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights, written by torch-fidelity's own network."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        kind = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
        patch.setattr(kind, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        torch.save(kind("inception-v3-compat", ["2048"]).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    with pytest.warns(UserWarning, match="are not the weights of inception-v3-compat"):
        return Inception(weights)


def images(count=2, side=32):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_shapes(inception):
    assert {name: tuple(x.shape) for name, x in inception.pooled(images()).items()} == {
        "pool": (2, 2048),
        "logits": (2, 1008),
        "spatial": (2, 2023),
    }


def test_logits_have_no_bias(inception):
    with torch.no_grad():
        inception.network.fc.bias.fill_(7)
    features = inception.pooled(images())
    torch.testing.assert_close(features["logits"], features["pool"] @ inception.network.fc.weight.T)


def test_spatial_features_are_seven_channels_after_the_relu_with_the_channel_last(inception):
    """Compared with the ReLU's input, whose biases vary so that some channels fall below zero."""
    branch = inception.network.Mixed_6d.branch1x1
    before = {name: value.clone() for name, value in branch.state_dict().items()}
    seen = {}
    hook = branch.bn.register_forward_hook(lambda module, inputs, output: seen.update(bn=output.clone()))
    try:
        with torch.no_grad():
            branch.bn.bias.copy_(torch.linspace(-1, 1, len(branch.bn.bias)))
        spatial = inception.pooled(images())["spatial"]
    finally:
        hook.remove()
        branch.load_state_dict(before)
    assert (seen["bn"][:, :7] < 0).any()
    assert (spatial >= 0).all()
    for row, column, channel in ((0, 0, 0), (0, 1, 6), (16, 3, 2), (5, 16, 4)):
        expected = F.relu(seen["bn"][:, channel, row, column])
        torch.testing.assert_close(spatial[:, (row * 17 + column) * 7 + channel], expected)


def test_files_that_are_not_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nothing.pth do not exist"):
        Inception(tmp_path / "nothing.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a file of weights")
    with pytest.raises(InputError, match=r"broken.pth"):
        Inception(tmp_path / "broken.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with (
        pytest.warns(UserWarning, match="not FID"),
        pytest.raises(InputError, match=r"other.pth are not weights of Inception v3"),
    ):
        Inception(tmp_path / "other.pth")


def test_weights_that_run_code_are_not_read(tmp_path):
    class Harmful:
        def __reduce__(self):
            return print, ("this must not run",)

    torch.save(Harmful(), tmp_path / "harmful.pth")
    with pytest.raises(InputError, match=r"harmful.pth"):
        Inception(tmp_path / "harmful.pth")
