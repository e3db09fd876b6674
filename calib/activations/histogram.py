"""Exact histograms of 16-bit floats by bit pattern, and percentiles read from them.

A 16-bit float has 65,536 patterns; counting them is an exact histogram that merges by addition. Patterns are put
in the order of their values by the usual key: all bits of a negative number flipped, the sign bit of a positive
one. Of a float32 the top 16 bits are kept and a bin is read at its midpoint (relative error at most 2^-8).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

BINS = 1 << 16
DTYPES = {mx.float16: "float16", mx.bfloat16: "bfloat16", mx.float32: "float32"}


def ordered_keys(x: mx.array) -> mx.array:
    """Order-preserving keys of ``x``, of any shape, as uint32 in 0 … 65535; larger value, larger key."""
    if x.dtype == mx.float32:
        bits = x.view(mx.uint32) >> 16
    else:
        bits = x.view(mx.uint16).astype(mx.uint32)
    return mx.where(bits & 0x8000, bits ^ 0xFFFF, bits | 0x8000)


def count_keys(x: mx.array) -> mx.array:
    """Histogram of the keys of ``x``, (65536,) uint32; lazy. Metal has no 64-bit scatter: widen on the host."""
    keys = ordered_keys(x).reshape(-1)
    return mx.zeros((BINS,), dtype=mx.uint32).at[keys].add(mx.array(1, dtype=mx.uint32))


def key_values(keys: NDArray[np.uint16], dtype: str) -> NDArray[np.float64]:
    """The value each key stands for, as float64; ``dtype`` is float16, bfloat16 or float32."""
    wide = keys.astype(np.uint32)
    bits = np.where(wide & 0x8000, wide ^ 0x8000, wide ^ 0xFFFF).astype(np.uint16)
    if dtype == "float16":
        with np.errstate(invalid="ignore"):
            return bits.view(np.float16).astype(np.float64)
    patterns = bits.astype(np.uint32) << 16
    if dtype == "float32":
        patterns |= 0x8000
        # Zero is by far the commonest value of its bin, whose midpoint would be a denormal: keep it exact.
        patterns[(bits & 0x7FFF) == 0] = 0
    with np.errstate(invalid="ignore"):  # NaN patterns are values like any other here
        return patterns.view(np.float32).astype(np.float64)


@dataclass
class Histogram:
    """Sparse histogram: ``keys`` ascending (n,) uint16 and their ``counts`` (n,) uint64, of finite values only."""

    dtype: str
    keys: NDArray[np.uint16] = field(default_factory=lambda: np.empty(0, np.uint16))
    counts: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    @classmethod
    def from_dense(cls, counts: NDArray[np.uint32], dtype: str) -> Self:
        """From the 65,536 counts of :func:`count_keys`; NaN and infinities are left out."""
        keys = np.flatnonzero(counts).astype(np.uint16)
        finite = np.isfinite(key_values(keys, dtype))
        return cls(dtype, keys[finite], counts[keys[finite]].astype(np.uint64))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def values(self) -> NDArray[np.float64]:
        return key_values(self.keys, self.dtype)

    def merge(self, other: "Histogram") -> "Histogram":
        """Counts of both."""
        return merge_histograms([self, other])

    def percentiles(self, percents: Sequence[float]) -> NDArray[np.float64]:
        """Percentiles with linear interpolation between order statistics: ``numpy.percentile`` of the values."""
        if not self.total:
            return np.full(len(percents), np.nan)
        ends, values = np.cumsum(self.counts), self.values()
        position = np.asarray(percents, np.float64) / 100 * (self.total - 1)
        low = np.floor(position)
        lower = values[np.searchsorted(ends, low.astype(np.uint64), side="right")]
        upper = values[np.searchsorted(ends, np.ceil(position).astype(np.uint64), side="right")]
        result: NDArray[np.float64] = lower + (upper - lower) * (position - low)
        return result

    def kurtosis(self) -> float:
        """Fourth standardised moment (3 for a normal distribution); 0 where all values are equal."""
        if not self.total:
            return 0.0
        weights, values = self.counts / self.total, self.values()
        centred = values - np.sum(weights * values)
        variance = float(np.sum(weights * centred**2))
        return float(np.sum(weights * centred**4)) / variance**2 if variance > 0 else 0.0


def merge_histograms(parts: Sequence[Histogram]) -> Histogram:
    """Counts of all; at least one part, all of one dtype."""
    dtype = parts[0].dtype
    if any(part.dtype != dtype for part in parts):
        raise ValueError(f"cannot merge histograms of {' and '.join(dict.fromkeys(part.dtype for part in parts))}")
    dense = np.zeros(BINS, np.uint64)
    for part in parts:
        dense[part.keys] += part.counts  # keys are distinct within a part
    keys = np.flatnonzero(dense).astype(np.uint16)
    return Histogram(dtype, keys, dense[keys])
