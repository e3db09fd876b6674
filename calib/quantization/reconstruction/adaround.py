"""Roundings that are learned: AdaRound, Nagel et al. 2020 (arXiv 2004.10568), section 3.3."""

from dataclasses import dataclass

from calib.models.packed import Packed

import mlx.core as mx

#: The ends of the stretched sigmoid, γ and ζ.
LOW, HIGH = -0.1, 1.1
#: The regulariser's exponent, first and last. The paper begins with 20, for a hundred times the iterations.
FIRST_BETA, LAST_BETA = 8.0, 2.0


@dataclass(frozen=True)
class Roundings:
    """The roundings of a layer on a grid: ŵ = base + scale · h with 0 ≤ h ≤ 1, (rows, groups, size) in float32.

    Attributes:
        start: the grid, with some integers.
        floor: the integer where h is 0.
        scale: (rows, groups, 1).
    """

    start: Packed
    floor: mx.array
    base: mx.array
    scale: mx.array

    @classmethod
    def of(cls, weight: mx.array, start: Packed) -> tuple["Roundings", mx.array]:
        """Roundings of ``weight`` (rows, columns), and V with h(V) where it lies between two integers of its grid."""
        scale, bias = (array.astype(mx.float32)[..., None] for array in (start.scales, start.biases))
        # A scale underflows to zero in 16 bits where a group's weights are next to nothing.
        place = (weight.reshape(*start.scales.shape, start.group_size) - bias) / mx.where(scale == 0, 1.0, scale)
        floor = mx.clip(mx.floor(place), 0, 2**start.bits - 2)
        sigmoid = (mx.clip(place - floor, 0, 1) - LOW) / (HIGH - LOW)
        v = mx.log(sigmoid / (1 - sigmoid))
        found = cls(start, floor, bias + scale * floor, scale)
        mx.eval(found.floor, found.base, found.scale, v)
        return found, v

    def weight(self, h: mx.array) -> mx.array:
        """ŵ, (rows, columns); lazy."""
        return (self.base + self.scale * h).reshape(len(h), -1)

    def packed(self, v: mx.array) -> Packed:
        """The layer with each weight at the nearer of its two integers; lazy."""
        integers = (self.floor + decided(v)).astype(mx.uint32).reshape(len(v), -1)
        return Packed.of_integers(
            integers, self.start.scales, self.start.biases, self.start.bits, self.start.group_size
        )


def rounding(v: mx.array) -> mx.array:
    """h(V) = clip(σ(V) (ζ - γ) + γ, 0, 1), equation 23."""
    return mx.clip(mx.sigmoid(v) * (HIGH - LOW) + LOW, 0, 1)


def decided(v: mx.array) -> mx.array:
    """h at the nearer of 0 and 1, in float32."""
    return (v >= 0).astype(mx.float32)


def undecided(h: mx.array, progress: float) -> mx.array:
    """1 - |2 h - 1|^β, equation 24, at a point of the training, 0 … 1, in which β falls."""
    beta = LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 - progress)
    return 1 - mx.abs(2 * h - 1) ** beta
