"""Random numbers that depend on what they are for, never on the order of calls.

Every draw comes from a generator keyed by integers such as (seed, purpose, step, position in the global batch), so
it does not depend on batch size, number of GPUs or interruptions.
"""

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """The second entry of a key: keeps the streams of one seed apart."""

    INITIAL_WEIGHTS = 0
    DATA_ORDER = 1
    TRAINING_STEP = 2
    SAMPLE_NOISE = 3
    SYNTHETIC_IMAGE = 4  # of every data set that is computed
    DECODE_SIZE = 5
    PROJECTOR_WEIGHTS = 6


def derived_seed(seed: int, purpose: Purpose, *key: int) -> int:
    """A 63-bit seed from (seed, purpose, key…), all non-negative."""
    state = np.random.SeedSequence((seed, int(purpose), *key)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def generator(device: torch.device, seed: int, purpose: Purpose, *key: int) -> torch.Generator:
    """A torch generator on `device` for (seed, purpose, key…)."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, *key))
