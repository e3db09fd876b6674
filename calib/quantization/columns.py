"""The inner loop of GPTQ: a block of columns rounded in order, each with the errors of those before it made up for."""

from calib.base.device import compiled, on_cuda
from calib.quantization import cuda_columns

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Columns whose errors are applied to later ones of the block in one product.
FEW = 16


def round_block(
    block: mx.array, own: mx.array, scales: mx.array, biases: mx.array, groups: NDArray[np.intp], most: mx.array
) -> tuple[mx.array, mx.array]:
    """Round the columns of a block in order: their integers, uint32, and errors, both (columns, rows).

    Args:
        block: transposed weights, (columns, rows).
        own: the block's own part of the factor, (columns, columns).
        scales: of all groups, (groups, rows); so are biases.
        groups: the group of each column.
        most: each row's largest integer, (rows,).
    """
    if on_cuda():
        return cuda_columns.round_block(block, own, scales, biases, groups, most)
    pivots, count = 1 / mx.diag(own), len(block)
    integers: list[mx.array] = []
    errors: list[mx.array] = []
    for first in range(0, count, FEW):
        last = min(first + FEW, count)
        few, found = block[: last - first], []
        for i in range(first, last):
            g, row = groups[i].item(), own[i, first:last]
            q, error, few = _column(few, row, few[i - first], scales[g], biases[g], pivots[i], most)
            integers.append(q)
            found.append(error)
        errors.append(mx.stack(found))
        block = block[last - first :] - own[first:last, last:].T @ errors[-1]
    return mx.stack(integers).astype(mx.uint32), mx.concatenate(errors)


@compiled
def _column(
    block: mx.array, row: mx.array, column: mx.array, scale: mx.array, bias: mx.array, pivot: mx.array, most: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Round a column of a block: its integers (rows,), its error, and the block with the error moved on."""
    # A scale underflows to zero in 16 bits where a group's weights are next to nothing.
    q = mx.clip(mx.round((column - bias) / mx.where(scale == 0, 1.0, scale)), 0, most)
    error = (column - (scale * q + bias)) * pivot
    return q, error, block - row[:, None] * error[None]
