"""Frozen pretrained networks, used by REPA, the perceptual loss, the metrics and text models.

An image network consists of a module with a class and a line in IMAGE_NETWORKS. It is imported only when needed.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import torch

    from .network import FrozenNetwork

IMAGE_NETWORKS = {  # name → the class that loads it
    "efficientnet": "efficientnet.EfficientNet",
    "inception": "inception.Inception",
    "dinov2": "dinov2.Dinov2",
}


def load(source: str, device: torch.device | str = "cpu", weights: str | None = None) -> FrozenNetwork:
    """A frozen image network on `device`.

    Args:
        source: a name in IMAGE_NETWORKS, a file that torch.export.save wrote, or a DINOv2 model's folder or hub id.
        weights: file, folder or hub id of a named network's weights, if it offers a choice.

    Raises:
        InputError: a package or the weights are missing, or the weights belong to another network.
    """
    module, _, kind = IMAGE_NETWORKS.get(source, "").partition(".")
    if not module:
        if not Path(source).exists() and "/" not in source:
            known = ", ".join(IMAGE_NETWORKS)
            raise InputError(
                f"network {source!r} is unknown; known: {known}, a file, a folder or a hub id (OWNER/NAME)"
            )
        module, kind = ("exported", "Exported") if Path(source).is_file() else ("dinov2", "Dinov2")
        weights = source
    return getattr(importlib.import_module(f".{module}", __name__), kind)(weights, device)
