"""Each figure against an independent computation: scipy, a loop in numpy, a sum over pairs, analytic answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from liquid_diffusion.errors import UserError
from liquid_diffusion.evaluation.metrics import (
    LinearClassifier,
    _GivenFeatures,
    compare,
    frechet_distance,
    kernel_distance,
    nearest_rows,
    precision_recall,
)


def features(count: int, width: int = 12, shift: float = 0.0, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, width, generator=draws) @ mix + shift


def direct_kernel_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """The definition, pair by pair."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def within(some: np.ndarray) -> float:
        return float(np.mean([kernel(x, y) for x, y in itertools.permutations(some, 2)]))

    mixed = np.mean([kernel(x, y) for x in real for y in generated])
    return within(real) + within(generated) - 2 * float(mixed)


def test_kernel_distance_is_its_definition() -> None:
    real, generated = features(23), features(31, shift=0.4, seed=1)
    found = kernel_distance(real, generated)
    assert found.value == pytest.approx(direct_kernel_distance(real.double().numpy(), generated.double().numpy()), 1e-6)


def test_standard_error_is_the_jackknife() -> None:
    real, generated = features(9).double().numpy(), features(14, shift=0.4, seed=1).double().numpy()
    variance = 0.0
    for i, some in enumerate((real, generated)):
        sets = [np.delete(some, j, axis=0) for j in range(len(some))]
        values = np.array([direct_kernel_distance(*((s, generated) if i == 0 else (real, s))) for s in sets])
        variance += (len(some) - 1) * float(values.var())
    found = kernel_distance(torch.from_numpy(real), torch.from_numpy(generated)).standard_error
    assert found == pytest.approx(variance**0.5, 1e-6)


@pytest.mark.parametrize(("shift", "least", "most"), [(1.0, 0.85, 1.15), (0.0, 1.2, 1.7)])
def test_standard_error_tells_how_far_other_draws_fall(shift: float, least: float, most: float) -> None:
    """Over its standard deviation in 150 independent draws: 1 for sets that differ, sqrt 2 for sets that do not."""
    found = [kernel_distance(torch.randn(60, 4), torch.randn(60, 4) + shift) for _ in range(150)]
    ratio = np.mean([estimate.standard_error for estimate in found]) / np.std([estimate.value for estimate in found])
    assert least < ratio < most


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_kernel_distance_equals_torchmetrics_and_is_zero_for_equal_distributions() -> None:
    real, generated = features(60), features(60, shift=0.3, seed=1)
    metric = KernelInceptionDistance(feature=_GivenFeatures(12), subsets=1, subset_size=60)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    assert kernel_distance(real, generated).value == pytest.approx(float(metric.compute()[0]), 1e-4)
    same = kernel_distance(features(400, 4), features(300, 4, seed=1))
    assert abs(same.value) < 3 * same.standard_error


def test_frechet_distance_equals_scipy_and_its_analytic_answer() -> None:
    real, generated = features(300), features(200, shift=0.5, seed=1)
    x, y = real.double().numpy(), generated.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(sqrtm(cov_x @ cov_y))
    expected = float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y - 2 * root))
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-4)
    # a shift of all by 2 in 12 features, and a doubling of all, of one and the same set
    assert frechet_distance(real, real + 2) == pytest.approx(48, rel=1e-6)
    moved = 2 * real - real.mean(0)
    assert frechet_distance(real, moved) == pytest.approx(float(np.trace(cov_x)), rel=1e-4)


def test_precision_and_recall_equal_a_search_through_all() -> None:
    real, generated = features(70, 3), features(50, 3, shift=1.0, seed=1)

    def share(x: np.ndarray, among: np.ndarray, k: int) -> float:
        inside = 0
        for point in x:
            for j, centre in enumerate(among):
                radius = sorted(np.linalg.norm(np.delete(among, j, 0) - centre, axis=1))[k - 1]
                if np.linalg.norm(point - centre) <= radius:
                    inside += 1
                    break
        return inside / len(x)

    x, y = real.double().numpy(), generated.double().numpy()
    precision, recall = precision_recall(real, generated, neighbours=2)
    assert precision == pytest.approx(share(y, x, 2))
    assert recall == pytest.approx(share(x, y, 2))
    assert 0 < precision < 1
    # one mode of two is precise but does not reach the other
    two = torch.cat([features(40, 3), features(40, 3, 50, seed=1)])
    precision, recall = precision_recall(two, features(80, 3, seed=2))
    assert precision > 0.8
    assert recall < 0.55


def test_nearest_rows_equal_a_direct_search() -> None:
    x, y = features(7), features(40, seed=1)
    direct = np.linalg.norm(x.numpy()[:, None].astype(float) - y.numpy()[None].astype(float), axis=2)
    for rank in (1, 3):
        distances, numbers = nearest_rows(x, y, rank)
        np.testing.assert_allclose(distances, np.sort(direct, 1)[:, rank - 1], atol=1e-6)
        np.testing.assert_array_equal(numbers, np.argsort(direct, 1)[:, rank - 1])


def test_classifier_reaches_the_best_that_can_be() -> None:
    """Two Gaussians at distance 2: nobody does better than Phi(1) = 84.1 %; shuffled labels are half right."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    x = torch.randn(4000, 5, generator=draws)
    x[:, 0] += 2 * labels
    assert LinearClassifier(x[:2000], labels[:2000], 0.1).accuracy(x[2000:], labels[2000:]) == pytest.approx(
        0.841, abs=0.02
    )
    shuffled = labels[torch.randperm(4000, generator=draws)]
    assert LinearClassifier(x[:2000], shuffled[:2000], 0.1).accuracy(x[2000:], shuffled[2000:]) < 0.55


def test_compare_takes_equal_numbers_where_it_matters() -> None:
    real, generated = features(200, 4), features(50, 4, 0.5, seed=1)
    facts = compare(real, generated)
    assert facts["fd_pictures"] == 50
    assert facts["fd"] == pytest.approx(frechet_distance(real[::4], generated))
    assert facts["kd"] == kernel_distance(real, generated).value
    some = compare(real, features(200, 4, seed=2), most=50)  # to stand beside the figures of 50
    assert some["fd_pictures"] == 50
    assert some["fd"] == pytest.approx(frechet_distance(real[::4], features(200, 4, seed=2)[::4]))
    with pytest.raises(UserError, match="at least 4 pictures on each side"):
        compare(real, generated[:3])
