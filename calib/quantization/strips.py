"""Symmetric matrices in strips of rows, half the memory of whole ones, and their factorisation on MLX's device.

MLX factorises on the CPU alone. So diagonal blocks are factorised there, and all else is products.
"""

from collections.abc import Iterable, Sequence
from functools import cache

from calib.base.device import on_cuda

import mlx.core as mx
import numpy as np

#: Rows of a strip; a multiple of :data:`calib.quantization.gptq.BLOCK`.
STRIP = 512


def bounds(columns: int) -> list[tuple[int, int]]:
    """First and last row of each strip; the first strip may be shorter than others."""
    return [(max(0, last - STRIP), last) for last in range(columns, 0, -STRIP)][::-1]


def nbytes(columns: int) -> int:
    """Bytes of a matrix in strips."""
    return 4 * sum((last - first) * last for first, last in bounds(columns))


def zeros(columns: int) -> list[mx.array]:
    """A matrix of zeros."""
    return [mx.zeros((last - first, last)) for first, last in bounds(columns)]


def plus_squares(strips: Sequence[mx.array], x: mx.array, y: mx.array) -> list[mx.array]:
    """xᵀ y, which is symmetric, added to a matrix; x and y are (rows, columns); lazy."""
    return [
        mx.addmm(strip, x[:, first:last].T, y[:, :last])
        for strip, (first, last) in zip(strips, bounds(x.shape[1]), strict=True)
    ]


def whole(strips: list[mx.array]) -> mx.array:
    """The matrix (columns, columns); evaluated. ``strips`` is emptied, so that each is freed once it was used."""
    columns = strips[-1].shape[1]
    found = mx.zeros((columns, columns))
    for first, last in reversed(bounds(columns)):
        strip = strips.pop()
        found[first:last, :last] = strip
        found[:first, first:last] = strip[:, :first].T
        mx.eval(found)
    return found


def inverse_factor(strips: list[mx.array]) -> bool:
    """Replace a matrix A = R Rᵀ by R⁻¹, both lower triangular, in the place of its strips; evaluated.

    Returns False, with the work half done, where A is not positive definite in float32.

    Block after block of columns, [A I] is multiplied from the left until it is [Rᵀ R⁻¹]. Of both what is not zero is
    as much as A has.
    """
    for k, (first, last) in enumerate(bounds(strips[-1].shape[1])):
        own = _inverse_of_block(strips[k][:, first:])
        if own is None:
            return False
        row = mx.concatenate([_product(own, strips[k][:, :first]), own], axis=1) if first else own
        factors = [_product(strip[:, first:last], own.T) for strip in strips[k + 1 :]]
        across = mx.concatenate([row, *(factor.T for factor in factors)], axis=1)
        mx.eval(row, across)
        strips[k] = row
        for i, factor in enumerate(factors, k + 1):
            strip = strips[i]
            strip = mx.concatenate([strip[:, :first], mx.zeros((len(strip), last - first)), strip[:, last:]], axis=1)
            for one, other in _factors(factor, across[:, : strip.shape[1]]):
                strip = mx.addmm(strip, one, other, alpha=-1.0)
            strips[i] = strip
            mx.eval(strip)
    return True


def _inverse_of_block(block: mx.array) -> mx.array | None:
    """R⁻¹ of a diagonal block R Rᵀ; None where it is not positive definite in float32."""
    if not on_cuda():
        lower = mx.linalg.cholesky(block, stream=mx.cpu)
        # MLX says nothing; LAPACK stops at the first root that is not positive.
        return mx.linalg.tri_inv(lower, stream=mx.cpu) if (mx.diag(lower) > 0).all().item() else None
    # MLX for CUDA has the reference LAPACK, which is far slower than SciPy's; elsewhere the threads of two fast ones
    # would wait for each other.
    from scipy.linalg import LinAlgError, cholesky, lapack  # slow to import: checking a configuration would wait for it

    try:
        lower = cholesky(np.array(block), lower=True, check_finite=False)
    except LinAlgError:
        return None
    if not (lower.diagonal() > 0).all():  # NaN is no error of OpenBLAS's
        return None
    return mx.array(np.ascontiguousarray(lapack.strtri(lower, lower=1)[0]))


def _product(one: mx.array, other: mx.array) -> mx.array:
    """A product in float32 on any device; lazy."""
    first, *rest = _factors(one, other)
    total = first[0] @ first[1]
    for pair in rest:
        total = mx.addmm(total, *pair)
    return total


def _factors(one: mx.array, other: mx.array) -> Iterable[tuple[mx.array, mx.array]]:
    """Pairs of matrices whose products add up to that of two in float32, whatever the device rounds factors to."""
    if not rounds_factors():
        return [(one, other)]
    (one, rest), (other, other_rest) = split(one), split(other)
    return [(rest, other), (one, other_rest), (one, other)]


def split(x: mx.array) -> tuple[mx.array, mx.array]:
    """x as the sum of two arrays, the first of 11 significant bits and the second of 13; lazy."""
    high = (x.view(mx.uint32) & 0xFFFFE000).view(mx.float32)
    return high, x - high


@cache
def rounds_factors() -> bool:
    """Whether products of float32 have factors rounded to TF32's 11 significant bits, as on NVIDIA's GPUs."""
    x = mx.full((STRIP, STRIP), 1 + 2**-12)
    return not mx.array_equal(x @ mx.eye(STRIP), x).item()
