"""PixNerd: pixel-space diffusion with a neural field per patch (arXiv 2507.23268). t = 0 is noise, t = 1 is data."""

from . import sampling, training
from .checkpoints import load, load_released
from .errors import InputError
from .model import SIZES, ModelConfig, PixNerd
from .sampling import sample

__all__ = [
    "SIZES",
    "InputError",
    "ModelConfig",
    "PixNerd",
    "load",
    "load_released",
    "sample",
    "sampling",
    "training",
]
