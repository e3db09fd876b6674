"""Solve a multiple-choice knapsack exactly: one option for each layer, with the least total cost within a budget.

The integer program of docs/METHODS.md §4 ``allocate``, after MixDQ (arXiv 2405.17873) and HAWQ-V3 (arXiv 2011.10680),
solved by HiGHS. HiGHS has absolute tolerances (10⁻⁶ between a solution and its bound), below which sensitivities of
10⁻⁸ vanish. So it gets the problem that a Lagrangian bound leaves open, scaled to that bound's gap: the few options
that an optimum may contain, with costs from 0 to :data:`SCALE`, and integer sizes in units of their common divisor.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from calib.base.errors import CalibError

import numpy as np
from numpy.typing import NDArray

#: The largest cost given to HiGHS: with its tolerance of 10⁻⁶ the optimum is known to 10⁻¹² of the open gap.
SCALE = 1e6
#: Seconds after which HiGHS gives up; known hard problems take a few.
TIME_LIMIT = 300.0

Floats = NDArray[np.float64]
Choice = NDArray[np.intp]


def solve(cost: Sequence[Floats], nbytes: Sequence[NDArray[np.int64]], budget: int) -> list[int]:
    """The index of each layer's option, such that Σ cost is least among all choices with Σ nbytes ≤ ``budget``.

    ``cost[layer]`` and ``nbytes[layer]`` have one entry per option of the layer; costs must be finite.

    Raises:
        CalibError: no choice fits, or HiGHS does not end with an optimum.
    """
    room = budget - sum(int(sizes.min()) for sizes in nbytes)
    if room < 0:
        raise CalibError(f"no choice fits into {budget} bytes: the smallest one takes {budget - room}")
    kept = [_undominated(*pair) for pair in zip(cost, nbytes, strict=True)]
    # Relative to the layer's least cost, so that an unavoidable large cost does not hide small ones.
    value = _padded([costs[k] - costs[k].min() for costs, k in zip(cost, kept, strict=True)], np.inf)
    extra = [sizes[k] - sizes.min() for sizes, k in zip(nbytes, kept, strict=True)]
    unit = int(np.gcd.reduce(np.concatenate(extra))) or 1
    # Whole numbers below 2⁵³, which float64 adds exactly.
    size, units = _padded([sizes // unit for sizes in extra], 0.0), room // unit
    choice = value.argmin(axis=1)
    if _sum(size, choice) > units:
        price = _price(value, size, units)
        fitting = _filled(value, size, units, (value + price * size).argmin(axis=1))
        choice = _optimum(value, size, units, price, fitting)
    return [int(k[option]) for k, option in zip(kept, choice, strict=True)]


def _undominated(cost: Floats, nbytes: NDArray[np.int64]) -> NDArray[np.intp]:
    """Options that cost less than every other option of the same or a smaller size, by ascending size."""
    order = np.lexsort((cost, nbytes))
    least = np.minimum.accumulate(cost[order])
    kept: NDArray[np.intp] = order[np.append(True, least[1:] < least[:-1])]
    return kept


def _padded(rows: Sequence[NDArray[np.float64 | np.int64]], fill: float) -> Floats:
    """Stack rows as (layers, options), shorter ones padded with ``fill``."""
    table = np.full((len(rows), max(map(len, rows))), fill)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def _sum(table: Floats, choice: Choice) -> float:
    return float(np.take_along_axis(table, choice[:, None], axis=1).sum())


def _price(value: Floats, size: Floats, units: int) -> float:
    """The Lagrange multiplier of the budget: the least price per unit at which the cheapest options fit."""
    low, high = 0.0, 2 * float(value[np.isfinite(value)].max())
    while low < (middle := (low + high) / 2) < high:
        if _sum(size, (value + middle * size).argmin(axis=1)) > units:
            low = middle
        else:
            high = middle
    return high


def _filled(value: Floats, size: Floats, units: int, choice: Choice) -> Choice:
    """``choice``, which fits, improved greedily by the change that saves most per unit, until no change fits."""
    choice = choice.copy()
    while True:
        at = choice[:, None]
        saved = np.take_along_axis(value, at, axis=1) - value
        more = size - np.take_along_axis(size, at, axis=1)
        useful = (saved > 0) & (more <= units - _sum(size, choice))
        if not useful.any():
            return choice
        # An option that saves cost is larger, as dominated ones are removed.
        rate = np.where(useful, saved / np.where(useful, more, 1.0), 0.0)
        layer, option = np.unravel_index(rate.argmax(), rate.shape)
        choice[layer] = option


def _optimum(value: Floats, size: Floats, units: int, price: float, fitting: Choice) -> Choice:
    """The optimum, given a choice ``fitting`` that fits.

    Σ value = Σ reduced + price · (unused units) + a constant, without negative terms. So no option whose reduced cost
    exceeds the gap, the sum of the first two terms for ``fitting``, is in a better choice.
    """
    priced = value + price * size
    least = priced.min(axis=1)
    reduced = priced - least[:, None]
    gap = _sum(reduced, fitting) + price * (units - _sum(size, fitting))
    rounding = float(np.finfo(np.float64).eps * least.sum())
    if gap <= rounding:  # equal within the precision of the sum
        return fitting
    open_ = reduced <= gap + rounding
    layer, option = np.nonzero(open_ & (open_.sum(axis=1, keepdims=True) > 1))
    if not len(layer):
        return fitting
    scale = SCALE / gap
    costs = np.append(reduced[layer, option], price) * scale
    cheapest = reduced.argmin(axis=1)
    sizes = size[layer, option] - size[layer, cheapest[layer]]
    chosen = _highs(costs, sizes, layer, units - _sum(size, cheapest))
    choice = fitting.copy()
    choice[layer[chosen]] = option[chosen]
    left = units - _sum(size, choice)
    reached = _sum(reduced, choice) + price * left
    # HiGHS has reported infeasible or worse solutions as optimal (scipy issue 24141): check with integers.
    if left < 0 or reached > gap * (1 + 1e-6) + rounding:
        raise CalibError("HiGHS returned a choice that does not fit or is worse than a known one; try another budget")
    return choice if reached < gap else fitting


def _highs(costs: Floats, sizes: Floats, layer: NDArray[np.intp], units: float) -> NDArray[np.bool_]:
    """Choose one option per layer, with Σ costs · x least and Σ sizes · x plus the unused units equal to ``units``.

    The last entry of ``costs`` is that of an unused unit.
    """
    from scipy import sparse  # slow to import: checking a configuration would wait for it
    from scipy.optimize import Bounds, LinearConstraint, milp

    count = len(layer)
    names, line = np.unique(layer, return_inverse=True)
    one_each = sparse.csr_array((np.ones(count), (line, np.arange(count))), shape=(len(names), count + 1))
    upper = np.append(np.ones(count), np.ceil(SCALE / costs[-1]) + 1)
    with _silenced():
        result = milp(
            costs,
            integrality=np.ones(count + 1),
            bounds=Bounds(0, upper),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(np.append(sizes, 1.0)[None], units, units),
            ],
            # Presolving finds nothing more: without it the longest solves take half the time.
            options={"mip_rel_gap": 0.0, "presolve": False, "time_limit": TIME_LIMIT},
        )
    if result.status != 0:
        raise CalibError(f"HiGHS found no optimum ({result.message}); try another budget")
    chosen: NDArray[np.bool_] = result.x[:-1] > 0.5
    return chosen


@contextmanager
def _silenced() -> Iterator[None]:
    """Discard what C code prints: HiGHS 1.12 sometimes logs, whatever its options."""
    libc, stdout = ctypes.CDLL(None), 1
    libc.fflush(None)
    kept = os.dup(stdout)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stdout)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, stdout)
        os.close(kept)
