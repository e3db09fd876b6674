"""Statistics of one layer's activations on the host, which merge exactly.

Counts, extremes and histograms are exact. Moments are Σx and Σx² in 106 bits (:mod:`calib.activations.double_double`),
so that images, steps, batches and shards merged in any order give the same mean and standard deviation. The device
returns shifted sums (Chan, Golub, LeVeque 1983, section 3), which lose no digits where the mean is large relative to
the spread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from calib.activations import double_double
from calib.activations.histogram import Histogram, merge_histograms

import numpy as np
from numpy.typing import NDArray

#: Share of Σx² below which Σ(x - mean)² is rounding: above the rounding of double-double numbers, and far below any
#: spread that float32 can show.
_ROUNDING = 2.0**-95

PERCENTILES = {"p001": 0.1, "p01": 1.0, "p05": 5.0, "p50": 50.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}


@dataclass
class Moments:
    """Σx and Σx² of each channel as double-double numbers: (4, …, channels) float64, Σx, remainder, Σx², remainder."""

    sums: NDArray[np.float64]

    @classmethod
    def zero(cls, channels: int) -> Self:
        return cls(np.zeros((4, channels)))

    @classmethod
    def shifted(
        cls,
        count: NDArray[np.float64],
        shift: NDArray[np.float64],
        first: NDArray[np.float64],
        second: NDArray[np.float64],
        scale: NDArray[np.float64] | None = None,
    ) -> Self:
        """Moments from Σd and Σd² of d = x / scale - shift over ``count`` values; each (channels,)."""
        base = double_double.two_product(count, shift)
        nothing = np.zeros_like(first)
        total = double_double.add(base, (first, nothing))
        # Σ(d + shift)² = Σd² + shift (2 Σd + count shift)
        inner = double_double.add(base, (2 * first, nothing))
        square = double_double.add(double_double.multiply(inner, (shift, nothing)), (second, nothing))
        if scale is not None:
            total = double_double.multiply(total, (scale, nothing))
            square = double_double.multiply(square, double_double.two_product(scale, scale))
        return cls(np.stack([*total, *square]))

    @classmethod
    def of(cls, count: NDArray[np.uint64], mean: NDArray[np.float64], std: NDArray[np.float64]) -> Self:
        """Moments from the mean and the standard deviation (population) of each channel."""
        wide, nothing = count.astype(np.float64), np.zeros_like(mean)
        high, low = double_double.two_product(wide, mean)
        total = high + 0.0, low  # without the sign of a zero, as a sum
        square = double_double.add(double_double.multiply(total, (mean, nothing)), (std**2 * wide, nothing))
        return cls(np.stack([*total, *square]))

    def merge(self, other: "Moments") -> "Moments":
        sums = np.empty_like(self.sums)
        sums[0::2], sums[1::2] = double_double.add(
            (self.sums[0::2], self.sums[1::2]), (other.sums[0::2], other.sums[1::2])
        )
        return Moments(sums)

    def mean(self, count: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Mean of each channel; 0 where nothing was counted."""
        return double_double.divide((self.sums[0], self.sums[1]), np.maximum(count, 1).astype(np.float64))[0]

    def m2(self, count: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Σ(x - mean)² of each channel."""
        total, square = (self.sums[0], self.sums[1]), (self.sums[2], self.sums[3])
        taken = double_double.divide(double_double.multiply(total, total), -np.maximum(count, 1).astype(np.float64))
        left = double_double.add(square, taken)[0]
        # The remainder of a constant channel is the rounding of 106 bits, not a spread.
        result: NDArray[np.float64] = np.where(left > _ROUNDING * square[0], left, 0)
        return result

    def std(self, count: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Standard deviation (population) of each channel."""
        deviation: NDArray[np.float64] = np.sqrt(self.m2(count) / np.maximum(count, 1))
        return deviation


@dataclass
class Statistics:
    """Statistics of one layer over any set of values; arrays are (channels,).

    ``count`` is the number of finite values of each channel; ``nan`` and ``inf`` count the others over all channels.
    """

    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]
    count: NDArray[np.uint64]
    moments: Moments
    histogram: Histogram
    nan: int = 0
    inf: int = 0

    @property
    def channels(self) -> int:
        return len(self.count)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of each channel."""
        return self.moments.mean(self.count)

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation (population) of each channel."""
        return self.moments.std(self.count)

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of the union of both sets of values."""
        return merge_all([self, other])

    def extremes(self) -> tuple[float, float]:
        """(min, max) over all channels; NaNs where there is no finite value."""
        if not self.count.any():
            return np.nan, np.nan
        return float(self.minimum.min()), float(self.maximum.max())

    def over_channels(self) -> tuple[float, float, float, float, int]:
        """(min, max, mean, std, number of values) over all channels; NaNs and 0 where there is no finite value."""
        total = int(self.count.sum())
        if not total:
            return (np.nan, np.nan, np.nan, np.nan, 0)
        means = self.mean
        mean = float((means * self.count).sum() / total)
        m2 = float((self.moments.m2(self.count) + self.count * (means - mean) ** 2).sum())
        return *self.extremes(), mean, float(np.sqrt(m2 / total)), total

    def percentiles(self) -> dict[str, float]:
        """The standard percentiles by name, clipped to the exact min and max."""
        values = np.clip(self.histogram.percentiles(list(PERCENTILES.values())), *self.extremes())
        return {name: float(value) for name, value in zip(PERCENTILES, values, strict=True)}


def merge_all(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of the union of one or more sets of values."""
    moments = parts[0].moments
    for part in parts[1:]:
        moments = moments.merge(part.moments)
    return Statistics(
        np.minimum.reduce([part.minimum for part in parts]),
        np.maximum.reduce([part.maximum for part in parts]),
        np.add.reduce([part.count for part in parts]),
        moments,
        merge_histograms([part.histogram for part in parts]),
        sum(part.nan for part in parts),
        sum(part.inf for part in parts),
    )


def stacked_moments(parts: Sequence[Statistics]) -> Moments:
    """Moments of all parts in one array, (4, parts, channels)."""
    return Moments(np.stack([part.moments.sums for part in parts], axis=1))
