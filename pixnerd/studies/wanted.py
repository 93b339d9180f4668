"""What a study measures of every run."""

from dataclasses import dataclass

from ..checks import Count, Index, check_fields
from ..errors import InputError


@dataclass(frozen=True)
class Measures:
    """What to measure of every run of a study, and on how many images.

    Raises InputError when a value is outside its range.
    """

    samples: Index = 500
    """images to sample with the run's sampling settings, from noise that all runs share; 0: none"""
    unguided: Index = 0
    """images to sample without guidance, to see how many show what was asked for; 0: none"""
    errors: Count = 512
    """images whose velocity error is measured, each once in every tenth of t from 0 to 0.96"""
    errors_on: str = ""
    """data set of these images, such as emoji:held-out; empty: the run's own data"""
    reference: str = ""
    """data set that samples are compared with; empty: the run's own data"""
    batch_size: Count = 64
    """images per batch"""

    def __post_init__(self):
        check_fields(self, "measure.")
        if 0 < self.samples < 16:
            raise InputError(f"measure.samples is {self.samples}; it has to be 0, or at least 16 for the sample sheet")
