"""Philox against its published values, and the distribution of what is made of its bits."""

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats
from scipy.special import ndtri

from pixnerd.randomness import Purpose, derived_seed, normal, permuted, philox, random_bits, uniform

KNOWN = [  # counter, key, words: kat_vectors of Random123, the authors' library, "philox4x32 10"
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def bits(positions=range(1), count=8, seed=0, step=0, stream=0, purpose=Purpose.TRAINING_STEP):
    return random_bits(seed, purpose, step, stream, torch.tensor(list(positions)), count)


def test_philox_gives_its_published_values():
    for counter, key, words in KNOWN:
        assert philox(counter, key) == words
    counters = tuple(torch.tensor(column) for column in zip(*(counter for counter, _, _ in KNOWN), strict=True))
    for place, (_, key, words) in enumerate(KNOWN):  # all counters in one call
        assert tuple(int(word[place]) for word in philox(counters, key)) == words


def test_every_image_has_its_own_bits_whatever_else_is_asked_for():
    whole = bits(range(6), 11)
    assert whole.shape == (6, 11)
    torch.testing.assert_close(bits([4, 2], 11), whole[[4, 2]], rtol=0, atol=0)
    torch.testing.assert_close(bits(range(6), 3), whole[:, :3], rtol=0, atol=0)
    others = [bits(range(6), 11, **key) for key in ({"seed": 1}, {"step": 1}, {"stream": 1})]
    others.append(bits(range(6), 11, purpose=Purpose.SAMPLE_NOISE))
    everything = torch.stack([whole, *others]).flatten()
    assert len(everything.unique()) == len(everything)  # 330 of 2³² numbers: two alike once in 80,000 seeds
    assert 0 <= everything.min() <= everything.max() < 2**32


def test_normal_is_the_inverse_of_the_distribution_function():
    """To float32's rounding, at both ends, at the borders of segments and in between, with either sign."""
    borders = torch.tensor([2**octave * (1 + part / 32) / 2 - 0.5 for octave in range(6, 32) for part in range(32)])
    magnitude = torch.cat((torch.arange(1000), 2**31 - 1 - torch.arange(1000), borders.long(), borders.long() + 1))
    magnitude = torch.cat((magnitude, bits(count=100_000)[0] >> 1))
    expected = torch.from_numpy(-ndtri((2 * magnitude.numpy() + 1) / 2**33)).float()
    torch.testing.assert_close(normal(magnitude), expected, rtol=1.2e-7, atol=3e-9)
    torch.testing.assert_close(normal(magnitude + 2**31), -expected, rtol=1.2e-7, atol=3e-9)
    assert normal(magnitude).dtype == torch.float32


def test_committed_values():
    """The same on every machine, device and version of torch."""
    words = bits([7], 4, seed=3, step=5)
    assert words.tolist() == [[1379917511, 732739725, 3615243224, 1091290583]]
    expected = ["0x1.db3dbe0000000p-2", "0x1.e74fb80000000p-1", "-0x1.a181820000000p-2", "0x1.52c8a60000000p-1"]
    assert [value.hex() for value in normal(words)[0].tolist()] == expected
    assert uniform(torch.tensor([0, 255, 256, 2**32 - 1])).tolist() == [0, 0, 2**-24, 1 - 2**-24]


def test_runs_go_on_with_the_streams_and_the_order_that_they_began_with():
    """Committed values again: a number that changed would change the rest of every run that is resumed."""
    names = ("INITIAL_WEIGHTS", "DATA_ORDER", "TRAINING_STEP", "SAMPLE_NOISE", "SYNTHETIC_IMAGE", "DECODE_SIZE")
    names += ("PROJECTOR_WEIGHTS", "TEACHER_PATH", "PATH_CHOICE")
    assert {purpose.name: int(purpose) for purpose in Purpose} == {name: i for i, name in enumerate(names)}
    assert derived_seed(3, Purpose.DATA_ORDER, 1, 7) == 2417505972622489752
    assert [permuted(index, 1000, 3) for index in range(6)] == [104, 874, 222, 21, 133, 591]
    assert permuted(12345, 45_000_000, 2**40 + 5) == 5321747


@pytest.mark.parametrize(("make", "distribution"), [(normal, stats.norm), (uniform, stats.uniform)])
def test_distribution_and_independence(make, distribution):
    """Moments within four standard errors, Kolmogorov–Smirnov, and no correlation with whatever is next to it."""
    values = make(bits(range(64), 4096)).double()  # [B, n]
    n = values.numel()
    for order in (1, 2, 3, 4):
        spread = math.sqrt((distribution.moment(2 * order) - distribution.moment(order) ** 2) / n)
        assert abs(values.pow(order).mean() - distribution.moment(order)) < 4 * spread
    assert stats.kstest(values.flatten().numpy(), distribution.cdf).pvalue > 1e-3
    standard = (values - distribution.mean()) / distribution.std()
    neighbours = [standard, *(make(bits(range(64), 4096, **key)).double() for key in ({"step": 1}, {"seed": 1}))]
    neighbours = [(other - other.mean()) / other.std() for other in neighbours]
    products = [a * b for a, b in pairwise(neighbours)]  # the next step, another seed
    products += [standard[:, 1:] * standard[:, :-1], standard[1:] * standard[:-1]]  # the next number, the next image
    for product in products:
        assert abs(product.mean()) < 4 / math.sqrt(product.numel())
