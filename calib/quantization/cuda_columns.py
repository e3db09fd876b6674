"""The inner loop of GPTQ as one CUDA kernel: a block of columns rounded in order, a thread a row.

Plain operations of MLX are five launches a column, and a transformer has half a million columns in all.
"""

from functools import cache
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Rows of a thread block: few, as a layer's rows are to keep all multiprocessors busy.
THREADS = 32

SOURCE = r"""
const int rows = sizes[0];
const int row = blockIdx.x * THREADS + threadIdx.x;
if (row < rows) {
  float left[COLUMNS];
  for (int i = 0; i < COLUMNS; ++i) left[i] = block[i * rows + row];
  for (int i = 0; i < COLUMNS; ++i) {
    const float scale = scales[groups[i] * rows + row];
    const float bias = biases[groups[i] * rows + row];
    // A scale underflows to zero in 16 bits where a group's weights are next to nothing.
    const float nearest = rintf((left[i] - bias) / (scale == 0.0f ? 1.0f : scale));
    const float q = fminf(fmaxf(nearest, 0.0f), most[row]);
    const float error = (left[i] - (scale * q + bias)) / own[i * COLUMNS + i];
    integers[i * rows + row] = (unsigned)q;
    errors[i * rows + row] = error;
    for (int j = i + 1; j < COLUMNS; ++j) left[j] -= own[i * COLUMNS + j] * error;
  }
}
"""


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="calib_round_block",
        input_names=["block", "own", "scales", "biases", "groups", "most", "sizes"],
        output_names=["integers", "errors"],
        source=SOURCE,
    )


def round_block(
    block: mx.array, own: mx.array, scales: mx.array, biases: mx.array, groups: NDArray[np.intp], most: mx.array
) -> tuple[mx.array, mx.array]:
    """Round the columns of a block, as :func:`calib.quantization.gptq.round_block` does."""
    columns, rows = block.shape
    found = _kernel()(
        inputs=[block, own, scales, biases, mx.array(groups.astype(np.int32)), most, mx.array([rows], mx.int32)],
        template=[("COLUMNS", columns), ("THREADS", THREADS)],
        grid=(-(-rows // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[block.shape, block.shape],
        output_dtypes=[mx.uint32, mx.float32],
    )
    return cast(tuple[mx.array, mx.array], tuple(found))
