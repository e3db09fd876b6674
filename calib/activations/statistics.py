"""Streaming statistics of one layer's activations: summarised on the device, merged exactly on the host.

One forward gives one :func:`summarize` per tap, evaluated together. Merging is by addition, min and max, and by
Chan's parallel update for mean and variance (Chan, Golub, LeVeque 1983, equation 2.1) in float64, so any split
over images, batches or steps gives the same counts, extremes and histograms, and the same moments to rounding.
"""

from dataclasses import dataclass
from typing import Self

from calib.activations.histogram import DTYPES, Histogram, count_keys

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

PERCENTILES = {"p001": 0.1, "p01": 1.0, "p05": 5.0, "p50": 50.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}


def sampled_rows(rows: int, wanted: int | None, phase: float) -> mx.array | None:
    """Indices of ``wanted`` evenly spaced rows of ``rows``, shifted by ``phase`` in [0, 1); None stands for all."""
    if wanted is None or wanted >= rows:
        return None
    return mx.array(np.floor((np.arange(wanted) + phase) * rows / wanted).astype(np.uint32))


def summarize(
    x: mx.array, histogram_rows: int | None = None, phase: float = 0.0, finite_only: bool = False
) -> dict[str, mx.array]:
    """Lazy statistics of ``x`` (…, channels): per-channel min, max, count, mean and m2 of every value, a histogram.

    The histogram counts ``histogram_rows`` evenly spaced rows (all where None).

    ``m2`` is Σ(x - mean)², summed about the batch's own mean, so that a mean large against the spread costs no
    accuracy. The plain version is for finite data; a non-finite mean betrays NaN, infinity or overflow, and the
    caller repeats with ``finite_only=True``, which leaves NaN and infinities out and counts them.
    """
    rows = x.reshape(-1, x.shape[-1])
    wide = rows.astype(mx.float32)
    chosen = sampled_rows(rows.shape[0], histogram_rows, phase)
    result = {"histogram": count_keys(rows if chosen is None else rows[chosen])}
    if not finite_only:
        mean = mx.mean(wide, axis=0)
        m2 = mx.sum(mx.square(wide - mean), axis=0)
        count = mx.full((rows.shape[1],), rows.shape[0], dtype=mx.uint32)
        return result | {"min": mx.min(wide, 0), "max": mx.max(wide, 0), "count": count, "mean": mean, "m2": m2}
    finite = mx.isfinite(wide)
    count = mx.sum(finite.astype(mx.uint32), axis=0)
    scale = mx.max(mx.abs(mx.where(finite, wide, 0)), axis=0) + 1e-30
    mean = scale * mx.sum(mx.where(finite, wide / scale, 0), axis=0) / mx.maximum(count, 1)
    return result | {
        "min": mx.min(mx.where(finite, wide, mx.inf), axis=0),
        "max": mx.max(mx.where(finite, wide, -mx.inf), axis=0),
        "count": count,
        "mean": mean,
        "m2": mx.sum(mx.square(mx.where(finite, wide - mean, 0)), axis=0),
        "nan": mx.sum(mx.isnan(wide).astype(mx.uint32)),
        "inf": mx.sum(mx.isinf(wide).astype(mx.uint32)),
    }


@dataclass
class Statistics:
    """Statistics of one layer over any set of values, on the host; arrays are (channels,).

    ``count`` is per channel, finite values only; ``nan`` and ``inf`` count the others over all channels.
    """

    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]
    count: NDArray[np.uint64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    histogram: Histogram
    nan: int = 0
    inf: int = 0

    @classmethod
    def from_summary(cls, summary: dict[str, mx.array], dtype: mx.Dtype) -> Self:
        """From an evaluated :func:`summarize` of activations of type ``dtype``."""
        host = {name: np.array(value) for name, value in summary.items()}
        return cls(
            host["min"],
            host["max"],
            host["count"].astype(np.uint64),
            host["mean"].astype(np.float64),
            host["m2"].astype(np.float64),
            Histogram.from_dense(host["histogram"], DTYPES[dtype]),
            int(host.get("nan", 0)),
            int(host.get("inf", 0)),
        )

    @property
    def channels(self) -> int:
        return len(self.count)

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation per channel (population)."""
        deviation: NDArray[np.float64] = np.sqrt(self.m2 / np.maximum(self.count, 1))
        return deviation

    def merge(self, other: Self) -> "Statistics":
        """Statistics of both sets of values together."""
        count = self.count + other.count
        safe = np.maximum(count, 1)
        delta = other.mean - self.mean
        return Statistics(
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            count,
            self.mean + delta * (other.count / safe),
            self.m2 + other.m2 + delta**2 * (self.count.astype(np.float64) * other.count / safe),
            self.histogram.merge(other.histogram),
            self.nan + other.nan,
            self.inf + other.inf,
        )

    def over_channels(self) -> tuple[float, float, float, float, int]:
        """(min, max, mean, std, number of values) over all channels; NaNs where there is no finite value."""
        total = int(self.count.sum())
        if not total:
            return (np.nan, np.nan, np.nan, np.nan, 0)
        mean = float((self.mean * self.count).sum() / total)
        m2 = float((self.m2 + self.count * (self.mean - mean) ** 2).sum())
        return float(self.minimum.min()), float(self.maximum.max()), mean, float(np.sqrt(m2 / total)), total

    def percentiles(self) -> dict[str, float]:
        """The standard percentiles, by name; never outside the exact min and max."""
        low, high, *_ = self.over_channels()
        values = np.clip(self.histogram.percentiles(list(PERCENTILES.values())), low, high)
        return {name: float(value) for name, value in zip(PERCENTILES, values, strict=True)}
