"""Grids of uniform quantization, and their arithmetic on the host and on the device.

An asymmetric grid of b bits over [low, high] has 2^b values, a step s apart; zero is one of them, so that what is
zero stays zero (padding, the many zeros after a GELU). Q(x) = s (clip(round(x / s) + z, 0, 2^b - 1) - z).
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Grid:
    """The grid of ``bits`` that covers [low, high] and zero.

    Attributes:
        step: between neighbouring values; 0 where ``low`` and ``high`` are both 0: then nothing is changed.
        zero: the place of zero among the values 0 … 2^bits - 1.
    """

    step: float
    zero: int
    bits: int

    @classmethod
    def over(cls, low: float, high: float, bits: int) -> "Grid":
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / (2**bits - 1)
        return cls(step, round(-low / step), bits) if step > 0 else cls(0.0, 0, bits)

    def apply(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Q(x), in float64."""
        if not self.step:
            return x
        places = np.clip(np.round(x / self.step) + self.zero, 0, 2**self.bits - 1)
        result: NDArray[np.float64] = (places - self.zero) * self.step
        return result

    def apply_mx(self, x: mx.array) -> mx.array:
        """Q(x) of an array of the device, computed in float32 and returned in the type of ``x``."""
        if not self.step:
            return x
        lowest, highest = -self.zero, 2**self.bits - 1 - self.zero
        places = mx.clip(mx.round(x.astype(mx.float32) * (1 / self.step)), lowest, highest)
        return (places * self.step).astype(x.dtype)
