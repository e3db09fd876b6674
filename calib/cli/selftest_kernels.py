"""Self-test of the MLX operations that collection and quantization use, compared with NumPy."""

from collections.abc import Iterator
from typing import Any

from calib.activations.bits import count_bits, top_bits
from calib.activations.histogram import BINS, ordered_keys
from calib.analysis.grid import Grid
from calib.cli.selftest_check import Check, differing, normal, relative
from calib.models.packed import Packed
from calib.quantization.columns import round_block

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


def every_pattern() -> NDArray[np.uint16]:
    """All 16-bit patterns, (65536,)."""
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def bfloat16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 ``bits``, a type that NumPy lacks."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def check_views() -> Iterator[Check]:
    """Check the bit patterns of floats, and the rounding to 16-bit types."""
    x = normal(64, 128)
    x += np.copysign(np.float32(0.01), x)  # avoids denormals, which are not tested here
    yield Check("view float32 as uint16", differing(np.array(mx.array(x).view(mx.uint16)), x.view(np.uint16)), 0)
    half = x.astype(np.float16).view(np.uint16)
    yield Check(
        "round to float16, view as uint16", differing(np.array(mx.array(x).astype(mx.float16).view(mx.uint16)), half), 0
    )
    wide = x.view(np.uint32)
    brain = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    yield Check(
        "round to bfloat16, view as uint16",
        differing(np.array(mx.array(x).astype(mx.bfloat16).view(mx.uint16)), brain),
        0,
    )


def disorder(x: mx.array, values: NDArray[Any]) -> float:
    """Number of neighbours out of order when finite ``values`` are sorted by the keys of ``x``."""
    finite = np.isfinite(values)
    keys = ordered_keys(np.array(top_bits(x)))
    ordered = values[finite].astype(np.float64)[np.argsort(keys[finite], kind="stable")]
    return float(np.sum(np.diff(ordered) < 0))


def check_keys() -> Iterator[Check]:
    """Check that the integer keys of histograms are in the order of the values."""
    bits = every_pattern()
    half, brain = mx.array(bits).view(mx.float16), mx.array(bits).view(mx.bfloat16)
    yield Check("order keys of every float16", disorder(half, bits.view(np.float16)), 0)
    yield Check("order keys of every bfloat16", disorder(brain, bfloat16_values(bits)), 0)
    yield Check(
        "order keys are all different", float(BINS - len(np.unique(ordered_keys(np.array(top_bits(brain)))))), 0
    )
    x = normal(1 << 16)
    coarse = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    yield Check("order keys of float32", disorder(mx.array(x), coarse), 0)


def check_scatter() -> Iterator[Check]:
    """Check counting by scatter-add, in which many threads add at once."""
    # Few distinct values, so that threads collide on the same counter.
    index = np.random.RandomState(0).randint(0, 7, 1 << 20).astype(np.uint32)
    counts = mx.zeros((8,), dtype=mx.uint32).at[mx.array(index)].add(mx.array(1, dtype=mx.uint32))
    yield Check("uint32 scatter add, 7 bins", differing(np.array(counts), np.bincount(index, minlength=8)), 0)
    half = normal(1 << 20).astype(np.float16)
    counts = count_bits(top_bits(mx.array(half)))
    expected = np.bincount(half.view(np.uint16), minlength=BINS)
    yield Check("uint32 scatter add, 65536 bins", differing(np.array(counts), expected), 0)


def check_reductions() -> Iterator[Check]:
    """Check per-channel extremes and sums."""
    x = normal(5000, 96) + 3
    y = mx.array(x)
    yield Check("min over rows", differing(np.array(mx.min(y, axis=0)), x.min(axis=0)), 0)
    yield Check("max over rows", differing(np.array(mx.max(y, axis=0)), x.max(axis=0)), 0)
    yield Check("sum over rows", relative(np.array(mx.sum(y, axis=0)), x.astype(np.float64).sum(axis=0)), 1e-4)


def quantized_by_numpy(
    w: NDArray[np.float32], bits: int, group_size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """MLX's affine quantization of ``w``, dequantized, and the scale at each value, in NumPy.

    The method of mlx/backend/cpu/quantized.cpp: the end of a group's range that is farther from zero, and zero itself,
    are exact.
    """
    levels = 2**bits - 1
    groups = w.reshape(-1, group_size)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    below = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / levels, np.float32(1e-7)) * np.where(below, 1, -1).astype(np.float32)
    edge = np.where(below, low, high)
    zero = np.rint(edge / scale)
    exact = zero != 0
    scale = np.where(exact, edge / np.where(exact, zero, 1), scale)
    bias = np.where(exact, edge, 0)
    q = np.clip(np.rint((groups - bias) / scale), 0, levels)
    steps = np.broadcast_to(np.abs(scale), groups.shape)
    return (q * scale + bias).reshape(w.shape).astype(np.float32), steps.reshape(w.shape).astype(np.float32)


def check_quantize() -> Iterator[Check]:
    """Check quantizing and dequantizing weights, at every bit-width and group size that plans use."""
    w = normal(128, 512)
    for bits in (2, 3, 4, 5, 6, 8):
        worst = 0.0
        for group_size in (32, 64, 128):
            packed = mx.quantize(mx.array(w), group_size=group_size, bits=bits)
            restored = np.array(mx.dequantize(*packed, group_size=group_size, bits=bits))
            expected, steps = quantized_by_numpy(w, bits, group_size)
            # rms in units of the scale: a value midway between two grid points may round either way
            worst = max(worst, float(np.sqrt(np.mean(((restored - expected) / steps) ** 2))))
        yield Check(f"quantize {bits} bits, groups of 32, 64, 128 (steps)", worst, 5e-2)


def rounded_by_numpy(
    block: NDArray[np.float32],
    own: NDArray[np.float32],
    scale: NDArray[np.float32],
    bias: NDArray[np.float32],
    most: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Integers and errors of GPTQ's inner loop in float64, (columns, rows)."""
    left, integers, errors = block.astype(np.float64), [], []
    for i in range(len(left)):
        q = np.clip(np.rint((left[i] - bias) / scale), 0, most)
        errors.append((left[i] - (scale * q + bias)) / own[i, i])
        integers.append(q.astype(np.int64))
        left -= own[i].astype(np.float64)[:, None] * errors[-1]
    return np.array(integers), np.array(errors)


def check_columns() -> Iterator[Check]:
    """Check the rounding of columns in order, in which every error moves on to the columns that follow."""
    columns, rows = 64, 200
    block = normal(columns, rows)
    own = np.triu(0.1 * normal(columns, columns, seed=1), 1) + np.diag(np.full(columns, 1, np.float32))
    scale, bias = np.full(rows, 0.3, np.float32), np.full(rows, -2.2, np.float32)
    most = mx.full((rows,), 15.0)
    groups = np.zeros(columns, np.intp)
    weights, factor, scales, biases = (mx.array(x) for x in (block, own, scale[None], bias[None]))
    integers, errors = round_block(weights, factor, scales, biases, groups, most)
    expected, wrong = rounded_by_numpy(block, own, scale, bias, 15)
    # A value midway between two grid points may round either way, and moves what follows in its row.
    same = np.array(integers).astype(np.int64) == expected
    yield Check("columns rounded in order: integers that differ", float(np.mean(~same)), 5e-2)
    alike = same.all(axis=0)
    yield Check("columns rounded in order: errors", relative(np.array(errors)[:, alike], wrong[:, alike]), 1e-3)


def check_quantized_products() -> Iterator[Check]:
    """Check products with packed weights and 16-bit scales, and the quantization of activations."""
    x, w = normal(96, 256), normal(192, 256, seed=1)
    for bits in (2, 3, 4, 5, 6, 8):
        worst, failed = 0.0, ""
        for group_size in (32, 64, 128):
            packed = Packed.nearest(mx.array(w), bits, group_size, mx.float16)
            parts = (packed.weight, packed.scales, packed.biases)
            product = mx.quantized_matmul(mx.array(x), *parts, transpose=True, group_size=group_size, bits=bits)
            expected = x.astype(np.float64) @ np.array(packed.dequantize()).astype(np.float64).T
            try:
                worst = max(worst, relative(np.array(product.astype(mx.float32)), expected))
            except RuntimeError as error:  # other widths may run
                worst, failed = (
                    float("inf"),
                    f"groups of {group_size}: {error}; evaluation.dequantize=true does without",
                )
        yield Check(f"product with {bits}-bit weights, groups of 32, 64, 128", worst, 5e-3, failed)
    wide = x.astype(np.float64)
    for bits in (4, 6, 8):
        grid = Grid.over(-2.0, 3.0, bits)
        difference = np.abs(np.array(grid.apply_mx(mx.array(x))) - grid.apply(wide)) / grid.scale
        # a value midway between two grid points may round either way
        yield Check(f"activations at {bits} bits (rms, steps)", float(np.sqrt(np.mean(difference**2))), 5e-2)


def check_products() -> Iterator[Check]:
    """Check matrix product, layer norm and attention; NVIDIA devices round the factors of products to TF32."""
    a, b = normal(192, 256), normal(256, 320, seed=1)
    product = np.array(mx.array(a) @ mx.array(b))
    yield Check("matrix product", relative(product, a.astype(np.float64) @ b), 5e-3)
    x = normal(64, 256) + 1
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(axis=1, keepdims=True)) / np.sqrt(wide.var(axis=1, keepdims=True) + 1e-6)
    yield Check("layer norm", relative(np.array(mx.fast.layer_norm(mx.array(x), None, None, 1e-6)), expected), 1e-4)
    q, k, v = (normal(2, 4, 80, 64, seed=i) for i in range(3))
    logits = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / 8
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ v.astype(np.float64)
    output = mx.fast.scaled_dot_product_attention(mx.array(q), mx.array(k), mx.array(v), scale=1 / 8)
    yield Check("scaled dot product attention", relative(np.array(output), expected), 1e-2)
