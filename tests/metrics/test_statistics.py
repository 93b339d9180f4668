import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

from pixnerd import InputError
from pixnerd.metrics import statistics
from pixnerd.metrics.statistics import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    retrieval_ranks,
    squared_distances,
    wilson_interval,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(features, batches=3):
    found = Moments(features.shape[1])
    for batch in features.tensor_split(batches):
        found.add(batch)
    return found


def test_moments_of_batches_are_those_of_numpy():
    features = 5 + random(101, 7) @ random(7, 7, seed=1)
    found = moments(features)
    assert found.count == 101
    np.testing.assert_allclose(found.mean, features.numpy().mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-11)


def test_moments_keep_their_digits_in_float32_batches_far_from_zero():
    features = (1000 + random(5000, 3)).float()
    np.testing.assert_allclose(
        moments(features, 50).covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-6, atol=1e-6
    )


@given(st.floats(0.1, 3), st.floats(0.1, 3), st.floats(-2, 2))
def test_frechet_distance_of_known_gaussians(a, b, shift):
    """For Gaussians with commuting covariances it is |Δμ|² + Σ (√λ − √λ')², even under a common rotation."""
    turn = torch.linalg.qr(random(4, 4)).Q
    first, second = torch.tensor([a, 1.0, 2.0, 0.0]).double(), torch.tensor([b, 3.0, 2.0, 0.5]).double()
    mean = torch.full((4,), shift).double()
    distance = frechet_distance(0 * mean, turn * first @ turn.T, mean, turn * second @ turn.T)
    expected = 4 * shift**2 + float((first.sqrt() - second.sqrt()).square().sum())
    assert distance == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_is_torch_fidelitys_and_symmetric():
    first, second = random(300, 20), 0.5 + 2 * random(200, 20, seed=1) @ random(20, 20, seed=2)
    ours = [(found.mean, found.covariance) for found in map(moments, (first, second))]
    theirs = [metric_fid.fid_features_to_statistics(features) for features in (first, second)]
    expected = metric_fid.fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    assert frechet_distance(*ours[0], *ours[1]) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*ours[1], *ours[0]) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*ours[0], *ours[0]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_images_than_features_is_torch_fidelitys():
    """Singular covariances, where a general matrix root becomes complex and an eigenvalue slightly negative."""
    first, second = random(12, 40), 1 + random(15, 40, seed=1)
    ours = [(found.mean, found.covariance) for found in map(moments, (first, second))]
    theirs = [metric_fid.fid_features_to_statistics(features) for features in (first, second)]
    expected = metric_fid.fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    assert frechet_distance(*ours[0], *ours[1]) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_is_torch_fidelitys():
    first, second = random(60, 9), 0.3 + random(80, 9, seed=1)
    options = {"kid_subsets": 10, "kid_subset_size": 50, "rng_seed": 2020, "verbose": False}
    options |= {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1}
    theirs = metric_kid.kid_features_to_metric(first, second, kid_kernel_poly_gamma=None, **options)
    assert kernel_distance(first, second, 10, 50) == pytest.approx(tuple(theirs.values()), rel=1e-12)


def test_kernel_distance_is_unbiased():
    """For two sets from one distribution it is 0 on average, which it would not be without the correction."""
    both = random(4000, 5).split(2000)
    distance = kernel_distance(*both, subsets=200, subset_size=40)
    assert abs(distance.mean) < 3 * distance.deviation / math.sqrt(200) + 0.02
    assert distance.deviation > 0
    kernel = (both[0] @ both[0].T / 5 + 1) ** 3
    assert float(kernel.diagonal().mean()) / 40 > 0.1  # what the diagonal would add


def test_inception_score_is_torch_fidelitys_of_the_permuted_images(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 30)
    logits = 3 * random(90, 11)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    theirs = metric_isc.isc_features_to_metric(logits[order], splits=3, shuffle=False)
    assert inception_score(logits) == pytest.approx(tuple(theirs.values()), rel=1e-12)


def test_inception_score_of_sure_and_even_classes_is_their_number_in_any_order(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 5000)
    logits = 1e3 * torch.eye(10).repeat_interleave(1000, 0)  # sorted by class: a chunk would see five of them
    assert inception_score(logits).mean == pytest.approx(10, rel=1e-2)
    assert inception_score(torch.zeros(100, 10)).mean == pytest.approx(1)


@pytest.mark.parametrize("block", [7, 1000])
def test_precision_and_recall_are_torch_fidelitys(monkeypatch, block):
    monkeypatch.setattr(statistics, "BLOCK", block)
    real, sampled = random(60, 4), 0.4 + 1.2 * random(50, 4, seed=1)
    theirs = metric_prc.calculate_precision_recall_full(sampled, real)
    assert precision_recall(real, sampled, half=False) == pytest.approx(theirs, abs=1e-6)
    assert 0.2 < theirs[0] < 0.95  # neither side of the comparison is trivial
    assert theirs[0] != theirs[1]
    assert precision_recall(real, real, half=False) == (1, 1)
    assert precision_recall(real, 100 + sampled) == (0, 0)


def test_distances_are_halved_in_precision_only_where_they_stay_finite():
    small, large = random(5, 8).float(), 300 * random(5, 8).float()
    exact = torch.cdist(small, small).square()
    halved = squared_distances(small, small, True)
    assert 0 < (halved - exact).abs().max() < 0.05
    torch.testing.assert_close(squared_distances(small, small, False), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(squared_distances(large, large, True), squared_distances(large, large, False))


@pytest.mark.parametrize("radius", [0.1, 0.3])  # whose halves are smaller and larger
@pytest.mark.parametrize("half", [True, False])
def test_a_ball_reaches_exactly_to_the_third_neighbour(radius, half):
    """Two points at one distance from a centre, one of which is its third neighbour: both distances round alike."""
    steps = radius + 0.01 * torch.arange(4)  # three more centres on each axis beyond the three neighbours of 0
    neighbours = (torch.eye(3)[:, None] * steps[None, :, None]).flatten(0, 1)
    centres = torch.cat((torch.zeros(1, 3), neighbours))
    samples = torch.cat((-radius * torch.eye(3), -1.1 * radius * torch.eye(3)))
    assert precision_recall(centres, samples, half).precision == 0.5


def test_a_retrieval_rank_counts_the_images_that_are_nearer():
    true = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-3.0, 0.0]])
    sampled = torch.tensor([[5.0, 1.0], [0.1, 1.0], [0.0, 2.0], [1.0, 0.1]])  # by angle alone, whatever the length
    assert retrieval_ranks(sampled, true).tolist() == [0, 1, 0, 3]
    with pytest.raises(InputError, match=r"shapes \(4, 2\) and \(3, 2\) differ: they need the same captions"):
        retrieval_ranks(sampled, true[:3])


def test_moments_are_shared_by_adding_sums():
    found, features = moments(random(10, 3)), random(10, 3)
    found.share(SimpleNamespace(sum=lambda tensor: 2 * tensor))  # a second process that saw the same
    assert found.count == 20
    np.testing.assert_allclose(found.mean, features.numpy().mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(np.tile(features.numpy(), (2, 1)), rowvar=False))


def test_too_few_images_are_refused():
    few = random(3, 4)
    with pytest.raises(InputError, match="at least 4 images on each side; there are 3 real and 9 sampled"):
        precision_recall(few, random(9, 4))
    with pytest.raises(InputError, match="2 images or more on each side; there are 1, 3"):
        kernel_distance(few[:1], few)
    with pytest.raises(InputError, match="at least 2 images; there are 1"):
        _ = moments(few[:1], 1).covariance


@pytest.mark.parametrize(("count", "total"), [(0, 1), (0, 64), (45, 64), (64, 64), (181, 200)])
def test_wilson_interval_is_scipys(count, total):
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(count, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("count", "total"), [(0, 0), (-1, 4), (5, 4)])
def test_what_is_no_share_is_refused(count, total):
    with pytest.raises(InputError, match=f"{count} of {total} is no share"):
        wilson_interval(count, total)
