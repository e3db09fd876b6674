"""Uniform quantization grids, on the host and on the device.

An asymmetric grid of b bits over [low, high] has 2^b values at distance s, the scale. Zero is one of them, so that
zeros are exact (padding, the many zeros after a GELU). With the zero point z,
Q(x) = s (clip(round(x / s) + z, 0, 2^b - 1) - z).
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Grid:
    """The grid of ``bits`` that covers [low, high] and zero.

    Attributes:
        scale: distance of neighbouring values; 0 where ``low`` and ``high`` are both 0: values are left unchanged.
        zero_point: the integer of zero, 0 … 2^bits - 1.
    """

    scale: float
    zero_point: int
    bits: int

    @classmethod
    def over(cls, low: float, high: float, bits: int) -> "Grid":
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / (2**bits - 1)
        return cls(step, round(-low / step), bits) if step > 0 else cls(0.0, 0, bits)

    def apply(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Q(x), in float64."""
        if not self.scale:
            return x
        integers = np.clip(np.round(x / self.scale) + self.zero_point, 0, 2**self.bits - 1)
        result: NDArray[np.float64] = (integers - self.zero_point) * self.scale
        return result

    def apply_mx(self, x: mx.array) -> mx.array:
        """Q(x) on the device, computed in float32 and returned in the type of ``x``; lazy."""
        if not self.scale:
            return x
        lowest, highest = -self.zero_point, 2**self.bits - 1 - self.zero_point
        integers = mx.clip(mx.round(x.astype(mx.float32) * (1 / self.scale)), lowest, highest)
        return (integers * self.scale).astype(x.dtype)
