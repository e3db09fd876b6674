"""One check of the self-test: its result, and measures of error."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Check:
    """One result: ``error`` must not exceed ``bound``; ``note`` describes a failure that has no number."""

    name: str
    error: float
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # false for NaN


def relative(measured: Any, expected: Any) -> float:
    """Largest absolute difference, relative to the rms of ``expected``."""
    a, b = np.asarray(measured, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(a - b)) / np.sqrt(np.mean(b**2)))


def differing(measured: Any, expected: Any) -> float:
    """Number of elements that differ; NaNs at the same position are equal."""
    return float(np.sum(~np.isclose(measured, expected, rtol=0, atol=0, equal_nan=True)))


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Standard normal values of the given shape."""
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)
