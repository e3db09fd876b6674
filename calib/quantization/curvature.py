"""The Hessian of a layer's inputs, and its factor, by which GPTQ moves errors between columns."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Name = TypeVar("Name")
#: Factorisations that run ahead of the rounding.
AHEAD = 2
#: Largest condition number of H + λI for which float32 is enough; it bounds the factor's relative error at 10⁻³.
MOST_CONDITION = 1e4


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
        waiting: list[tuple[Name, mx.array, NDArray[np.intp], Future[NDArray[np.float32]]]] = []
        for name, take in hessians:
            # MLX's arrays are made and read in this thread alone.
            hessian, order, backwards = _scaled(take(), act_order)
            waiting.append((name, hessian, order, pool.submit(_inverse_factor, backwards, damping)))
            if len(waiting) > AHEAD:
                yield _curvature(*waiting.pop(0))
        while waiting:
            yield _curvature(*waiting.pop(0))


def _scaled(full: mx.array, act_order: bool) -> tuple[mx.array, NDArray[np.intp], NDArray[np.float32]]:
    """H of a mean diagonal of one, the order of columns, and H in the reverse of that order, on the host.

    An H that is not finite is replaced by zero.
    """
    full = mx.where(mx.isfinite(full).all(), full, 0)
    diagonal = np.array(mx.diag(full), np.float64)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    # float32 holds neither the square nor the inverse of what a tiny input has.
    full = full / (float(diagonal.mean()) or 1.0)
    reverse = mx.array(order[::-1].astype(np.int32))
    backwards = np.array(full[reverse][:, reverse])
    # A column whose input is always 0 does not interact with others; it is rounded, as other inputs may use it.
    backwards[np.diag_indices_from(backwards)] += np.where(backwards.diagonal() > 0, 0, 1)
    return full, order, backwards


def _curvature(
    name: Name, hessian: mx.array, order: NDArray[np.intp], inverse: Future[NDArray[np.float32]]
) -> tuple[Name, Curvature]:
    return name, Curvature(hessian, order, mx.array(inverse.result().T).T[::-1, ::-1])


def _inverse_factor(backwards: NDArray[np.float32], damping: float) -> NDArray[np.float32]:
    """The lower triangular R⁻¹ of H + λI = R Rᵀ, all in reverse order, so that U is R⁻¹ from its last column on.

    Half the work of inverting H, and no second factorisation that may fail. λ is ``damping`` times the mean of H's
    diagonal, increased tenfold until H + λI is positive definite. No eigenvalue is larger than the trace, which bounds
    the condition number by columns / damping + 1.
    """
    from scipy.linalg import LinAlgError, cholesky, lapack  # slow to import: checking a configuration would wait for it

    dtype = np.float32 if len(backwards) < MOST_CONDITION * damping else np.float64
    while True:
        # LAPACK's order of elements; H is symmetric.
        damped: NDArray[np.floating] = backwards.T.astype(dtype, order="F")
        damped[np.diag_indices_from(damped)] += damping
        try:
            lower = cholesky(damped, lower=True, overwrite_a=True, check_finite=False)
            break
        except LinAlgError:
            damping, dtype = max(10 * damping, 1e-6), np.float64
    inverse, _ = (lapack.dtrtri if dtype == np.float64 else lapack.strtri)(lower, lower=1, overwrite_c=1)
    found: NDArray[np.float32] = inverse.astype(np.float32, copy=False)
    return found
