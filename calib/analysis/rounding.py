"""The error of quantizing the values of a histogram, and the clipping range of least error.

The error of a grid is E = Σ counts · |x - Q(x)|^p over a histogram's values, in float64; SQNR is
10 log10(Σx² / Σ(x - Q(x))²), dB. Both are exact where the histogram is: for 16-bit activations with every row counted.
A float32 value is known to a relative 2^-8 and read at the midpoint of its bin: up to about 50 dB that averages out,
beyond that an SQNR can be several dB too high.

The best clip is that of Q-Diffusion's and TaQ-DiT's code (arXiv 2302.04304, 2411.14172): among 100 grids, over 1%, 2% …
100% of the full range, the one of least error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calib.activations.histogram import Histogram
from calib.analysis.grid import Grid
from calib.analysis.layers import LayerSummary
from calib.analysis.plan import NO_CLIP
from calib.base.errors import CalibError
from calib.base.layout import ACTIVATIONS

import numpy as np
from numpy.typing import NDArray

#: Shares of the full range to try, the widest first: among equal errors the first one wins.
SHARES = tuple(percent / 100 for percent in range(100, 0, -1))
#: Largest bit-width at which squared errors are summed by point of the grid; beyond it there are fewer values.
_BY_LEVEL = 8


@dataclass(frozen=True)
class Clip:
    """A range to quantize over, and its error.

    Attributes:
        low, high: the range, within the values' extremes.
        error: Σ |x - Q(x)|^p.
        sqnr: dB; infinite where the error is 0, NaN where there are no values.
        percentiles: percentiles of the values at low and high, 0 … 100; exactly ``NO_CLIP`` where nothing is clipped.
    """

    low: float
    high: float
    error: float
    sqnr: float
    percentiles: tuple[float, float]


def best_clip(histogram: Histogram, bits: int, norm: float = 2.0, extremes: tuple[float, float] | None = None) -> Clip:
    """The clip of least error Σ |x - Q(x)|^``norm`` with a grid of ``bits``; both ends shrink by the same factor.

    A constant layer keeps its range, at which its error is 0; so does a layer without values, with NaN SQNR. An outlier
    is clipped where that costs less than the coarser grid that covers it.

    Args:
        extremes: the full range, the exact minimum and maximum of the values; None: those of the histogram, which may
            have some of the rows only, and has float32 values at the midpoints of bins.
    """
    values, counts = histogram.values(), histogram.counts.astype(np.float64)
    if not len(values):
        return Clip(*(extremes or (0.0, 0.0)), 0.0, math.nan, NO_CLIP)
    low, high = extremes or (float(values[0]), float(values[-1]))
    values = np.clip(values, low, high)
    grids = [Grid.over(share * low, share * high, bits) for share in SHARES]
    by_level = norm == 2 and bits <= _BY_LEVEL
    found = _squared_errors(values, counts, grids) if by_level else _relative_errors(values, counts, grids, norm)
    best = int(np.argmin(found))
    # An end with zero beyond it is not the grid's end, and shrunk it would leave the values' range.
    ends = SHARES[best] * low if low < 0 else low, SHARES[best] * high if high > 0 else high
    percentiles = percentile_at(histogram, ends[0], "left"), percentile_at(histogram, ends[1], "right")
    errors = [_error(values, counts, grids[i], norm) for i in (0, best)]
    if errors[1] >= errors[0] or percentiles == NO_CLIP:
        return Clip(low, high, errors[0], _sqnr(values, counts, grids[0]), NO_CLIP)
    return Clip(*ends, errors[1], _sqnr(values, counts, grids[best]), percentiles)


def best_clip_of(layer: LayerSummary, bits: int, norm: float = 2.0) -> Clip:
    """:func:`best_clip` of a layer's values.

    Raises:
        CalibError: the layer has no histogram, as it was read from a ``layer_statistics.json``.
    """
    if layer.histogram is None:
        raise CalibError(
            f"analysis: this heuristic needs the histograms in {ACTIVATIONS}; set stats to a run directory"
        )
    return best_clip(layer.histogram, bits, norm, (layer.minimum, layer.maximum))


def percentile_at(histogram: Histogram, value: float, side: Literal["left", "right"] = "right") -> float:
    """The percentile at which ``value`` lies, the inverse of ``Histogram.percentiles``; 0 below all values, 100 above.

    For a repeated value, which spans several percentiles, the first (``side`` left) or the last.
    """
    values, ends = histogram.values(), np.cumsum(histogram.counts)
    after = int(np.searchsorted(values, value, side=side))
    if after in (0, len(values)):
        return 100.0 if after else 0.0
    below, above = values[after - 1], values[after]
    position = int(ends[after - 1]) - 1 + (value - below) / (above - below)
    return float(100 * position / (int(ends[-1]) - 1))


def _error(values: NDArray[np.float64], counts: NDArray[np.float64], grid: Grid, norm: float) -> float:
    return float(np.sum(counts * np.abs(values - grid.apply(values)) ** norm))


def _sqnr(values: NDArray[np.float64], counts: NDArray[np.float64], grid: Grid) -> float:
    signal, noise = float(np.sum(counts * values**2)), _error(values, counts, grid, 2)
    return 10 * math.log10(signal / noise) if noise else math.inf if len(values) else math.nan


def _squared_errors(
    values: NDArray[np.float64], counts: NDArray[np.float64], grids: Sequence[Grid]
) -> NDArray[np.float64]:
    """Σ counts (x - Q(x))² for each of the grids, all of the same bits, (grids,).

    Computed from cumulative sums over the values: all values that round to one point of the grid cost one subtraction.
    Cancellation leaves about 1e-13 of Σx², so this only ranks grids; the error of the chosen one is computed directly.
    """
    scales = np.array([[grid.scale] for grid in grids])
    levels = np.arange(2 ** grids[0].bits) - np.array([[grid.zero_point] for grid in grids])
    borders = np.searchsorted(values, (levels[:, :-1] + 0.5) * scales)
    number, first, second = (np.concatenate([[0.0], np.cumsum(counts * values**power)]) for power in range(3))
    within = [np.diff(sums[borders], axis=1, prepend=0.0, append=sums[-1]) for sums in (number, first)]
    points = levels * scales
    errors: NDArray[np.float64] = second[-1] + np.sum(points * (points * within[0] - 2 * within[1]), axis=1)
    return errors


def _relative_errors(
    values: NDArray[np.float64], counts: NDArray[np.float64], grids: Sequence[Grid], norm: float
) -> NDArray[np.float64]:
    """Σ counts |x - Q(x)|^norm for each of the grids, value by value, up to a common factor, (grids,).

    In float32, three times as fast: each x - Q(x) is known to 2^-22 of the largest value, so the error norm of the
    chosen clip may exceed the least one by twice that. This only ranks grids; the error of the chosen one is computed
    directly.
    """
    unit = max(-values[0], values[-1]) or 1.0
    scaled, weights = (values / unit).astype(np.float32), (counts / counts.sum()).astype(np.float32)
    off, integers = np.empty_like(scaled), np.empty_like(scaled)
    errors = np.zeros(len(grids))
    for i, grid in enumerate(grids):
        scale = grid.scale / unit
        if not scale:
            continue
        np.multiply(scaled, np.float32(1 / scale), out=off)
        np.clip(np.rint(off, out=integers), -grid.zero_point, 2**grid.bits - 1 - grid.zero_point, out=integers)
        np.power(np.abs(np.subtract(off, integers, out=off), out=off), np.float32(norm), out=off)
        errors[i] = float(np.multiply(off, weights, out=off).sum()) * scale**norm
    return errors
