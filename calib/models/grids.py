"""Grids of groups of weights: search each group's range, and fit its scale and bias by weighted least squares.

For integers q the best scale and bias of w ≈ scale · q + bias are a linear regression; for a grid the best integers are
the nearest ones. The best of many shrunken ranges is found first, then the two alternate (docs/METHODS.md). Scales and
biases are rounded to 16 bits before integers are chosen for them.
"""

from collections.abc import Sequence

from calib.base.device import compiled, on_gpu
from calib.models.packed import Packed

import mlx.core as mx
import numpy as np

#: Shares of a group's range that are tried.
SHARES = (1.0, 0.95, 0.9, 0.83, 0.75, 0.65, 0.5)
#: Numbers of a layer that are searched at once; on a CPU as many as its caches hold.
PART, PART_CPU = 1 << 22, 1 << 19


def searched(
    weight: mx.array,
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    columns: mx.array | None = None,
    rounds: int = 0,
    each_end: bool = True,
    whole_rows: bool = False,
) -> Packed:
    """Quantize ``weight`` (rows, columns) with the least Σ columns · (w − ŵ)² found in each group; evaluated.

    Never more than MLX's own rounding loses, whose grid is among those tried, but for ``whole_rows``.

    Args:
        dtype: 16-bit type of scales and biases.
        columns: weights of the columns' errors, (columns,), all positive; None: all alike.
        rounds: regressions of the best grid.
        each_end: after both ends at once try each end by itself; a third of the time without.
        whole_rows: the groups of a row have one grid, that of the whole row.
    """
    rows, width = weight.shape
    size = width if whole_rows else group_size
    h = mx.ones((width // size, size)) if columns is None else columns.reshape(-1, size)
    at_once = max(1, (PART if on_gpu() else PART_CPU) // width)
    parts: list[Packed] = []
    for first in range(0, rows, at_once):
        part = weight[first : first + at_once]
        w = part.astype(mx.float32).reshape(-1, width // size, size)
        search = _Search(w, h, mx.array(float(2**bits - 1)), dtype)
        if not whole_rows:
            _, *grids = mx.quantize(part.astype(dtype), group_size=group_size, bits=bits)
            search.grid(grids[0], grids[1])
        search.ranges(each_end)
        search.regressions(rounds)
        integers, *grids = search.result()
        if whole_rows:
            grids = [mx.repeat(array, width // group_size, axis=1) for array in grids]
        parts.append(Packed.of_integers(integers.reshape(-1, width), grids[0], grids[1], bits, group_size))
        mx.eval(parts[-1].weight, parts[-1].scales, parts[-1].biases)
    return Packed.of_rows(parts)


def left_by_search(weights: Sequence[mx.array], bits: int, group_size: int, dtype: mx.Dtype) -> mx.array:
    """The share of MLX's squared rounding error that a quick search leaves of each of ``weights``, (weights,); lazy.

    All are (rows, columns) of as many columns, and searched together, as many small searches are slow on a GPU.
    """
    together = mx.concatenate(list(weights))
    w = together.astype(mx.float32).reshape(len(together), -1, group_size)
    search = _Search(w, mx.ones(w.shape[1:]), mx.array(float(2**bits - 1)), dtype)
    search.grid(*mx.quantize(together.astype(dtype), group_size=group_size, bits=bits)[1:])
    before = search.errors()
    search.ranges(each_end=False)
    search.regressions(2)
    ends = np.cumsum([len(weight) for weight in weights])[:-1].tolist()
    parts = [[part.sum() for part in mx.split(errors, ends)] for errors in (before, search.errors())]
    first, last = map(mx.stack, parts)
    return mx.where(first > 0, last / first, 1.0)


class _Search:
    """The best grid so far of each group of ``w`` (rows, groups, size); errors are weighted by ``h`` (groups, size)."""

    def __init__(self, w: mx.array, h: mx.array, most: mx.array, dtype: mx.Dtype):
        self._w, self._h, self._most, self._dtype = w, h, most, dtype
        self._scale = self._bias = mx.zeros(w.shape[:2])
        self._error = mx.full(w.shape[:2], mx.inf)

    def grid(self, scale: mx.array, bias: mx.array) -> None:
        """Try a grid, as it will be stored."""
        tried = _stored(scale, bias, self._dtype)
        error = _error(self._w, self._h, *tried, self._most)
        self._error, self._scale, self._bias = _better(self._error, self._scale, self._bias, error, *tried)
        mx.async_eval(self._error, self._scale, self._bias)

    def ranges(self, each_end: bool) -> None:
        """Try shares of the groups' ranges: of both ends, then of the low and of the high one beside the best."""
        least, largest = self._w.min(axis=-1), self._w.max(axis=-1)
        for share in SHARES:
            self.grid((largest - least) * (share / self._most), least * share)
        if each_end:
            high = self._bias + self._scale * self._most
            for share in SHARES:
                self.grid((high - least * share) / self._most, least * share)
            low = self._bias
            for share in SHARES:
                self.grid((largest * share - low) / self._most, low)

    def regressions(self, rounds: int) -> None:
        """Fit scale and bias to the nearest integers, as often as told."""
        for _ in range(rounds):
            self.grid(*_regression(self._w, self._integers(), self._h, self._scale))

    def errors(self) -> mx.array:
        """The weighted squared error of each group, (rows, groups)."""
        return self._error

    def result(self) -> tuple[mx.array, mx.array, mx.array]:
        """Integers (rows, groups, size), scales and biases (rows, groups)."""
        return self._integers().astype(mx.uint8), self._scale.astype(self._dtype), self._bias.astype(self._dtype)

    def _integers(self) -> mx.array:
        return mx.clip(mx.round((self._w - self._bias[..., None]) / self._scale[..., None]), 0, self._most)


def _stored(scale: mx.array, bias: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """The grid as it will be stored, in float32. A scale of zero would be divided by."""
    stored = scale.astype(dtype).astype(mx.float32)
    tiny = mx.array(6e-8 if dtype == mx.float16 else 1e-30)
    return mx.where(mx.abs(stored) < tiny, tiny, stored), bias.astype(dtype).astype(mx.float32)


@compiled
def _error(w: mx.array, h: mx.array, scale: mx.array, bias: mx.array, most: mx.array) -> mx.array:
    q = mx.clip(mx.round((w - bias[..., None]) / scale[..., None]), 0, most)
    return (h * mx.square(w - scale[..., None] * q - bias[..., None])).sum(axis=-1)  # ** 2 is powf on a CPU


@compiled
def _better(
    error: mx.array, scale: mx.array, bias: mx.array, error_2: mx.array, scale_2: mx.array, bias_2: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Group by group the grid of the smaller error."""
    smaller = error_2 < error
    return mx.where(smaller, error_2, error), mx.where(smaller, scale_2, scale), mx.where(smaller, bias_2, bias)


@compiled
def _regression(w: mx.array, q: mx.array, h: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
    """Weighted least squares of w on q: scale and bias; the scale as it was where all integers are one."""
    total = h.sum(axis=-1)
    mean_q, mean_w = (h * q).sum(axis=-1) / total, (h * w).sum(axis=-1) / total
    spread = q - mean_q[..., None]
    variance = (h * mx.square(spread)).sum(axis=-1)
    slope = (h * spread * (w - mean_w[..., None])).sum(axis=-1) / mx.maximum(variance, 1e-12)
    slope = mx.where(variance > 1e-9, slope, scale)
    return slope, mean_w - slope * mean_q
