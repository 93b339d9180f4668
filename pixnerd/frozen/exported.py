"""An image network of the user's own, as torch.export saved it."""

from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .network import FrozenNetwork


class Exported(FrozenNetwork):
    """A network that maps images [B, 3, H, W] in [−1, 1], of any batch size, to a list of features [B, F, h, w].

    Args:
        path: a file of torch.export.save (.pt2).
        device: where it runs.

    Raises:
        InputError: the file is none of torch.export.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        super().__init__()
        self.name = str(path)
        try:
            self.network = torch.export.load(path).module()
        except Exception as error:  # torch.export raises whatever the unpacking met first
            raise InputError(f"{path} is not a network that torch.export.save wrote") from error
        self.freeze(device)

    def train(self, mode: bool = True) -> "Exported":
        """As it was exported: an exported network has no training mode to be taken out of."""
        return self

    def maps(self, images: Tensor) -> list[Tensor]:
        return list(self.network(images))
