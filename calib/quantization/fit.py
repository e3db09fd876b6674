"""Quantizer ``fit``: search each group's range, then fit its scale and bias by weighted least squares.

For integers q the best scale and bias of w ≈ scale · q + bias are a linear regression; for a grid the best integers are
the nearest ones. From several shrunken ranges the two alternate, and the best result is kept (docs/METHODS.md). Errors
of a column are weighted by the mean square of its inputs, so that the layer's output is what is fitted. No states are
replayed: the weights come from the statistics.
"""

from calib.base.errors import ConfigError
from calib.base.progress import Progress
from calib.models.packed import Packed
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx
import numpy as np

#: Shares of a group's range to begin with: of both ends, of the low one alone, of the high one alone.
SHRUNKEN = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
#: Columns' weights are at least this share of their mean: an input that was zero may not be so elsewhere.
LEAST_WEIGHT = 1e-3
#: Numbers in a part of a layer that is fitted at once.
PART = 1 << 22


def quantize(work: QuantizerInput, rounds: int = 3) -> Quantized:
    """Quantize every layer by itself; activation ranges are the plan's.

    Args:
        rounds: alternations of integers and grid from each range.

    Raises:
        ConfigError: ``rounds`` is negative.
    """
    if rounds < 0:
        raise ConfigError.bad_value("quantizer.rounds", rounds, "must be 0 or more")
    layers = {}
    with Progress("fit", len(work.layers), "layer", delay=2) as progress:
        for name, layer in work.layers.items():
            plan = work.plan[name]
            layers[name] = fitted(
                layer.weight, column_weights(work, name), plan.weight_bits, plan.group_size, work.dtype, rounds
            )
            progress.advance()
    return Quantized(layers)


def column_weights(work: QuantizerInput, name: str) -> mx.array:
    """Mean square of each input channel relative to the mean of all, (columns,); 1 where there are no statistics."""
    power = work.channel_power(name)
    if power is None:
        return mx.ones(work.layers[name].weight.shape[1])
    relative = power / max(float(power.mean()), float(np.finfo(np.float32).tiny))
    return mx.array(np.maximum(relative, LEAST_WEIGHT).astype(np.float32))


def fitted(weight: mx.array, columns: mx.array, bits: int, group_size: int, dtype: mx.Dtype, rounds: int = 3) -> Packed:
    """``weight`` (rows, columns) on grids whose scales and biases ``dtype`` holds; evaluated."""
    rows, width = weight.shape
    at_once = max(1, PART // width)
    parts = []
    for first in range(0, rows, at_once):
        part = weight[first : first + at_once].astype(mx.float32).reshape(-1, width // group_size, group_size)
        parts.append(_fit(part, columns.reshape(-1, group_size), bits, dtype, rounds))
        mx.eval(parts[-1])
    integers, scales, biases = (mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))
    packed = Packed.of_integers(integers.reshape(rows, width), scales, biases, bits, group_size)
    mx.eval(packed.weight)
    return packed


def _fit(w: mx.array, h: mx.array, bits: int, dtype: mx.Dtype, rounds: int) -> tuple[mx.array, mx.array, mx.array]:
    """Integers (rows, groups, size), scales and biases (rows, groups) of groups ``w`` with weights ``h``."""
    most = 2**bits - 1
    low, high = w.min(axis=-1), w.max(axis=-1)
    best = None
    for low_share, high_share in [(s, s) for s in SHRUNKEN] + [
        pair for s in SHRUNKEN[1:] for pair in ((s, 1.0), (1.0, s))
    ]:
        scale = (high * high_share - low * low_share) / most
        bias = low * low_share
        for _ in range(rounds + 1):
            scale, bias = _in_16_bits(scale, bias, dtype)
            q = mx.clip(mx.round((w - bias[..., None]) / scale[..., None]), 0, most)
            error = (h * (w - scale[..., None] * q - bias[..., None]) ** 2).sum(axis=-1)
            best = (error, q, scale, bias) if best is None else _better(best, (error, q, scale, bias))
            scale, bias = _regression(w, q, h, scale)
        mx.eval(best)
    assert best is not None
    _, q, scale, bias = best
    return q.astype(mx.uint32), scale.astype(dtype), bias.astype(dtype)


def _in_16_bits(scale: mx.array, bias: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """The grid as it will be stored; integers are chosen for that one. A scale of zero would divide by it."""
    stored = scale.astype(dtype).astype(mx.float32)
    tiny = mx.array(6e-8 if dtype == mx.float16 else 1e-30)
    return mx.where(mx.abs(stored) < tiny, tiny, stored), bias.astype(dtype).astype(mx.float32)


def _regression(w: mx.array, q: mx.array, h: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
    """Weighted least squares of w on q: scale and bias; the scale as it was where all integers are one."""
    total = h.sum(axis=-1)
    mean_q, mean_w = (h * q).sum(axis=-1) / total, (h * w).sum(axis=-1) / total
    spread = q - mean_q[..., None]
    variance = (h * spread**2).sum(axis=-1)
    slope = (h * spread * (w - mean_w[..., None])).sum(axis=-1) / mx.maximum(variance, 1e-12)
    slope = mx.where(variance > 1e-9, slope, scale)
    return slope, mean_w - slope * mean_q


def _better(
    best: tuple[mx.array, mx.array, mx.array, mx.array], other: tuple[mx.array, mx.array, mx.array, mx.array]
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Group by group the one of the smaller error."""
    smaller = other[0] < best[0]
    error, scale, bias = (mx.where(smaller, other[i], best[i]) for i in (0, 2, 3))
    return error, mx.where(smaller[..., None], other[1], best[1]), scale, bias
