"""Networks of others, frozen: what REPA, the perceptual loss, the measures and text models look through.

An image network is one file with a class, and one line in IMAGE_NETWORKS. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .network import FrozenNetwork

IMAGE_NETWORKS = {  # name → the class that it is loaded with
    "efficientnet": "efficientnet.EfficientNet",
    "inception": "inception.Inception",
    "dinov2": "dinov2.Dinov2",
}


def load(source: str, device: torch.device | str = "cpu", weights: str | None = None) -> FrozenNetwork:
    """A frozen image network on `device`.

    Args:
        source: a name of IMAGE_NETWORKS, a file that torch.export.save wrote, or a DINOv2's folder or hub id.
        weights: the file, folder or hub id of a named network's weights, where it has a choice.

    Raises:
        InputError: a package or the weights are missing, or are not such a network's.
    """
    module, _, kind = IMAGE_NETWORKS.get(source, "").partition(".")
    if not module:
        module, kind = ("exported", "Exported") if Path(source).is_file() else ("dinov2", "Dinov2")
        weights = source
    return getattr(importlib.import_module(f".{module}", __name__), kind)(weights, device)
