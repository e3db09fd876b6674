"""Streaming statistics of one layer's activations: summarised on the device, merged exactly on the host.

One forward gives one :func:`summarize` per tap, evaluated together. Merging is by addition, min and max, and by
Chan's parallel update for mean and variance (Chan, Golub, LeVeque 1983, equation 2.1) in float64, so any split
over images, batches or steps gives the same counts, extremes and histograms, and the same moments to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from calib.activations.histogram import DTYPES, Histogram, count_keys, merge_histograms

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

PERCENTILES = {"p001": 0.1, "p01": 1.0, "p05": 5.0, "p50": 50.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}


def sampled_rows(rows: int, stride: int, phase: float) -> mx.array | None:
    """Every ``stride``-th of ``rows`` rows, at least one, from ``phase`` (in [0, 1)) of a stride on; None for all.

    A stride, not a number: whatever is merged later, short batches or a block's two streams, was sampled at one rate.
    """
    if stride == 1:
        return None
    return mx.array(np.arange(int(phase * min(stride, rows)), rows, stride).astype(np.uint32))


def _sum_rows(x: mx.array, block: int = 64) -> mx.array:
    """Σ over the first axis of ``x`` (rows, channels), in two levels: a running float32 sum loses digits with rows."""
    whole = x.shape[0] // block * block
    if not whole:
        return mx.sum(x, axis=0)
    blocks = mx.sum(mx.sum(x[:whole].reshape(-1, block, x.shape[1]), axis=1), axis=0)
    return blocks + mx.sum(x[whole:], axis=0) if whole < x.shape[0] else blocks


def summarize(
    x: mx.array, histogram_stride: int = 1, phase: float = 0.0, finite_only: bool = False
) -> dict[str, mx.array]:
    """Lazy statistics of ``x`` (…, channels): per channel min, max, count and shifted sums of every value; a histogram.

    The histogram counts every ``histogram_stride``-th row, or all of an input with no token axis. ``first`` and
    ``second`` are Σd and Σd² of d = x / scale - shift, the shift being about the mean: so a mean large against the
    spread costs no accuracy, and the host corrects for the shift's own rounding.

    The plain version is for finite data of ordinary size; see :func:`is_sound`. Where it fails the caller repeats
    with ``finite_only=True``, which leaves NaN and infinities out, counts them, and scales by the largest magnitude.
    """
    rows = x.reshape(-1, x.shape[-1])
    wide = rows.astype(mx.float32)
    one_row_each = rows.shape[0] == x.shape[0]
    chosen = None if one_row_each else sampled_rows(rows.shape[0], histogram_stride, phase)
    histogram = count_keys(rows if chosen is None else rows[chosen])
    if not finite_only:
        shift = _sum_rows(wide) / rows.shape[0]
        d = wide - shift
        return {
            "histogram": histogram,
            "min": mx.min(wide, axis=0),
            "max": mx.max(wide, axis=0),
            "count": mx.full((rows.shape[1],), rows.shape[0], dtype=mx.uint32),
            "scale": mx.ones((rows.shape[1],)),
            "shift": shift,
            "first": _sum_rows(d),
            "second": _sum_rows(mx.square(d)),
        }
    finite = mx.isfinite(wide)
    kept = mx.where(finite, wide, 0)
    count = mx.sum(finite.astype(mx.uint32), axis=0)
    largest = mx.max(mx.abs(kept), axis=0)
    scale = mx.where(largest > 0, largest, 1)
    shift = _sum_rows(kept / scale) / mx.maximum(count, 1)
    d = mx.where(finite, kept / scale - shift, 0)
    return {
        "histogram": histogram,
        "min": mx.min(mx.where(finite, wide, mx.inf), axis=0),
        "max": mx.max(mx.where(finite, wide, -mx.inf), axis=0),
        "count": count,
        "scale": scale,
        "shift": shift,
        "first": _sum_rows(d),
        "second": _sum_rows(mx.square(d)),
        "nan": mx.sum(mx.isnan(wide).astype(mx.uint32)),
        "inf": mx.sum(mx.isinf(wide).astype(mx.uint32)),
    }


def is_sound(summary: dict[str, mx.array]) -> bool:
    """False where an evaluated plain summary met NaN, infinity or overflow."""
    return all(bool(np.isfinite(np.array(summary[name])).all()) for name in ("first", "second"))


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
        count = host["count"].astype(np.uint64)
        scale, shift, first, second = (host[name].astype(np.float64) for name in ("scale", "shift", "first", "second"))
        correction = first / np.maximum(count, 1)
        return cls(
            host["min"],
            host["max"],
            count,
            scale * (shift + correction),
            np.maximum(second - count * correction**2, 0) * scale**2,
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

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of both sets of values together."""
        return merge_all([self, other])

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


def merge_all(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of all the sets of values together; at least one."""
    count, mean, m2 = parts[0].count, parts[0].mean, parts[0].m2
    for part in parts[1:]:
        total = count + part.count
        safe = np.maximum(total, 1)
        delta = part.mean - mean
        m2 = m2 + part.m2 + delta**2 * (count.astype(np.float64) * part.count / safe)
        mean, count = mean + delta * (part.count / safe), total
    return Statistics(
        np.minimum.reduce([part.minimum for part in parts]),
        np.maximum.reduce([part.maximum for part in parts]),
        count,
        mean,
        m2,
        merge_histograms([part.histogram for part in parts]),
        sum(part.nan for part in parts),
        sum(part.inf for part in parts),
    )
