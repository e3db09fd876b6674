"""Distances of two sets of pictures by vectors of features, in float64: of their kernel means, of fitted Gaussians.

Both are estimates from the pictures at hand. How far off they may be is seen from halves of the sets: subsets of m of n
pictures, drawn without replacement, vary by m / (n - m) of the variance with which the whole would, drawn again (the
delete-d jackknife, Shao and Wu 1989).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from calib.base.errors import CalibError
from calib.base.progress import Progress
from calib.base.seeds import generator

import numpy as np
from numpy.typing import NDArray

#: Subsets of kernel distances and pictures in each at most, as Bińkowski et al. have them.
SUBSETS, SUBSET_SIZE = 100, 1000
#: Pictures of either set up to which the kernel of all pairs is computed once: 100 MB.
MOST_AT_ONCE = 2000
#: Of CMMD's kernel.
SIGMA = 10
#: Halves of Fréchet distances.
HALVES = 10
#: Pictures below which a half has no covariance.
FEWEST = 4
#: Pictures below which a Fréchet distance says little by itself: its bias is about that of the literature's figures.
FEW_PICTURES = 10_000
#: Of a normal distribution: 95% lie within so many standard deviations.
TWO_SIDED = 1.959964

Vectors: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.int64]
#: A kernel of the rows of two matrices, for each pair of rows.
Kernel: TypeAlias = Callable[[Vectors, Vectors], Vectors]
#: A number of two sets of vectors.
Distance: TypeAlias = Callable[[NDArray[Any], NDArray[Any]], float]


@dataclass(frozen=True)
class SetDistance:
    """A distance of two sets with its 95% interval; ``further`` figures by the end of their key; ``notes`` for people.

    Attributes:
        text: what to say behind the value, '' for nothing.
    """

    value: float
    low: float
    high: float
    further: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    notes: tuple[str, ...] = ()

    def summary(self, name: str) -> dict[str, float]:
        """Flat numbers for ``metrics.json``."""
        ends = {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}
        return ends | {f"{name}_{key}": value for key, value in self.further.items()}


def cubic(a: Vectors, b: Vectors) -> Vectors:
    """KID's kernel, (a·b / length + 1)³."""
    found: Vectors = (a @ b.T / a.shape[1] + 1) ** 3
    return found


def gaussian(a: Vectors, b: Vectors) -> Vectors:
    """CMMD's kernel and factor, 1000 exp(-‖a - b‖² / 2σ²) with σ = 10, of rows of unit length (arXiv 2401.09603)."""
    squares = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1) - 2 * (a @ b.T)
    found: Vectors = 1000 * np.exp(squares / (-2 * SIGMA**2))
    return found


def kernel_distance(
    x: NDArray[Any], y: NDArray[Any], paired: bool, progress: str = "", kernel: Kernel = cubic
) -> SetDistance:
    """KID of the rows of ``x`` and ``y`` (arXiv 1801.01401): the mean of :func:`mmd` over subsets, and its spread.

    With another ``kernel`` it is another distance, estimated alike.

    ``paired``: rows of one number belong together, as those of one prompt and seed do; subsets take the same of both.
    """
    x, y = _checked(x, y)
    n = min(len(x), len(y))
    size = min(SUBSET_SIZE, n // 2)
    if max(len(x), len(y)) <= MOST_AT_ONCE:
        within_x, within_y, between = kernel(x, x), kernel(y, y), kernel(x, y)

        def distance(i: Rows, j: Rows) -> float:
            return _mmd(within_x[np.ix_(i, i)], within_y[np.ix_(j, j)], between[np.ix_(i, j)], paired)
    else:

        def distance(i: Rows, j: Rows) -> float:
            return mmd(x[i], y[j], paired, kernel)

    found = _of_subsets(distance, len(x), len(y), paired, size / n, SUBSETS, progress, most=size)
    return from_subsets(float(found.mean()), float(found.std(ddof=1)), size, n)


def from_subsets(value: float, spread: float, size: int, n: int, notes: tuple[str, ...] = ()) -> SetDistance:
    """A distance that is the mean over subsets of ``size`` of ``n`` pictures, by their standard deviation."""
    reach = TWO_SIDED * spread * math.sqrt(size / (n - size))
    further, text = {"std": spread, "subset_size": float(size)}, f"± {spread:.2g} over subsets of {size} pictures"
    return SetDistance(value, value - reach, value + reach, further, text, notes)


def mmd(x: Vectors, y: Vectors, paired: bool = False, kernel: Kernel = cubic) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy, a U-statistic.

    The mean of k(x, x') + k(y, y') - 2 k(x, y) over different rows; of equal distributions it is 0, and single values
    may lie below. Of ``paired`` sets a row's own partner is left out of the third term, too (Gretton et al. 2012, eq.
    4): it is like it, and would make the estimate too low by what all pairs have in common.
    """
    return _mmd(kernel(x, x), kernel(y, y), kernel(x, y), paired)


def _mmd(within_x: Vectors, within_y: Vectors, between: Vectors, paired: bool) -> float:
    third = _mean_of_different(between) if paired else float(between.mean())
    return _mean_of_different(within_x) + _mean_of_different(within_y) - 2 * third


def _mean_of_different(kernel: Vectors) -> float:
    """The mean of a square matrix without its diagonal."""
    count = len(kernel)
    return float(kernel.sum() - np.trace(kernel)) / (count * (count - 1))


def frechet_distance(x: NDArray[Any], y: NDArray[Any], paired: bool, progress: str = "") -> SetDistance:
    """:func:`frechet` of the rows of ``x`` and ``y``, with what it would be of infinitely many."""
    return unbiased_by_halves(frechet, *_checked(x, y), paired, progress)


def unbiased_by_halves(
    distance: Distance,
    x: NDArray[Any],
    y: NDArray[Any],
    paired: bool,
    progress: str,
    count: int = HALVES,
    two_sided: float = TWO_SIDED,
) -> SetDistance:
    """A Fréchet distance of the rows of ``x`` and ``y``, with what it would be of infinitely many (arXiv 1911.07023).

    Its bias goes with 1/n, so that of halves is twice that of the whole: 2 F(n) - F(n/2) is free of it. With fewer
    rows in a half than columns it falls more slowly than 1/n, and much of it is left: then that is a bound from above,
    and said so. ``count`` halves; 95% lie within ``two_sided`` of the standard deviations that so many give.
    """
    whole, halves = _with_halves(distance, x, y, paired, progress, count)
    unbiased, spread = 2 * whole - float(halves.mean()), float(halves.std(ddof=1))
    n, features = min(len(x), len(y)), x.shape[1]
    enough = n // 2 >= features
    least = "" if enough else f" at least, as there are not twice as many as the {features} features"
    bias = f"a Fréchet distance is biased, here by about {whole - unbiased:+.3g}{least}"
    return SetDistance(
        whole,
        max(0.0, whole - two_sided * spread),
        whole + two_sided * spread,
        {"unbiased": unbiased, "std": spread},
        f"about {unbiased:.4g}{'' if enough else ' or less'} if there were infinitely many pictures",
        _of_few(n, bias),
    )


def share_by_halves(share: Distance, x: NDArray[Any], y: NDArray[Any], paired: bool, progress: str) -> SetDistance:
    """A share, 0 to 1, of two sets of rows; it depends on how many there are."""
    whole, halves = _with_halves(share, x, y, paired, progress)
    spread = float(halves.std(ddof=1))
    # All of n may be so by chance where as much as 3/n of what they are drawn from is not.
    reach = max(TWO_SIDED * spread, 3 / min(len(x), len(y)))
    ends = max(0.0, whole - reach), min(1.0, whole + reach)
    text, moved = f"± {spread:.2g} over halves", f"it depends on their number: of halves it is {halves.mean():.4f}"
    return SetDistance(whole, *ends, {"std": spread}, text, _of_few(min(len(x), len(y)), moved))


def _with_halves(
    distance: Distance, x: NDArray[Any], y: NDArray[Any], paired: bool, progress: str, count: int = HALVES
) -> tuple[float, NDArray[np.float64]]:
    """``distance`` of the whole, and of random halves, which vary as much as the whole would, drawn again."""
    whole = distance(x, y)
    return whole, _of_subsets(lambda i, j: distance(x[i], y[j]), len(x), len(y), paired, 0.5, count, progress)


def _of_few(n: int, what: str) -> tuple[str, ...]:
    """A note on a figure of ``n`` pictures, where these are few."""
    if n >= FEW_PICTURES:
        return ()
    return (f"of {n} pictures {what}; with fewer than {FEW_PICTURES:,} compare it only with those of as many pictures",)


def frechet(x: Vectors, y: Vectors) -> float:
    """‖μ_x - μ_y‖² + tr(Σ_x + Σ_y - 2 (Σ_x Σ_y)^½), with covariances of n - 1.

    With Σ = AᵀA the trace of the root is the sum of the singular values of A_x A_yᵀ: real, never negative, also where
    there are fewer pictures than features, and no root of a matrix is taken.
    """
    from scipy import linalg  # slow to import

    (mean_x, a), (mean_y, b) = (_factor(rows) for rows in (x, y))
    root = float(linalg.svdvals(a @ b.T).sum())
    return float(np.sum((mean_x - mean_y) ** 2) + np.sum(a * a) + np.sum(b * b)) - 2 * root


def _factor(rows: Vectors) -> tuple[Vectors, Vectors]:
    """The mean, and a matrix A with AᵀA the covariance, of no more rows than columns."""
    from scipy import linalg

    mean = rows.mean(axis=0)
    centred = (rows - mean) / math.sqrt(len(rows) - 1)
    if len(centred) > centred.shape[1]:
        centred = linalg.qr(centred, mode="r")[0][: centred.shape[1]]
    return mean, centred


def _checked(x: NDArray[Any], y: NDArray[Any]) -> tuple[Vectors, Vectors]:
    n = min(len(x), len(y))
    if n < FEWEST:
        raise CalibError(f"a distance of two sets needs {FEWEST} pictures of each or more; there are {n}")
    return x.astype(np.float64), y.astype(np.float64)


def _of_subsets(
    distance: Callable[[Rows, Rows], float],
    m: int,
    n: int,
    paired: bool,
    share: float,
    count: int,
    progress: str,
    most: int | None = None,
) -> NDArray[np.float64]:
    """``distance`` of ``count`` random subsets with a ``share`` of ``m`` and ``n`` rows, ``most`` at most."""
    rng, found = generator("seed", 0), []
    first, second = (min(most or total, max(2, round(share * total))) for total in (m, n))
    with Progress(progress, count, "subset", delay=2) as shown:
        for _ in range(count):
            rows = rng.permutation(m)[:first]
            found.append(distance(rows, rows if paired else rng.permutation(n)[:second]))
            shown.advance()
    return np.array(found)
