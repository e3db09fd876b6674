"""Distances of two sets of vectors, against plain implementations in float64."""

import math
from collections.abc import Callable
from itertools import product

from calib.base.errors import CalibError
from calib.evaluation import sets
from calib.evaluation.sets import (
    Kernel,
    SetDistance,
    cubic,
    frechet,
    frechet_distance,
    gaussian,
    kernel_distance,
    mmd,
)

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import linalg


def sample(count: int, length: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> NDArray[np.float64]:
    """Rows of a normal distribution with a covariance of its own."""
    mix = np.random.RandomState(length).randn(length, length) / math.sqrt(length)
    return shift + scale * np.random.RandomState(seed).randn(count, length) @ mix


#: KID's kernel and CMMD's, of two vectors.
KERNELS: dict[Kernel, Callable[[NDArray[np.float64], NDArray[np.float64]], float]] = {
    cubic: lambda a, b: float((a @ b / len(a) + 1) ** 3),
    gaussian: lambda a, b: 1000 * math.exp(-(math.dist(a, b) ** 2) / (2 * 10**2)),
}


def mmd_by_hand(x: NDArray[np.float64], y: NDArray[np.float64], paired: bool = False, by: Kernel = cubic) -> float:
    """Eq. 4 of arXiv 1801.01401, term by term; of pairs eq. 4 of Gretton et al. 2012."""
    kernel = KERNELS[by]
    m, n = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i, j in product(range(m), repeat=2) if i != j) / (m * (m - 1))
    within_y = sum(kernel(y[i], y[j]) for i, j in product(range(n), repeat=2) if i != j) / (n * (n - 1))
    between = [kernel(x[i], y[j]) for i, j in product(range(m), range(n)) if i != j or not paired]
    return within_x + within_y - 2 * sum(between) / len(between)


def frechet_by_hand(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """As FID is defined, by a root of the product of covariances."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(a @ b).real
    return float(np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + np.trace(a + b - 2 * root))


SHAPES = [(30, 30, 5, 0.5, 1.0), (40, 25, 8, 0.0, 1.5), (60, 60, 12, 0.2, 0.7), (20, 33, 3, 1.0, 1.0)]


@pytest.mark.parametrize(("m", "n", "length", "shift", "scale"), SHAPES)
def test_distances_are_those_by_hand(m: int, n: int, length: int, shift: float, scale: float) -> None:
    x, y = sample(m, length, 0), sample(n, length, 1, shift, scale)
    few = min(m, n)
    for kernel in KERNELS:
        assert mmd(x, y, False, kernel) == pytest.approx(mmd_by_hand(x, y, False, kernel), rel=1e-9)
        paired = mmd_by_hand(x[:few], y[:few], True, kernel)
        assert mmd(x[:few], y[:few], True, kernel) == pytest.approx(paired, rel=1e-9)
    assert frechet(x, y) == pytest.approx(frechet_by_hand(x, y), rel=1e-8)


def test_a_frechet_distance_of_fewer_pictures_than_features() -> None:
    """Where covariances are singular: as of the same points within the space that they span, and 0 of equal sets."""
    x, y = sample(10, 40, 0), sample(12, 40, 1, 0.3)
    basis = linalg.qr(np.concatenate([x, y]).T, mode="economic")[0]
    assert frechet(x, y) == pytest.approx(frechet(x @ basis, y @ basis), rel=1e-10)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_what_would_be_of_infinitely_many_is_said_as_far_as_is_known(paired: bool) -> None:
    """With fewer in a half than features what is extrapolated is far too high yet; with more it is near the truth."""
    length, shift = 40, 0.05
    true = length * shift**2 + paired * length * (1 - math.sqrt(1.01)) ** 2
    for count, enough in ((40, False), (400, True)):
        x = np.random.RandomState(0).randn(count, length)
        other = np.random.RandomState(1).randn(count, length)
        found = frechet_distance(x, shift + (x + 0.1 * other if paired else other), paired)
        assert ("or less" in found.text) != enough and ("at least" in found.notes[0]) != enough
        beyond = found.further["unbiased"] - true
        assert abs(beyond) < 0.25 * found.value if enough else beyond > true


def test_kernel_distance_is_unbiased_and_frechet_distance_is_made_so() -> None:
    """Of many pairs of sets of one distribution: KID averages to 0; FD does not, and extrapolated it nearly does."""
    kernel, whole, unbiased = [], [], []
    for seed in range(40):
        x, y = sample(60, 6, 2 * seed), sample(60, 6, 2 * seed + 1)
        kernel.append(mmd(x, y))
        found = frechet_distance(x, y, paired=False)
        whole.append(found.value)
        unbiased.append(found.further["unbiased"])
    error = np.std(kernel) / math.sqrt(len(kernel))
    assert abs(np.mean(kernel)) < 3 * error
    assert np.mean(whole) > 0.1
    assert abs(np.mean(unbiased)) < 0.25 * np.mean(whole)


@pytest.mark.parametrize("distance", [kernel_distance, frechet_distance])
def test_intervals_hold_what_another_sample_gives(distance: Callable[..., SetDistance]) -> None:
    """The spread of 30 estimates from new samples is that which one of them says of itself, within a factor of 1.6."""
    found = [distance(sample(80, 4, 2 * s), sample(80, 4, 2 * s + 1, 0.8), False) for s in range(30)]
    spread = np.std([own.value for own in found])
    said = np.mean([(own.high - own.value) / 1.96 for own in found])
    assert spread / 1.6 < said < spread * 1.6


def test_pairs_are_compared_as_pairs() -> None:
    """Of pictures that differ little from their own: no bias where both are of one distribution, and less spread."""
    found = []
    for seed in range(30):
        x, noise = sample(60, 4, 2 * seed), sample(60, 4, 2 * seed + 1)
        found.append((x, 0.96 * x + 0.28 * noise))  # 0.96² + 0.28² = 1: the distribution stays
    values = [mmd(x, y, paired=True) for x, y in found]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))
    assert np.mean([mmd(x, y) for x, y in found]) < -5 * np.std(values) / math.sqrt(len(values)), "as if they were none"
    for distance in (kernel_distance, frechet_distance):
        paired, apart = (distance(*found[0], whether) for whether in (True, False))
        assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


def test_few_pictures_are_warned_of_or_refused() -> None:
    found = frechet_distance(sample(20, 4, 0), sample(20, 4, 1), paired=False)
    assert (
        "of 20 pictures a Fréchet distance is biased, here by about +" in found.notes[0] and "10,000" in found.notes[0]
    )
    assert kernel_distance(sample(4, 3, 0), sample(9, 3, 1), paired=False).further["subset_size"] == 2
    for distance in (kernel_distance, frechet_distance):
        with pytest.raises(CalibError, match="needs 4 pictures of each or more; there are 3"):
            distance(sample(3, 4, 0), sample(20, 4, 1), paired=False)


def test_a_kernel_computed_by_subset_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = sample(30, 4, 0), sample(30, 4, 1, 0.5)
    for paired in (True, False):
        at_once = kernel_distance(x, y, paired)
        with monkeypatch.context() as patch:
            patch.setattr(sets, "MOST_AT_ONCE", 0)
            assert kernel_distance(x, y, paired).value == pytest.approx(at_once.value, rel=1e-10)


def test_the_same_sets_give_the_same_figures() -> None:
    x, y = sample(30, 4, 0), sample(40, 4, 1, 0.5)
    for distance in (kernel_distance, frechet_distance):
        assert distance(x, y, False).summary("d") == distance(x, y, False).summary("d")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_is_never_certain(share: float) -> None:
    """Also where all halves agree: of 20 in 20 as much as 3 in 20 of the rest may be otherwise."""
    x = np.zeros((20, 2))
    found = sets.share_by_halves(lambda i, j: share, x, x, True, "")
    assert (found.low, found.high) == pytest.approx((max(0, share - 0.15), min(1, share + 0.15)))
    assert "with fewer than 10,000" in found.notes[0]
