"""Exact histograms of 16-bit floats by bit pattern, and percentiles read from them.

A 16-bit float has 65,536 patterns; their counts are an exact histogram that merges by addition. Patterns are sorted by
value with the usual key: all bits of a negative number flipped, and the sign bit of a positive one. For float32 the top
16 bits are counted and a bin is read at its midpoint (relative error at most 2^-8).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

BINS = 1 << 16

#: The pattern of infinity; larger ones, without the sign, are NaN.
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80}


def ordered_keys(bits: NDArray[Any]) -> NDArray[np.uint16]:
    """Order-preserving keys of bit patterns: a larger value has a larger key."""
    wide = bits.astype(np.uint32)
    return np.where(wide & 0x8000, wide ^ 0xFFFF, wide | 0x8000).astype(np.uint16)


def key_values(keys: NDArray[np.uint16], dtype: str) -> NDArray[np.float64]:
    """Values of keys, as float64; ``dtype`` is float16, bfloat16 or float32."""
    wide = keys.astype(np.uint32)
    bits = np.where(wide & 0x8000, wide ^ 0x8000, wide ^ 0xFFFF).astype(np.uint16)
    if dtype == "float16":
        with np.errstate(invalid="ignore"):
            return bits.view(np.float16).astype(np.float64)
    patterns = bits.astype(np.uint32) << 16
    if dtype == "float32":
        patterns |= 0x8000
        # Zero is by far the most frequent value of its bin, whose midpoint would be a denormal: keep it exact.
        patterns[(bits & 0x7FFF) == 0] = 0
    with np.errstate(invalid="ignore"):  # NaN patterns are valid here
        return patterns.view(np.float32).astype(np.float64)


@dataclass
class Histogram:
    """Sparse histogram of finite values: ascending ``keys``, (n,) uint16, and their ``counts``, (n,) uint64."""

    dtype: str
    keys: NDArray[np.uint16] = field(default_factory=lambda: np.empty(0, np.uint16))
    counts: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    @classmethod
    def from_counts(cls, counts: NDArray[Any], dtype: str) -> Self:
        """Build from the counts of the 65,536 bit patterns; NaN and infinities are left out."""
        bits = np.flatnonzero(counts != 0)  # ten times faster than of the counts
        bits = bits[(bits & 0x7FFF) < INFINITY[dtype]]
        # The keys of negative numbers ascend as their patterns descend, and come first.
        middle = np.searchsorted(bits, 0x8000)
        ordered = np.concatenate([bits[middle:][::-1], bits[:middle]])
        return cls(dtype, ordered_keys(ordered), counts[ordered].astype(np.uint64))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def values(self) -> NDArray[np.float64]:
        return key_values(self.keys, self.dtype)

    def merge(self, other: "Histogram") -> "Histogram":
        """Add the counts of both histograms."""
        return merge_histograms([self, other])

    def percentiles(self, percents: Sequence[float]) -> NDArray[np.float64]:
        """Percentiles (0 … 100) with linear interpolation between order statistics, as ``numpy.percentile``."""
        if not self.total:
            return np.full(len(percents), np.nan)
        ends = np.cumsum(self.counts)
        position = np.asarray(percents, np.float64) / 100 * (self.total - 1)
        low = np.floor(position)
        lower, upper = (
            key_values(self.keys[np.searchsorted(ends, place.astype(np.uint64), side="right")], self.dtype)
            for place in (low, np.ceil(position))
        )
        result: NDArray[np.float64] = lower + (upper - lower) * (position - low)
        return result

    def kurtosis(self) -> float:
        """Fourth standardised moment (3 for a normal distribution); 0 where all values are equal."""
        if not self.total:
            return 0.0
        weights, values = self.counts / self.total, self.values()
        centred = values - np.sum(weights * values)
        squares = centred * centred
        variance = float(np.sum(weights * squares))
        return float(np.sum(weights * squares * squares)) / variance**2 if variance > 0 else 0.0


def merge_histograms(parts: Sequence[Histogram]) -> Histogram:
    """Add the counts of one or more histograms, all of one dtype."""
    dtype = parts[0].dtype
    if any(part.dtype != dtype for part in parts):
        raise ValueError(f"cannot merge histograms of {' and '.join(dict.fromkeys(part.dtype for part in parts))}")
    filled = [part.keys for part in parts if len(part.keys)]
    if not filled:
        return Histogram(dtype)
    first = min(int(keys[0]) for keys in filled)
    dense = np.zeros(max(int(keys[-1]) for keys in filled) - first + 1, np.uint64)
    for part in parts:
        dense[part.keys.astype(np.intp) - first] += part.counts  # keys are distinct within a part
    filled_bins = np.flatnonzero(dense != 0)
    return Histogram(dtype, (filled_bins + first).astype(np.uint16), dense[filled_bins])
