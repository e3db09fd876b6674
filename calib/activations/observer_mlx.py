"""Summaries of activations in plain MLX operations: the base on every device; faster ones are checked against it."""

import math
from collections.abc import Mapping
from functools import cache
from itertools import zip_longest
from typing import TypeAlias

from calib.activations.bits import DTYPES, count_bits, top_bits
from calib.activations.histogram import BINS, Histogram, key_values, ordered_keys
from calib.activations.observer import Seen
from calib.activations.statistics import Moments, Statistics
from calib.base.device import on_gpu

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: About so many values of each row of a batch tell its own percentiles.
PICKED = 1024
#: Summaries wait on the device until they are so many bytes; on a GPU each read is a wait.
MOST_PENDING, MOST_PENDING_GPU = 8 << 20, 64 << 20
#: Counters of 32 bits are emptied before they could overflow.
MOST_COUNTS = 1 << 31
#: Sums of float32 lose digits with their length: they go in two levels.
BLOCK = 64
#: Parts of a stride that a phase counts.
PHASES = 1 << 16


def first_sampled(rows: int, stride: int, phase: int) -> int:
    """The first of ``rows`` rows to be sampled, in the first ``stride``; ``phase`` is in 0 … PHASES - 1."""
    return phase * min(stride, rows) // PHASES


@cache
def pick_stride(size: int, channels: int) -> int:
    """Every how many of a row's ``size`` values one is picked: evenly over tokens and over channels."""
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
    """Lazy statistics of ``x`` (rows, …, channels): per channel min, max, count and shifted sums of every value.

    ``first`` and ``second`` are Σd and Σd² of d = x / scale - shift, the shift being near the mean: so a mean large
    against the spread costs no accuracy. ``row_min`` and ``row_max`` are each row's; ``picked`` (rows, values) are bit
    patterns to tell a row's percentiles from. Every ``histogram_stride``-th token of all rows enters the histogram, or
    all of an input with no token axis: counted here as ``histogram``, or handed over as ``sampled`` patterns where the
    host counts faster: MLX's scatter takes 20 ns a value on a CPU, NumPy's bincount one.

    ``x`` may be some rows of a batch of ``whole``, ``before`` of which come first: they are sampled as in the whole.

    The plain version is for finite data of ordinary size; see :func:`is_sound`. Where it fails the caller repeats
    with ``finite_only=True``, which leaves NaN and infinities out, counts them, and scales by the largest magnitude.
    """
    rows, channels = x.shape[0], x.shape[-1]
    x = x.reshape(rows, -1, channels)
    tokens = x.shape[1]
    wide = x.astype(mx.float32)
    picked = x.reshape(rows, -1)[:, :: pick_stride(tokens * channels, channels)]
    summary = {"picked": top_bits(picked), **_count(x, histogram_stride, phase, before, whole or rows)}
    if not finite_only:
        low, high = mx.min(x, axis=1), mx.max(x, axis=1)
        # Any value near the mean will do; four tokens of every row, as one may be an outlier.
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
    """False where a plain summary met NaN, infinity or overflow."""
    return all(bool(np.isfinite(summary[name]).all()) for name in ("first", "second"))


def row_percentiles(picked: NDArray[np.uint16], dtype: str) -> NDArray[np.float64]:
    """1st and 99th percentile of each row, (rows, 2), from its ``picked`` patterns (rows, values); NaN where none."""
    keys = np.sort(ordered_keys(picked), axis=1)
    values = key_values(keys, dtype)
    if np.isfinite(values).all():
        place = np.array([0.01, 0.99]) * (values.shape[1] - 1)
        below, above = np.floor(place).astype(int), np.ceil(place).astype(int)
        result: NDArray[np.float64] = values[:, below] + (values[:, above] - values[:, below]) * (place - below)
        return result
    rows = [row[np.isfinite(row)] for row in values]
    return np.array([np.percentile(row, (1, 99)) if len(row) else (np.nan, np.nan) for row in rows])


#: Tap, type of its activations, what :func:`summarize` gave.
_Summary: TypeAlias = tuple[str, str, dict[str, mx.array]]


def read(summary: Mapping[str, mx.array]) -> dict[str, NDArray[np.generic]]:
    """An evaluated summary on the host."""
    return {name: np.array(value) for name, value in summary.items()}


def seen(host: Mapping[str, NDArray[np.generic]], dtype: str) -> Seen:
    """What a summary says; an empty histogram where it holds neither ``histogram`` nor ``sampled`` patterns."""
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
    return Seen(dtype, statistics, np.concatenate([ends, row_percentiles(host["picked"].astype(np.uint16), dtype)], 1))


def counts(host: Mapping[str, NDArray[np.generic]]) -> NDArray[np.int64]:
    """How often each bit pattern was sampled."""
    if "histogram" in host:
        return host["histogram"].astype(np.int64)
    return np.bincount(host.get("sampled", np.zeros(0)).astype(np.int64), minlength=BINS)


class PlainObserver:
    """Gathers summaries of forwards; they stay on the device until they are many."""

    def __init__(self, histogram_stride: int, finite_only: bool = False):
        self._stride, self._finite_only = histogram_stride, finite_only
        self._parts: list[list[_Summary]] = []
        self._newest: list[_Summary] = []
        self._waiting: list[_Summary] = []
        self._found: dict[str, Seen] = {}
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
            # 256 kB a tap: they are added up there, and read once.
            self._counted[name] = self._counted.get(name, 0) + x.size
            histogram = summary.pop("histogram")
            if name in self._histograms:
                histogram = self._histograms[name] + histogram
            self._histograms[name] = histogram
            self._untied.append(histogram)
        self._parts[-1].append((name, DTYPES[x.dtype], summary))
        self._untied += summary.values()

    def tie(self, x: mx.array) -> mx.array:
        if not on_gpu() or not self._untied:
            return x
        tied: mx.array = mx.depends([x], self._untied)[0]
        self._untied = []
        return tied

    def end_forward(self) -> list[list[mx.array]]:
        parts, self._parts, self._untied = self._parts, [], []
        self._newest = [summary for part in parts for summary in part]
        # The parts in turn: each is a stream of its own, and goes on while the others are told their next piece.
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
            host = read(summary)
            if not (self._finite_only or is_sound(host)):
                self.sound = False
                break
            new = seen(host, dtype)
            self._found[name] = self._found[name].merge(new) if name in self._found else new
        self._waiting = []

    def fetch(self) -> None:
        """Nothing: the host reads an array as soon as it is computed, whatever is computed next."""

    def _read_histograms(self) -> None:
        for name, histogram in self._histograms.items():
            counts = np.array(histogram).astype(np.int64)
            self._host_counts[name] = self._host_counts[name] + counts if name in self._host_counts else counts
        self._histograms, self._counted = {}, {}

    def results(self) -> dict[str, Seen]:
        self._drain()
        self._read_histograms()
        if not self.sound:
            return {}
        for name, counts in self._host_counts.items():
            found = self._found[name]
            found.statistics.histogram = Histogram.from_counts(counts, found.dtype)
        return self._found
