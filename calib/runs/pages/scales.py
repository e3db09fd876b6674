"""Chooses where axes begin and end, and the round values that are marked on them."""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_STEPS = (1, 2, 5, 10)


def limits(values: Iterable[NDArray[np.float64]], logarithmic: bool, margin: float) -> tuple[float, float]:
    """Return the least and the largest finite value, ``margin`` of their distance added at either end.

    A logarithmic axis counts the positive values alone. Without any value the axis is from 0, or 0.1, to 1.
    """
    every = np.concatenate([np.ravel(v) for v in values] or [np.empty(0)])
    every = every[np.isfinite(every) & (every > (0 if logarithmic else -math.inf))]
    if not every.size:
        return (0.1 if logarithmic else 0.0), 1.0
    low, high = float(every.min()), float(every.max())
    if logarithmic:
        extra = (high / low) ** margin if high > low else 2.0
        return low / extra, high * extra
    extra = (high - low) * margin if high > low else abs(low) / 2 or 1.0
    return low - extra, high + extra


def ticks(low: float, high: float, logarithmic: bool, most: int) -> list[float]:
    """Return at most ``most`` round values from ``low`` to ``high``.

    On a logarithmic axis they are 1, 2, 5, 10 …, or fewer of each decade; on one of less than a decade evenly spaced
    values, unless three of 1, 2, 5, 10 … lie on it.
    """
    if logarithmic:
        marked = _decades(low, high, most)
        if high >= 10 * low or len(marked) > 2:
            return marked
    size = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(size))
    step = next(factor * unit for factor in _STEPS if factor * unit >= size * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)][:most]


def _decades(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marked: list[float] = []
    for factors, stride in (((1, 2, 5), 1), ((1, 3), 1), *(((1,), k * 10**e) for e in range(3) for k in (1, 2, 5))):
        exponents = range(-(-first // stride) * stride, last + 1, stride)
        marked = [v for e in exponents for f in factors if low <= (v := float(f"{f}e{e}")) <= high]
        if len(marked) <= most:
            break
    return marked


def plain(value: float) -> str:
    """Return ``value`` as an axis shows it, to six digits; Matplotlib would set powers of ten as slow formulas."""
    return f"{value:.6g}"
