"""A user's own image network, saved with torch.export."""

from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .network import FrozenNetwork


class Exported(FrozenNetwork):
    """A network that maps images [B, 3, H, W] in [−1, 1], of any batch size, to a list of features [B, F, h, w].

    Args:
        path: a file written by torch.export.save (.pt2).
        device: where it runs.

    Raises:
        InputError: the file was not written by torch.export.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        super().__init__()
        self.name = str(path)
        try:
            self.network = torch.export.load(path).module()
        except Exception as error:  # torch.export passes on any error of its unpacking
            raise InputError(f"{path} is not a network that torch.export.save wrote") from error
        self.freeze(device)

    def train(self, mode: bool = True) -> "Exported":
        """Do nothing: an exported network has no training mode to leave."""
        return self

    def maps(self, images: Tensor) -> list[Tensor]:
        return list(self.network(images))
