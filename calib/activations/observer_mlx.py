"""The observer in plain MLX operations: the reference on every device, against which faster ones are tested."""

import math
from collections.abc import Mapping
from functools import cache
from itertools import zip_longest
from typing import TypeAlias

from calib.activations.bits import DTYPES, count_bits, top_bits
from calib.activations.histogram import BINS, Histogram, key_values, ordered_keys
from calib.activations.observer import TapResult
from calib.activations.statistics import Moments, Statistics
from calib.base.device import on_gpu

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Approximate number of values of each row of a batch from which the row's percentiles are computed.
PICKED = 1024
#: Bytes of summaries that stay on the device before they are read; on a GPU each read waits for the device.
MOST_PENDING, MOST_PENDING_GPU = 8 << 20, 64 << 20
#: Largest count in the 32-bit counters before they are read and reset.
MOST_COUNTS = 1 << 31
#: Length of the first level of float32 sums, which lose digits with their length and so are taken in two levels.
BLOCK = 64
#: Number of phases, the possible shifts of the sampled rows within a stride.
PHASES = 1 << 16


def first_sampled(rows: int, stride: int, phase: int) -> int:
    """Index of the first sampled row of ``rows``, within the first ``stride``; ``phase`` is in 0 … PHASES - 1."""
    return phase * min(stride, rows) // PHASES


@cache
def pick_stride(size: int, channels: int) -> int:
    """Stride between the values that are picked of a row of ``size``, coprime to ``channels`` to reach all channels."""
    stride = max(1, size // PICKED)
    while math.gcd(stride, channels) > 1:
        stride += 1
    return stride


def _sum(x: mx.array) -> mx.array:
    """Σ over rows and tokens of ``x`` (rows, tokens, channels)."""
    rows, tokens, channels = x.shape
    whole = tokens // BLOCK * BLOCK
    if tokens <= BLOCK:
        return mx.sum(mx.sum(x, axis=1), axis=0)
    blocks = mx.sum(x[:, :whole].reshape(rows, -1, BLOCK, channels), axis=2)
    total = mx.sum(mx.sum(blocks, axis=1), axis=0)
    return total if whole == tokens else total + mx.sum(mx.sum(x[:, whole:], axis=1), axis=0)


def summarize(
    x: mx.array,
    histogram_stride: int = 1,
    phase: int = 0,
    finite_only: bool = False,
    before: int = 0,
    whole: int | None = None,
) -> dict[str, mx.array]:
    """Lazy statistics of ``x`` (rows, …, channels): per channel min, max, count and shifted sums over all values.

    ``first`` and ``second`` are Σd and Σd² of d = x / scale - shift, with the shift near the mean, so that a mean large
    relative to the spread costs no accuracy. ``row_min`` and ``row_max`` are the extremes of each row; ``picked``
    (rows, values) are bit patterns for a row's percentiles. The histogram has every ``histogram_stride``-th token of
    all rows, or all values of an input without token axis: counted here as ``histogram``, or returned as ``sampled``
    patterns where counting on the host is faster: on a CPU MLX's scatter takes 20 ns per value, NumPy's bincount 1 ns.

    Args:
        phase: shifts the sampled tokens, 0 … PHASES - 1.
        finite_only: leave NaN and infinities out, count them, and scale by the largest magnitude. Without it data must
            be finite and of ordinary size; see :func:`is_sound`.
        before: number of rows of the batch before those of ``x``.
        whole: number of rows of the batch, whose sampling does not depend on its parts; None: those of ``x``.
    """
    rows, channels = x.shape[0], x.shape[-1]
    x = x.reshape(rows, -1, channels)
    tokens = x.shape[1]
    wide = x.astype(mx.float32)
    picked = x.reshape(rows, -1)[:, :: pick_stride(tokens * channels, channels)]
    summary = {"picked": top_bits(picked), **_count(x, histogram_stride, phase, before, whole or rows)}
    if not finite_only:
        low, high = mx.min(x, axis=1), mx.max(x, axis=1)
        # Any value near the mean suffices; the mean of four tokens of every row, as one may be an outlier.
        shift = mx.mean(mx.stack([wide[:, eighth * tokens // 8] for eighth in (1, 3, 5, 7)]), axis=(0, 1))
        d = wide - shift
        summary |= {
            "count": mx.full((channels,), rows * tokens, dtype=mx.uint32),
            "scale": mx.ones((channels,)),
            "shift": shift,
        }
    else:
        finite = mx.isfinite(wide)
        low = mx.min(mx.where(finite, wide, mx.inf), axis=1)
        high = mx.max(mx.where(finite, wide, -mx.inf), axis=1)
        kept = mx.where(finite, wide, 0)
        count = mx.sum(finite.astype(mx.uint32), axis=(0, 1))
        largest = mx.max(mx.abs(kept), axis=(0, 1))
        scale = mx.where(largest > 0, largest, 1)
        shift = _sum(kept / scale) / mx.maximum(count, 1)
        d = mx.where(finite, kept / scale - shift, 0)
        summary |= {
            "count": count,
            "scale": scale,
            "shift": shift,
            "nan": mx.sum(mx.isnan(wide).astype(mx.uint32)),
            "inf": mx.sum(mx.isinf(wide).astype(mx.uint32)),
        }
    return summary | {
        "min": mx.min(low, axis=0).astype(mx.float32),
        "max": mx.max(high, axis=0).astype(mx.float32),
        "row_min": mx.min(low, axis=1).astype(mx.float32),
        "row_max": mx.max(high, axis=1).astype(mx.float32),
        "first": _sum(d),
        "second": _sum(mx.square(d)),
    }


def _count(x: mx.array, stride: int, phase: int, before: int, whole: int) -> dict[str, mx.array]:
    rows, tokens = x.shape[:2]
    if tokens == 1 or stride == 1:
        chosen = x
    else:
        places = np.arange(first_sampled(whole * tokens, stride, phase), whole * tokens, stride) - before * tokens
        places = places[(places >= 0) & (places < rows * tokens)].astype(np.uint32)
        chosen = x[mx.array(places // tokens), mx.array(places % tokens)]
    if not on_gpu() and stride > 1:
        return {"sampled": top_bits(chosen).reshape(-1)}
    return {"histogram": count_bits(top_bits(chosen))}


def is_sound(summary: Mapping[str, NDArray[np.generic]]) -> bool:
    """Whether a summary without ``finite_only`` is free of NaN, infinity and overflow."""
    return all(bool(np.isfinite(summary[name]).all()) for name in ("first", "second"))


def row_percentiles(picked: NDArray[np.uint16], dtype: str) -> NDArray[np.float64]:
    """1st and 99th percentile of each row, (rows, 2), from bit patterns ``picked`` (rows, values).

    NaN for a row without finite values.
    """
    keys = np.sort(ordered_keys(picked), axis=1)
    values = key_values(keys, dtype)
    if np.isfinite(values).all():
        place = np.array([0.01, 0.99]) * (values.shape[1] - 1)
        below, above = np.floor(place).astype(int), np.ceil(place).astype(int)
        result: NDArray[np.float64] = values[:, below] + (values[:, above] - values[:, below]) * (place - below)
        return result
    rows = [row[np.isfinite(row)] for row in values]
    return np.array([np.percentile(row, (1, 99)) if len(row) else (np.nan, np.nan) for row in rows])


#: Tap, type of its activations, result of :func:`summarize`.
_Summary: TypeAlias = tuple[str, str, dict[str, mx.array]]


def to_host(summary: Mapping[str, mx.array]) -> dict[str, NDArray[np.generic]]:
    """Copy an evaluated summary to the host."""
    return {name: np.array(value) for name, value in summary.items()}


def tap_result(host: Mapping[str, NDArray[np.generic]], dtype: str) -> TapResult:
    """The statistics of a summary; the histogram is empty where it has neither ``histogram`` nor ``sampled``."""
    count = host["count"].astype(np.uint64)
    shift, first, second, scale = (host[name].astype(np.float64) for name in ("shift", "first", "second", "scale"))
    statistics = Statistics(
        host["min"].astype(np.float32),
        host["max"].astype(np.float32),
        count,
        Moments.shifted(count.astype(np.float64), shift, first, second, scale),
        Histogram.from_counts(counts(host), dtype),
        int(host.get("nan", np.zeros(()))),
        int(host.get("inf", np.zeros(()))),
    )
    ends = np.stack([host["row_min"], host["row_max"]], axis=1).astype(np.float64)
    return TapResult(
        dtype, statistics, np.concatenate([ends, row_percentiles(host["picked"].astype(np.uint16), dtype)], 1)
    )


def counts(host: Mapping[str, NDArray[np.generic]]) -> NDArray[np.int64]:
    """Counts of the sampled bit patterns, (65536,)."""
    if "histogram" in host:
        return host["histogram"].astype(np.int64)
    return np.bincount(host.get("sampled", np.zeros(0)).astype(np.int64), minlength=BINS)


class MlxObserver:
    """Observer whose summaries stay on the device until they exceed a number of bytes."""

    def __init__(self, histogram_stride: int, finite_only: bool = False):
        self._stride, self._finite_only = histogram_stride, finite_only
        self._parts: list[list[_Summary]] = []
        self._newest: list[_Summary] = []
        self._waiting: list[_Summary] = []
        self._found: dict[str, TapResult] = {}
        self._untied: list[mx.array] = []
        self._histograms: dict[str, mx.array] = {}
        self._host_counts: dict[str, NDArray[np.int64]] = {}
        self._counted: dict[str, int] = {}
        self._phase = 0
        self.sound = True

    def begin(self, phase: int) -> None:
        self._phase = phase
        self._parts.append([])

    def see(self, name: str, x: mx.array, before: int = 0, whole: int | None = None) -> None:
        summary = summarize(x, self._stride, self._phase, self._finite_only, before, whole)
        if on_gpu():
            # 256 kB per tap: added up on the device, and read once.
            self._counted[name] = self._counted.get(name, 0) + x.size
            histogram = summary.pop("histogram")
            if name in self._histograms:
                histogram = self._histograms[name] + histogram
            self._histograms[name] = histogram
            self._untied.append(histogram)
        self._parts[-1].append((name, DTYPES[x.dtype], summary))
        self._untied += summary.values()

    def tie(self, x: mx.array) -> mx.array:
        if not self._untied:
            return x
        tied: mx.array = mx.depends([x], self._untied)[0]
        self._untied = []
        return tied

    def end_forward(self) -> list[list[mx.array]]:
        parts, self._parts, self._untied = self._parts, [], []
        self._newest = [summary for part in parts for summary in part]
        # A piece of each part in turn: each part is a stream, and runs while the others get their next piece.
        turns = [summary for together in zip_longest(*parts) for summary in together if summary is not None]
        ordered = [list(values.values()) for *_, values in turns]
        if not on_gpu():
            return ordered
        return [[*(value for values in ordered for value in values), *self._histograms.values()]]

    def settle(self) -> None:
        most = MOST_PENDING_GPU if on_gpu() else MOST_PENDING
        if sum(value.nbytes for *_, values in self._waiting for value in values.values()) > most:
            self._drain()
        if max(self._counted.values(), default=0) > MOST_COUNTS:
            self._read_histograms()
        self._waiting += self._newest
        self._newest = []

    def _drain(self) -> None:
        for name, dtype, summary in self._waiting:
            host = to_host(summary)
            if not (self._finite_only or is_sound(host)):
                self.sound = False
                break
            new = tap_result(host, dtype)
            self._found[name] = self._found[name].merge(new) if name in self._found else new
        self._waiting = []

    def fetch(self) -> None:
        self._drain()
        self._read_histograms()

    def _read_histograms(self) -> None:
        for name, histogram in self._histograms.items():
            counts = np.array(histogram).astype(np.int64)
            self._host_counts[name] = self._host_counts[name] + counts if name in self._host_counts else counts
        self._histograms, self._counted = {}, {}

    def results(self) -> dict[str, TapResult]:
        self.fetch()
        if not self.sound:
            return {}
        for name, counts in self._host_counts.items():
            found = self._found[name]
            found.statistics.histogram = Histogram.from_counts(counts, found.dtype)
        return self._found
