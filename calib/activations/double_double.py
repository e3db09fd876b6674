"""Double-double arithmetic: numbers as a sum of two float64, a leading part and a remainder, 106 bits together.

Sums of such numbers hardly depend on the order of addition: merged in any order they round to the same float64. The
operations are error-free transformations (Dekker 1971; Shewchuk 1997, theorems 7 and 18).
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

_SPLITTER = 2.0**27 + 1


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and its exact rounding error."""
    total = a + b
    share = total - a
    return total, (a - (total - share)) + (b - share)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a · b rounded, and its exact rounding error; for magnitudes below 2^996."""
    product = a * b
    a_high, b_high = _high(a), _high(b)
    a_low, b_low = a - a_high, b - b_high
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _high(a: Array) -> Array:
    """The leading 26 bits."""
    scaled = _SPLITTER * a
    return scaled - (scaled - a)


def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """a + b of two double-double numbers."""
    high, low = two_sum(a[0], b[0])
    lower, rest = two_sum(a[1], b[1])
    high, low = two_sum(high, low + lower)
    return two_sum(high, low + rest)


def multiply(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """a · b of two double-double numbers."""
    high, low = two_product(a[0], b[0])
    return two_sum(high, low + (a[0] * b[1] + a[1] * b[0]))


def divide(a: tuple[Array, Array], by: Array) -> tuple[Array, Array]:
    """a / by, of a double-double number and a float64."""
    quotient = a[0] / by
    high, low = two_product(quotient, by)
    rest = ((a[0] - high) - low) + a[1]
    return two_sum(quotient, rest / by)
