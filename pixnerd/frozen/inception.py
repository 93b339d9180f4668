"""The network behind FID, sFID, Inception Score, precision and recall: the papers' Inception v3, from torch-fidelity.

Dimension letters: B images, H × W pixels.
"""

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import readable
from .network import FrozenNetwork

SHA256 = "6726825d"  # first digits for the weights converted from the papers' TensorFlow graph, as in their file name
SPATIAL_CHANNELS = 7


class Inception(FrozenNetwork):
    """Images of any size are scaled to 299 as TensorFlow 1 does, then to (x − 128) / 128.

    Args:
        weights: file of torch-fidelity's `inception-v3-compat`; by default torch.hub downloads and caches it.
        device: where it runs.

    Raises:
        InputError: torch-fidelity is missing, or `weights` is not such a file.
    """

    name, measure = "inception", ""

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise InputError(
                f"FID needs the package {error.name}, which is missing: pip install 'pixnerd[fidelity]'"
            ) from error
        if weights is not None:
            if not Path(weights).is_file():
                raise InputError(f"Inception's weights {weights} do not exist")
            with readable(Path(weights)):
                torch.load(weights, map_location="cpu", weights_only=True)  # tensors only: safe to unpickle
            with open(weights, "rb") as file:
                if not hashlib.file_digest(file, "sha256").hexdigest().startswith(SHA256):
                    warnings.warn(
                        f"{weights} are not the weights of inception-v3-compat (sha256 {SHA256}…): "
                        "the figures are not FID",
                        stacklevel=2,
                    )
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], None if weights is None else str(weights)
            )
        except RuntimeError as error:
            raise InputError(f"{weights} are not weights of Inception v3 as FID uses it") from error
        except OSError as error:
            raise InputError(
                f"Inception's weights cannot be downloaded ({error}): give the file of torch-fidelity's "
                "inception-v3-compat with --weights"
            ) from error
        self.freeze(device)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen = output  # [B, 192, 17, 17]

    def pooled(self, images: Tensor) -> dict[str, Tensor]:
        """ "pool" [B, 2048], "logits" [B, 1008] and "spatial" [B, 2023].

        pool: the last average pool. logits: its product with the last layer's weights, without the bias. spatial: the
        first 7 channels of Mixed_6d's 1 × 1 branch after its ReLU, 17 × 17 positions, channels last (ADM's sFID).
        """
        pool, logits = self.network(images)
        spatial = self.seen[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # [B, 17 · 17 · 7]
        return {"pool": pool, "logits": logits, "spatial": spatial}
