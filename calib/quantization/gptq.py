"""Quantizer ``gptq``: round weights column by column, with the error compensated by the columns not yet rounded.

GPTQ, Frantar et al. 2022 (arXiv 2210.17323), Algorithm 1, for MLX's groups. Over n calibration inputs x the error of a
layer is Σ ‖Wx − Ŵx‖² = n/2 · tr((W − Ŵ) H (W − Ŵ)ᵀ), where H = 2/n Σ x xᵀ.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from calib.activations.taps import TapPoint, TapSelection, tap_points
from calib.base.errors import ConfigError
from calib.base.progress import Progress
from calib.models.packed import Packed
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Number of columns whose errors are applied to later columns in one product: B of Algorithm 1.
BLOCK = 128
#: Largest damping. Long before, columns no longer interact and the result is rounding to nearest.
MOST_DAMPING = 1000


@dataclass(frozen=True)
class Curvature:
    """The Hessian of an input array, shared by the layers that read it.

    Attributes:
        hessian: H, (columns, columns).
        order: the order in which columns are rounded, (columns,).
        factor: the upper triangular U of (H + λI)⁻¹ = Uᵀ U, rows and columns in that order, (columns, columns).
        static: whether grids are computed from the original weights, rather than from each group when it is reached.
    """

    hessian: NDArray[np.float64]
    order: NDArray[np.intp]
    factor: NDArray[np.float64]
    static: bool


def quantize(work: QuantizerInput, damping: float = 0.1, act_order: bool = True, memory_gb: float = 2.0) -> Quantized:
    """Quantize layers in network order, each on the inputs that result from the quantized layers before it.

    A layer with no smaller error than by rounding to nearest is rounded to nearest.

    Args:
        damping: λ relative to the mean of H's diagonal. The authors' code has 0.01, which overfits the few prompts of a
            calibration set: with more, the error on other inputs is smaller.
        act_order: round columns with the largest inputs first, an option of the authors' code.
        memory_gb: memory for the Hessians of one replay, 10⁹ bytes; less means more replays. In addition the largest
            Hessian takes five times its float64 size on the host.

    Raises:
        ConfigError: an argument is out of range.
    """
    if not 0 <= damping <= MOST_DAMPING:
        allowed = f"must be 0 or more, and {MOST_DAMPING} at most"
        raise ConfigError.bad_value("quantizer.damping", damping, allowed)
    if memory_gb <= 0:
        raise ConfigError.bad_value("quantizer.memory_gb", memory_gb, "must be more than 0")
    done: dict[str, Packed] = {}
    replaced: dict[str, mx.array] = {}
    ratios: list[float] = []
    with Progress("gptq", len(work.layers), "layer", delay=2) as progress:
        for points in tap_groups(work, memory_gb * 1e9):
            hessians = gather_hessians(work, points, replaced)
            for point in points:
                curvature = prepare(hessians.pop(point.name), damping, act_order)
                for name in point.names:
                    if name in work.layers:
                        done[name], ratio = _better(work, name, curvature)
                        ratios.append(ratio)
                        progress.advance()
            replaced = {name: packed.dequantize(work.layers[name].weight.dtype) for name, packed in done.items()}
    return Quantized({name: done[name] for name in work.layers}, notes=[_summary(ratios)])


def tap_groups(work: QuantizerInput, memory: float) -> Iterator[list[TapPoint]]:
    """Yield the taps whose Hessians are collected in one replay, in network order: of one block, within ``memory``."""
    taps = tap_points(work.architecture, TapSelection())
    points = [point for point in taps if work.layers.keys() & set(point.names)]

    def place(point: TapPoint) -> int:
        """The block, or less for taps before all blocks: -2 for embedders, -1 for an input shared by several blocks."""
        blocks = {work.architecture.block_of(name) for name in point.names}
        if len(blocks) > 1:
            return -1
        block = blocks.pop()
        return -2 if block is None else block

    for _, block in groupby(sorted(points, key=place), key=place):
        stage: list[TapPoint] = []
        taken = 0
        for point in block:
            size = 4 * _columns(work, point) ** 2
            if stage and taken + size > memory:
                yield stage
                stage, taken = [], 0
            stage.append(point)
            taken += size
        yield stage


def _columns(work: QuantizerInput, point: TapPoint) -> int:
    columns: int = next(work.layers[name] for name in point.names if name in work.layers).weight.shape[1]
    return columns


def gather_hessians(
    work: QuantizerInput, points: Sequence[TapPoint], replaced: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """H by tap, (columns, columns), summed in float32 on the device; ``replaced`` weights replace the model's."""
    sums = {point.name: mx.zeros((_columns(work, point),) * 2) for point in points}
    counts = dict.fromkeys(sums, 0)

    def record(name: str, activation: mx.array) -> mx.array:
        x = activation.reshape(-1, activation.shape[-1]).astype(mx.float32)
        sums[name] += x.T @ x
        counts[name] += len(x)
        return activation

    work.replay(points, record, lambda: list(sums.values()), replaced)
    return {name: total * (2 / max(counts[name], 1)) for name, total in sums.items()}


def prepare(hessian: mx.array, damping: float, act_order: bool) -> Curvature:
    """Factorise H + λI, in float64 on the host.

    λ is ``damping`` times the mean of H's diagonal, increased tenfold until H + λI is positive definite. An H that is
    not finite is replaced by zero.
    """
    from scipy.linalg import LinAlgError, cholesky, lapack  # slow to import: checking a configuration would wait for it

    full = np.array(hessian).astype(np.float64)
    if not np.isfinite(full).all():
        full[:] = 0
    diagonal = full.diagonal()
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(full))
    mean = diagonal.mean() or 1.0
    # With H = R Rᵀ, R upper triangular (Cholesky's factorisation from the last column on), U is the inverse of R: half
    # the work of inverting H, and no second factorisation that may fail.
    backwards = full[np.ix_(order[::-1], order[::-1])]
    # A column whose input is always 0 does not interact with others; it is rounded, as other inputs may use it.
    backwards[np.diag_indices_from(backwards)] += np.where(backwards.diagonal() > 0, 0, mean)
    while True:
        damped = backwards.copy()
        damped[np.diag_indices_from(damped)] += damping * mean
        try:
            lower = cholesky(damped, lower=True, overwrite_a=True)
            break
        except LinAlgError:
            damping = max(10 * damping, 1e-6)
    inverse, _ = lapack.dtrtri(lower, lower=1, overwrite_c=1)
    return Curvature(full, order, np.ascontiguousarray(inverse[::-1, ::-1]), static=act_order)


def gptq_layer(
    weight: NDArray[np.float32], curvature: Curvature, bits: int, group_size: int, dtype: mx.Dtype
) -> Packed:
    """Algorithm 1 on ``weight`` (rows, columns), in float64, with the grids that MLX's rule gives in ``dtype``."""
    rows, columns = weight.shape
    order, factor = curvature.order, curvature.factor
    left = np.ascontiguousarray(weight.T[order], np.float64)  # (columns, rows): columns are contiguous
    scales, biases = _grids(weight, bits, group_size, dtype)
    integers = np.empty((columns, rows), np.uint8)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = np.empty((last - first, rows))
        for i in range(first, last):
            group = order[i] // group_size
            if not curvature.static and i % group_size == 0:
                own = _grids(left[i : i + group_size].T, bits, group_size, dtype)
                scales[group], biases[group] = own[0][0], own[1][0]
            column = _nearest_integers(left[i], scales[group], biases[group], 2**bits - 1)
            integers[order[i]] = column
            error = (left[i] - (scales[group] * column + biases[group])) / factor[i, i]
            left[i + 1 : last] -= factor[i, i + 1 : last, None] * error
            errors[i - first] = error
        left[last:] -= factor[first:last, last:].T @ errors
    stored = [mx.array(x.T.astype(np.float32)).astype(dtype) for x in (scales, biases)]
    return Packed.of_integers(np.ascontiguousarray(integers.T), stored[0], stored[1], bits, group_size)


def _grids(
    weight: NDArray[np.floating], bits: int, group_size: int, dtype: mx.Dtype
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scales and biases of MLX's quantization of ``weight`` (rows, columns), each (groups, rows)."""
    _, *grids = mx.quantize(mx.array(weight.astype(np.float32)).astype(dtype), group_size=group_size, bits=bits)
    scales, biases = (np.array(x.astype(mx.float32)).T.astype(np.float64) for x in grids)
    return scales, biases


def _nearest_integers(
    x: NDArray[np.float64], scale: NDArray[np.float64], bias: NDArray[np.float64], most: int
) -> NDArray[np.float64]:
    """The nearest integers of a grid, 0 … ``most``; its scale may be negative, or 0 where it underflows in 16 bits."""
    return np.clip(np.rint(np.divide(x - bias, scale, out=np.zeros_like(x), where=scale != 0)), 0, most)


def weighted_error(difference: NDArray[np.floating], hessian: NDArray[np.float64]) -> float:
    """tr(D H Dᵀ) for D = ``difference``, (rows, columns)."""
    return float(np.sum((difference @ hessian) * difference))


def _better(work: QuantizerInput, name: str, curvature: Curvature) -> tuple[Packed, float]:
    """Quantize a layer by GPTQ, or to nearest unless GPTQ's error is smaller; returns the ratio of the errors, too."""
    plan, layer = work.plan[name], work.layers[name]
    grid = (plan.weight_bits, plan.group_size, work.dtype)
    weight = np.array(layer.weight.astype(mx.float32))
    both = (gptq_layer(weight, curvature, *grid), Packed.nearest(layer.weight, *grid))
    error, nearest = (weighted_error(weight - np.array(p.dequantize()), curvature.hessian) for p in both)
    return (both[0], error / nearest) if error < nearest else (both[1], 1.0)


def _summary(ratios: Sequence[float]) -> str:
    better = [ratio for ratio in ratios if ratio < 1]
    median = f", at the median {np.median(better):.2g} times as much" if better else ""
    return f"gptq: {len(better)} of {len(ratios)} layers lose less than by rounding to nearest{median}"
