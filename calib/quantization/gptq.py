"""Quantizer ``gptq``: what rounding takes from one weight is made up for by those not rounded yet.

GPTQ, Frantar et al. 2022 (arXiv 2210.17323), Algorithm 1, onto MLX's groups. A layer y = Wx loses
Σ ‖Wx − Ŵx‖² = n/2 · tr((W − Ŵ) H (W − Ŵ)ᵀ) over its n calibration inputs x, where H = 2/n Σ x xᵀ.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from calib.activations.taps import TapPoint, TapSelection, tap_points
from calib.errors import ConfigError
from calib.models.names import network_order
from calib.quantization.packed import Packed
from calib.quantization.quantizer import Quantized, Work

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cholesky, lapack

#: Columns whose errors reach the columns behind them in one product (the paper's B).
BLOCK = 128


def quantize(work: Work, damping: float = 0.01, memory_gb: float = 2.0, act_order=False, tally=None) -> Quantized:
    """Layers from the first to the last, each on the inputs that the layers rounded before it leave it.

    Args:
        damping: added to the diagonal of H, in parts of its mean.
        memory_gb: Hessians gathered at a time; the fewer, the more often the states are replayed.
    """
    if damping < 0:
        raise ConfigError.bad_value("quantizer.damping", damping, "must be 0 or more")
    if memory_gb <= 0:
        raise ConfigError.bad_value("quantizer.memory_gb", memory_gb, "must be more than 0")
    done: dict[str, Packed] = {}
    ratios: list[float] = []
    for points in stages(work, memory_gb * 1e9):
        replaced = {name: packed.dequantize(work.layers[name].weight.dtype) for name, packed in done.items()}
        hessians = gather(work, points, replaced)
        for point in points:
            hessian = np.array(hessians.pop(point.name)).astype(np.float64)
            order = np.argsort(-hessian.diagonal(), kind="stable") if act_order else None
            factor = inverse_factor(hessian if order is None else hessian[order][:, order], damping)
            for name in point.names:
                if name in work.layers:
                    done[name], ratio = _better(work, name, hessian, factor, order)
                    ratios.append(ratio)
                    if tally is not None:
                        tally[name] = ratio
    return Quantized({name: done[name] for name in work.layers}, notes=[])


def stages(work: Work, memory: float) -> Iterator[list[TapPoint]]:
    """Taps whose Hessians are gathered together, in the order of the network: at most a block, at most ``memory``."""
    points = [p for p in tap_points(work.transformer, TapSelection()) if work.layers.keys() & set(p.names)]
    # What the adaLN layers read, all of them, depends on the embedders alone.
    place = {p.name: (0, 1) if p.name.endswith(".adaln") else network_order(p.name)[:2] for p in points}
    for _, block in groupby(sorted(points, key=lambda p: place[p.name]), key=lambda p: place[p.name]):
        stage: list[TapPoint] = []
        size = 0
        for point in block:
            own = 4 * _columns(work, point) ** 2
            if stage and size + own > memory:
                yield stage
                stage, size = [], 0
            stage.append(point)
            size += own
        yield stage


def _columns(work: Work, point: TapPoint) -> int:
    columns: int = next(work.layers[name] for name in point.names if name in work.layers).weight.shape[1]
    return columns


def gather(work: Work, points: Sequence[TapPoint], replaced: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """H of each tap by name, (columns, columns) float32, with ``replaced`` weights in the layers before."""
    sums = {point.name: mx.zeros((_columns(work, point),) * 2) for point in points}
    counts = dict.fromkeys(sums, 0)

    def record(name: str, activation: mx.array) -> mx.array:
        x = activation.reshape(-1, activation.shape[-1]).astype(mx.float32)
        sums[name] += x.T @ x
        counts[name] += len(x)
        return activation

    work.replay(points, record, lambda: list(sums.values()), replaced)
    return {name: total * (2 / max(counts[name], 1)) for name, total in sums.items()}


def inverse_factor(hessian: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    """The upper triangular U of (H + λI)⁻¹ = Uᵀ U, (columns, columns)"""
    mean = hessian.diagonal().mean() or 1.0
    backwards = hessian[::-1, ::-1].copy()
    np.fill_diagonal(backwards, np.where(backwards.diagonal() > 0, backwards.diagonal(), mean))
    while True:
        try:
            lower = cholesky(backwards + damping * mean * np.eye(len(hessian)), lower=True)
            break
        except LinAlgError:
            damping = max(10 * damping, 1e-6)
    inverse, _ = lapack.dtrtri(lower, lower=1)
    return np.ascontiguousarray(inverse[::-1, ::-1])


def gptq_layer(weight, factor, bits, group_size, dtype, order=None) -> Packed:
    """``weight`` (rows, columns) rounded column by column, the error of each fed forward by U (columns, columns)."""
    rows, columns = weight.shape
    work = weight.T.astype(np.float64)  # (columns, rows): a column is contiguous
    if order is not None:
        pre = [_grid(work[i : i + group_size], bits, dtype) for i in range(0, columns, group_size)]
        work = work[order]
    work = np.ascontiguousarray(work)
    integers = np.empty((columns, rows), np.uint8)
    grids = []
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = np.empty((last - first, rows))
        for i in range(first, last):
            if order is not None:
                _, _, scale, bias = pre[order[i] // group_size]
            elif i % group_size == 0:
                grids.append(_grid(work[i : i + group_size], bits, dtype))
                _, _, scale, bias = grids[-1]
            places = np.divide(work[i] - bias, scale, out=np.zeros(rows), where=scale != 0)
            places = np.clip(np.rint(places), 0, 2**bits - 1)
            integers[i] = places
            error = (work[i] - (scale * places + bias)) / factor[i, i]
            errors[i - first] = error
            work[i + 1 : last] -= factor[i, i + 1 : last, None] * error
        work[last:] -= factor[first:last, last:].T @ errors
    if order is not None:
        grids = pre
        ints = np.empty_like(integers)
        ints[order] = integers
        integers = ints
    scales, biases = (mx.concatenate([g[k] for g in grids], axis=1) for k in (0, 1))
    return Packed.of_integers(np.ascontiguousarray(integers.T), scales, biases, bits, group_size)


def _grid(group, bits, dtype):
    _, scales, biases = mx.quantize(
        mx.array(group.T.astype(np.float32)).astype(dtype), group_size=len(group), bits=bits
    )
    return scales, biases, *(np.array(x.astype(mx.float32)).astype(np.float64)[:, 0] for x in (scales, biases))


def weighted_error(difference, hessian) -> float:
    """tr(D H Dᵀ) of ``difference`` (rows, columns)."""
    return float(np.sum((difference @ hessian) * difference))


def _better(work, name, hessian, factor, order) -> tuple[Packed, float]:
    plan = work.plan[name]
    weight = np.array(work.layers[name].weight.astype(mx.float32))
    nearest = Packed.nearest(work.layers[name].weight, plan.weight_bits, plan.group_size, work.dtype)
    found = gptq_layer(weight, factor, plan.weight_bits, plan.group_size, work.dtype, order)
    errors = [weighted_error(weight - np.array(p.dequantize()), hessian) for p in (found, nearest)]
    return (found, errors[0] / errors[1]) if errors[0] < errors[1] else (nearest, 1.0)
