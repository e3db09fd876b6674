"""The Hessian of a layer's inputs, and its factor, by which GPTQ moves errors between columns."""

from collections.abc import Sequence
from dataclasses import dataclass

from calib.base.device import on_gpu
from calib.quantization import strips

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Largest bound of the condition number of H + λI for which float32 is enough. What it rounds is 10⁻⁷ of H's largest
#: eigenvalue, then 10⁻² of λ at most, and H is summed in float32 itself.
MOST_CONDITION = 1e5


@dataclass(frozen=True)
class Curvature:
    """The Hessian of an input array, shared by the layers that read it.

    Attributes:
        hessian: H, (columns, columns) float32.
        order: the order in which columns are rounded, (columns,).
        factor: the upper triangular U of (H + λI)⁻¹ = Uᵀ U, rows and columns in that order, float32, in strips of
            :data:`strips.STRIP` rows; each begins with the column of its first row.
    """

    hessian: mx.array
    order: NDArray[np.intp]
    factor: Sequence[mx.array]

    def rows(self, first: int, last: int) -> mx.array:
        """Rows ``first`` to ``last`` of U, from column ``first`` on; lazy."""
        parts = []
        for start in range(first - first % strips.STRIP, last, strips.STRIP):
            strip, own = self.factor[start // strips.STRIP], max(first - start, 0)
            part = strip[own : last - start, own:]
            parts.append(mx.pad(part, [(0, 0), (start - first, 0)]) if start > first else part)
        return mx.concatenate(parts) if len(parts) > 1 else parts[0]

    def loss(self, difference: mx.array) -> mx.array:
        """d H dᵀ of each row d of ``difference``, (rows,); evaluated. H is symmetric: its lower half is enough."""
        columns, total = mx.contiguous(difference.T), mx.zeros(len(difference))
        for first, last in strips.bounds(len(self.order)):
            before, own = self.hessian[first:last, :first], self.hessian[first:last, first:last]
            product = mx.concatenate([2 * before, own], axis=1) @ columns[:last]
            total += (product * columns[first:last]).sum(axis=0)
            if not on_gpu():  # where memory is taken for all products before the first is computed
                mx.eval(total)
        mx.eval(total)
        return total


def curvature_of(hessian: mx.array, damping: float, act_order: bool) -> Curvature:
    """The curvature of a Hessian, relative to its mean diagonal; of zero where it is not finite."""
    if not mx.isfinite(hessian).all().item():
        hessian = mx.zeros_like(hessian)
    diagonal = np.array(mx.diag(hessian), np.float64)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    # float32 holds neither the square nor the inverse of what a tiny input has.
    hessian = hessian / (float(diagonal.mean()) or 1.0)
    mx.eval(hessian)
    # R⁻¹ of H + λI = R Rᵀ, all in reverse order, is U from its last column on: half the work of inverting H, and no
    # second factorisation that may fail. No eigenvalue is larger than the trace, which bounds the condition number by
    # columns / damping + 1.
    inverse = _in_float32(hessian, order[::-1], damping) if len(order) < MOST_CONDITION * damping else None
    if inverse is None:
        inverse = _in_float64(hessian, order[::-1], damping)
    factor = []
    while inverse:
        factor.append(mx.contiguous(inverse.pop()[::-1, ::-1]))
        mx.eval(factor[-1])
    return Curvature(hessian, order, factor)


def _in_float32(hessian: mx.array, order: NDArray[np.intp], damping: float) -> list[mx.array] | None:
    """R⁻¹ in strips; None where H + λI is not positive definite in float32."""
    columns, found = mx.array(order.astype(np.int32)), []
    for first, last in strips.bounds(len(order)):
        part = hessian[columns[first:last]][:, columns[:last]]
        own = mx.diag(part[:, first:])
        found.append(mx.concatenate([part[:, :first], part[:, first:] + mx.diag(damping + (own <= 0))], axis=1))
        mx.eval(found[-1])
    return found if strips.inverse_factor(found) else None


def _in_float64(hessian: mx.array, order: NDArray[np.intp], damping: float) -> list[mx.array]:
    """R⁻¹ in strips, on the host; λ is increased tenfold until H + λI is positive definite."""
    from scipy.linalg import LinAlgError, cholesky, lapack  # slow to import: checking a configuration would wait for it

    while True:
        # LAPACK's order of elements; H is symmetric.
        damped: NDArray[np.float64] = np.array(hessian)[np.ix_(order, order)].T.astype(np.float64, order="F")
        damped[np.diag_indices_from(damped)] += damping + (damped.diagonal() <= 0)
        try:
            lower = cholesky(damped, lower=True, overwrite_a=True, check_finite=False)
            break
        except LinAlgError:
            damping = max(10 * damping, 1e-6)
    inverse, _ = lapack.dtrtri(lower, lower=1, overwrite_c=1)
    return [mx.array(inverse[first:last, :last].astype(np.float32)) for first, last in strips.bounds(len(order))]
