"""Depthwise convolutions as matrix products, as MLX has no fast ones on a CPU.

A row of ``width`` pixels of one channel, times a banded matrix of (width, columns), is that row's convolution with one
row of the kernel; summed over the kernel's rows, with rows of the picture that lie so far apart, it is the convolution.
Most of the matrix is zero, and still a BLAS is several times as fast as MLX's loop over positions.
"""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


class Depthwise:
    """A depthwise convolution of square pictures of ``size`` pixels, padded as TensorFlow does ("same").

    ``kernels`` are (channels, k, k), ``bias`` (channels,); the stride divides ``size``.
    """

    def __init__(self, kernels: NDArray[np.float32], bias: NDArray[np.float32], size: int, stride: int):
        self._stride, self._bias = stride, mx.array(bias[:, None, None])
        self._matrices = {row: mx.array(matrix) for row, matrix in _matrices(kernels, size, stride).items()}

    def __call__(self, x: mx.array) -> mx.array:
        """(channels, pictures, size, size) → (channels, pictures, size / stride, size / stride)."""
        channels, count, height, width = x.shape
        first, last = min(self._matrices), max(self._matrices)
        rows, reach = height // self._stride, last - first
        # Rows of zeros around every picture; then all are one column of rows, and what is computed across two pictures
        # is cut off.
        column = mx.pad(x.reshape(channels, count, rows, -1), [(0, 0), (0, 0), (-first, last), (0, 0)])
        column = column.reshape(channels, count * (rows + reach), -1)
        kept = count * (rows + reach) - reach
        total = mx.broadcast_to(self._bias, (channels, kept, width // self._stride))
        for row, matrix in self._matrices.items():
            total = mx.addmm(total, column[:, row - first : row - first + kept], matrix)
        total = mx.pad(total, [(0, 0), (0, reach), (0, 0)])
        return total.reshape(channels, count, rows + reach, -1)[:, :, :rows]


def _matrices(kernels: NDArray[np.float32], size: int, stride: int) -> Mapping[int, NDArray[np.float32]]:
    """By offset in groups of ``stride`` rows, which are side by side in one: (channels, stride * size, columns)."""
    channels, k, _ = kernels.shape
    columns = size // stride
    before = max((columns - 1) * stride + k - size, 0) // 2
    found: dict[int, NDArray[np.float32]] = {}
    out = np.arange(columns)
    for i in range(k):
        group, row = divmod(i - before, stride)
        matrix = found.setdefault(group, np.zeros((channels, stride, size, columns), np.float32))
        for j in range(k):
            at = out * stride - before + j
            there = (at >= 0) & (at < size)
            matrix[:, row, at[there], out[there]] = kernels[:, i, j, None]
    return {g: m.reshape(channels, stride * size, columns) for g, m in sorted(found.items())}
