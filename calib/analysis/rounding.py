"""What quantizing does to a histogram: its error, and the clip that makes it least.

The error of a grid is E = Σ counts · |x - Q(x)|^p over a histogram's values, in float64; SQNR is
10 log10(Σx² / Σ(x - Q(x))²), dB. Both are exact where the histogram is: for 16-bit activations of which every row was
counted. A float32 value is known to 2^-8 of itself, and taken for the middle of its bin: up to some 50 dB that averages
out, beyond that an SQNR can be several dB too good.

The best clip is that of Q-Diffusion's and TaQ-DiT's code (arXiv 2302.04304, 2411.14172): of 100 grids, over 1%, 2% …
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

import numpy as np
from numpy.typing import NDArray

#: Shares of the full range that are tried, the widest first: of equal errors the first one wins.
SHARES = tuple(percent / 100 for percent in range(100, 0, -1))
#: Bits up to which squared errors are summed point by point of the grid; beyond, the values are fewer.
_BY_LEVEL = 8


@dataclass(frozen=True)
class Clip:
    """A range to quantize over, and what that costs.

    Attributes:
        low, high: never beyond the values' own extremes.
        error: Σ |x - Q(x)|^p.
        sqnr: dB; infinite where nothing is lost, NaN where there are no values.
        percentiles: where low and high lie in the histogram, 0 … 100; exactly ``NO_CLIP`` where nothing is cut off.
    """

    low: float
    high: float
    error: float
    sqnr: float
    percentiles: tuple[float, float]


def rounding_error(histogram: Histogram, grid: Grid, norm: float = 2.0) -> float:
    """Σ counts · |x - Q(x)|^norm; 0 of an empty histogram."""
    return _error(histogram.values(), histogram.counts.astype(np.float64), grid, norm)


def sqnr(histogram: Histogram, grid: Grid) -> float:
    """Signal to quantization noise, dB; infinite where nothing is lost, NaN of an empty histogram."""
    return _sqnr(histogram.values(), histogram.counts.astype(np.float64), grid)


def best_clip(histogram: Histogram, bits: int, norm: float = 2.0, extremes: tuple[float, float] | None = None) -> Clip:
    """The clip of least error with a grid of ``bits``, both ends of the full range shrunk alike.

    A constant layer keeps its range, where it loses nothing; so does one without values, of NaN SQNR. A huge outlier is
    cut off where that costs less than the coarse grid that holds it.

    Args:
        extremes: the full range: the values' exact minimum and maximum where they are known; else the histogram's,
            which may have seen some rows only, and has float32 values at the middle of their bin.
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
    # An end beyond which zero lies is not the grid's, and shrunk it would leave the values' range.
    ends = SHARES[best] * low if low < 0 else low, SHARES[best] * high if high > 0 else high
    places = percentile_at(histogram, ends[0], "left"), percentile_at(histogram, ends[1], "right")
    errors = [_error(values, counts, grids[i], norm) for i in (0, best)]
    if errors[1] >= errors[0] or places == NO_CLIP:
        return Clip(low, high, errors[0], _sqnr(values, counts, grids[0]), NO_CLIP)
    return Clip(*ends, errors[1], _sqnr(values, counts, grids[best]), places)


def best_clip_of(layer: LayerSummary, bits: int, norm: float = 2.0) -> Clip:
    """:func:`best_clip` of a layer's values; raises where only a ``layer_statistics.json`` was read."""
    if layer.histogram is None:
        raise CalibError(
            "analysis: this heuristic needs the histograms in activations.h5; set stats to a run directory"
        )
    return best_clip(layer.histogram, bits, norm, (layer.minimum, layer.maximum))


def percentile_at(histogram: Histogram, value: float, side: Literal["left", "right"] = "right") -> float:
    """The percentile that is ``value``, the inverse of ``Histogram.percentiles``; 0 below all values, 100 above.

    Of the many that a repeated value is, the first (``side`` left) or the last.
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
    """Σ counts (x - Q(x))² of each of the grids, all of the same bits.

    From running sums over the values: those that round to the same point cost a subtraction, however many they are.
    Cancellation leaves some 1e-13 of Σx², so this ranks grids; the error of the chosen one is computed anew.
    """
    steps, zeros = np.array([[grid.step] for grid in grids]), np.array([[grid.zero] for grid in grids])
    levels = np.arange(2 ** grids[0].bits) - zeros
    borders = np.searchsorted(values, (levels[:, :-1] + 0.5) * steps)
    number, first, second = (np.concatenate([[0.0], np.cumsum(counts * values**power)]) for power in range(3))
    within = [np.diff(sums[borders], axis=1, prepend=0.0, append=sums[-1]) for sums in (number, first)]
    points = levels * steps
    errors: NDArray[np.float64] = second[-1] + np.sum(points * (points * within[0] - 2 * within[1]), axis=1)
    return errors


def _relative_errors(
    values: NDArray[np.float64], counts: NDArray[np.float64], grids: Sequence[Grid], norm: float
) -> NDArray[np.float64]:
    """Σ counts |x - Q(x)|^norm of each of the grids, value by value, up to a factor that they share.

    In float32, three times as fast: each x - Q(x) is known to 2^-22 of the largest value, so the norm of the clip that
    is found may exceed the least one by twice that. It only ranks grids; the chosen one's error is computed anew.
    """
    unit = max(-values[0], values[-1]) or 1.0
    scaled, weights = (values / unit).astype(np.float32), (counts / counts.sum()).astype(np.float32)
    off, places = np.empty_like(scaled), np.empty_like(scaled)
    errors = np.zeros(len(grids))
    for i, grid in enumerate(grids):
        step = grid.step / unit
        if not step:
            continue
        np.multiply(scaled, np.float32(1 / step), out=off)
        np.clip(np.rint(off, out=places), -grid.zero, 2**grid.bits - 1 - grid.zero, out=places)
        np.power(np.abs(np.subtract(off, places, out=off), out=off), np.float32(norm), out=off)
        errors[i] = float(np.multiply(off, weights, out=off).sum()) * step**norm
    return errors
