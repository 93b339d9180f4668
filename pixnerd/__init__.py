"""PixNerd: pixel-space diffusion with a neural field per patch (arXiv 2507.23268). t = 0 is noise, t = 1 is data."""

from . import sampling, training
from .checkpoints import load, load_released
from .errors import InputError
from .model import ModelConfig, PixNerd
from .sampling import sample
from .text import ALL_SIZES as SIZES
from .text import TextModelConfig, TextPixNerd

__all__ = [
    "SIZES",
    "InputError",
    "ModelConfig",
    "PixNerd",
    "TextModelConfig",
    "TextPixNerd",
    "load",
    "load_released",
    "sample",
    "sampling",
    "training",
]
