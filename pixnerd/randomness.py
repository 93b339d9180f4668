"""Random numbers that depend on what they are for, never on the order of calls.

Every draw is keyed by integers such as (seed, purpose, step, position in the global batch), so it does not depend on
batch size, number of GPUs or interruptions. It comes from one of torch's generators, whose numbers differ between a CPU
and a GPU and between models of GPUs; or from Philox (`random_bits`), which is computed with integers alone and
therefore gives the same bits on every device.
"""

import functools
from enum import IntEnum
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

MASK = 2**32 - 1


class Purpose(IntEnum):
    """The second entry of a key: keeps the streams of one seed apart."""

    INITIAL_WEIGHTS = 0
    DATA_ORDER = 1
    TRAINING_STEP = 2
    SAMPLE_NOISE = 3
    SYNTHETIC_IMAGE = 4  # of every data set that is computed
    DECODE_SIZE = 5
    PROJECTOR_WEIGHTS = 6
    TEACHER_PATH = 7
    PATH_CHOICE = 8


def derived_seed(seed: int, purpose: Purpose, *key: int) -> int:
    """A 63-bit seed from (seed, purpose, key…), all non-negative."""
    state = np.random.SeedSequence((seed, int(purpose), *key)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def generator(device: torch.device, seed: int, purpose: Purpose, *key: int) -> torch.Generator:
    """A torch generator on `device` for (seed, purpose, key…)."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, *key))


# --- Philox: the same bits on every device ---------------------------------------------------------------------------


def philox(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> tuple[Tensor | int, ...]:
    """Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; SC 2011).

    Args:
        counter: four numbers in 0 … 2³² − 1, each a Python int or an int64 tensor; tensors broadcast.
        key: two numbers in 0 … 2³² − 1.

    Returns:
        Four independent uniform numbers in 0 … 2³² − 1 for every counter.
    """
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c  # 64 bits; int64 wraps around, and the bits are the same
        a, b, c, d = (q >> 32 & MASK) ^ b ^ k0, q & MASK, (p >> 32 & MASK) ^ d ^ k1, p & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return a, b, c, d


def random_bits(seed: int, purpose: Purpose, step: int, stream: int, positions: Tensor, count: int) -> Tensor:
    """Uniform 32-bit numbers for the images at `positions` of a step's global batch: int64 [B, count] on their device.

    `stream` keeps what an image needs for different ends apart. positions: int64 [B]; step and stream in 0 … 2³² − 1.
    """
    key = derived_seed(seed, purpose)
    index = torch.arange(-(-count // 4), device=positions.device)  # [count / 4]
    words = philox((index, stream, positions[:, None], step), (key & MASK, key >> 32))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]  # [B, count]


def uniform(bits: Tensor) -> Tensor:
    """32 random bits each → float32 in [0, 1), any shape: a multiple of 2⁻²⁴, so that nothing is rounded."""
    return (bits >> 8).float() * 2**-24


SEGMENTS = 32  # of each of the 32 octaves of p


@functools.lru_cache(maxsize=4)
def _normal_table(device: torch.device) -> Tensor:
    """Cubics a + b·f + c·f² + d·f³ for ∓Φ⁻¹(p) in units of 2⁻³¹: int64 [4, 2 · 32 · SEGMENTS], rows d, c, b, a.

    Segment s of octave e begins at p·2³³ = 2^e·(1 + s/SEGMENTS); f runs from 0 to 1 in it. The second half of a row has
    the other sign. The nodes are rounded to 2⁻³⁰, so coarsely that the last digits of a machine's logarithm do not
    matter; the cubics are within 2e-9 of the exact values.
    """
    ends = [2**octave * (1 + part / (3 * SEGMENTS)) for octave in range(32) for part in range(3 * SEGMENTS)]
    nodes = np.array([round(-NormalDist().inv_cdf(end / 2**33) * 2**30) for end in (*ends, 2**32)])
    y0, y1, y2, y3 = nodes[0:-1:3], nodes[1::3], nodes[2::3], nodes[3::3]  # at f = 0, 1/3, 2/3, 1
    d, c = 9 * (y3 - y0 + 3 * (y1 - y2)), 9 * (2 * y0 - 5 * y1 + 4 * y2 - y3)
    table = np.stack((d, c, -11 * y0 + 18 * y1 - 9 * y2 + 2 * y3, 2 * y0))
    with torch.inference_mode(False):  # the table outlives the caller, who may be in inference mode
        return torch.from_numpy(np.concatenate((table, -table), axis=1)).to(device)


def normal(bits: Tensor) -> Tensor:
    """32 random bits each → standard normal float32 numbers between −6.4 and 6.4, any shape.

    The inverse of the normal distribution function by table and interpolation (Cheung et al., IEEE Transactions on VLSI
    Systems 2007), all in integers: the logarithm and cosine of the Box–Muller method would differ in their last digits
    from device to device.
    """
    flat = bits.flatten()
    place = (
        ((flat & 2**31 - 1) * 2 + 1).double().view(torch.int64)
    )  # p·2³³, exactly; a float's bits begin with its log₂
    f = place >> 21 & 2**26 - 1  # in units of 2⁻²⁶
    segment = (place >> 47) + (flat >> 31) * (32 * SEGMENTS) - 1023 * SEGMENTS
    z = torch.zeros_like(f)
    for coefficient in _normal_table(bits.device):  # in place: allocating costs a CPU more than computing
        z.mul_(f).bitwise_right_shift_(26).add_(coefficient.index_select(0, segment))
    return z.float().mul_(2**-31).view_as(bits)


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
            left, right = right, left ^ (philox((right, number, 0, 0), (seed & MASK, seed >> 32))[0] & mask)
        index = left << half | right
        if index < size:
            return index
