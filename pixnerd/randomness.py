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


def permuted(index: int, size: int, seed: int) -> int:
    """Entry `index` of a permutation of 0 … size − 1 that is computed entry by entry, in constant memory.

    A Feistel network permutes 0 … 4**n − 1 for the smallest 4**n ≥ size; it is applied again until the result is below
    size, four times at most on average. Source: Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains".
    """
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(6):
            left, right = right, left ^ (_mixed(seed + (number << half) + right) & mask)
        index = left << half | right
        if index < size:
            return index


def _mixed(value: int) -> int:
    """64 bits that look independent for neighbouring values: the finaliser of SplitMix64 (Steele et al. 2014)."""
    value = (value + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    value = (value ^ value >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return value ^ value >> 31
