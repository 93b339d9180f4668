"""Training: one loop, as a generator of typed records, for the notebook, the command line and the tests alike."""

from ..compiling import compile_regions
from ..config import SamplingConfig, TrainConfig
from ..distributed import default_device
from ..errors import NonFiniteLoss
from .batches import StepDraws, draw_step, shuffled, step_indices, step_size
from .loop import StepRecord, learning_rate, train, update_averages

__all__ = [
    "NonFiniteLoss",
    "SamplingConfig",
    "StepDraws",
    "StepRecord",
    "TrainConfig",
    "compile_regions",
    "default_device",
    "draw_step",
    "learning_rate",
    "shuffled",
    "step_indices",
    "step_size",
    "train",
    "update_averages",
]
