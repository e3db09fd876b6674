"""The Hessian of a layer's inputs, and its factor, by which GPTQ moves errors between columns."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Name = TypeVar("Name")
#: H, the order of columns and the factor.
_Factorised: TypeAlias = tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.float32]]

#: Factorisations that run ahead of the rounding.
AHEAD = 2


@dataclass(frozen=True)
class Curvature:
    """The Hessian of an input array, shared by the layers that read it.

    Attributes:
        hessian: H, (columns, columns) float32.
        order: the order in which columns are rounded, (columns,).
        factor: the upper triangular U of (H + λI)⁻¹ = Uᵀ U, rows and columns in that order, (columns, columns) float32.
    """

    hessian: mx.array
    order: NDArray[np.intp]
    factor: mx.array

    def loss(self, difference: mx.array) -> mx.array:
        """d H dᵀ of each row d of ``difference``, (rows,); lazy."""
        return ((difference @ self.hessian) * difference).sum(axis=1)


def prepared(
    hessians: Sequence[tuple[Name, Callable[[], mx.array]]], damping: float, act_order: bool
) -> Iterator[tuple[Name, Curvature]]:
    """Yield the curvature of each Hessian, in order; the next ones are factorised on the host meanwhile.

    No device that MLX has but the CPU factorises. A Hessian is released once it was taken.
    """
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: list[tuple[Name, Future[_Factorised]]] = []
        for name, take in hessians:
            # MLX's arrays are made and read in this thread alone.
            waiting.append((name, pool.submit(_factorised, np.array(take(), np.float64), damping, act_order)))
            if len(waiting) > AHEAD:
                done, result = waiting.pop(0)
                yield done, _curvature(*result.result())
        while waiting:
            done, result = waiting.pop(0)
            yield done, _curvature(*result.result())


def _curvature(hessian: NDArray[np.float32], order: NDArray[np.intp], factor: NDArray[np.float32]) -> Curvature:
    return Curvature(mx.array(hessian), order, mx.array(factor))


def _factorised(full: NDArray[np.float64], damping: float, act_order: bool) -> _Factorised:
    """Factorise H + λI in float64.

    λ is ``damping`` times the mean of H's diagonal, increased tenfold until H + λI is positive definite. An H that is
    not finite is replaced by zero.
    """
    from scipy.linalg import LinAlgError, cholesky, lapack  # slow to import: checking a configuration would wait for it

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
    # Relative to the mean: float32 holds neither the square nor the inverse of what a tiny input has.
    factor = np.ascontiguousarray(inverse[::-1, ::-1]) * np.sqrt(mean)
    return (full / mean).astype(np.float32), order, factor.astype(np.float32)
