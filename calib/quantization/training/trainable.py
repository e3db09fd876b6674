"""What is trained of a packed layer: its integers, and the scale and bias of each group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from calib.models.packed import Packed

import mlx.core as mx

#: Trained arrays of a layer by name; all change by about the same amount a step.
Parameters: TypeAlias = dict[str, mx.array]

#: Share of a scale, share of a scale's width for a bias, and integers, that a change by one stands for.
SCALE, BIAS, INTEGER = 0.1, 1.0, 3.0
#: How far from the middle of an integer a training begins, of the distance of the weight itself.
SPREAD = 0.6


@dataclass(frozen=True)
class Trainable:
    """A packed layer whose integers are rounded from numbers u, and whose grids can move.

    ŵ = s · clip(round(u), 0, 2^bits - 1) + b, where s and b are rounded to 16 bits; the gradient passes through both
    roundings as if they were not there (AutoRound's, Cheng et al. 2023, arXiv 2309.05516).

    Attributes:
        packed: where it starts.
        integers: its integers, (rows, groups, size).
        rounding: whether the integers are trained.
    """

    packed: Packed
    integers: mx.array
    rounding: bool

    @classmethod
    def of(cls, packed: Packed, rounding: bool) -> "Trainable":
        """Of a layer, as it is."""
        ones, zeros = mx.ones(packed.scales.shape), mx.zeros(packed.scales.shape)
        integers = mx.dequantize(packed.weight, ones, zeros, group_size=packed.group_size, bits=packed.bits)
        return cls(packed, integers.reshape(*packed.scales.shape, packed.group_size), rounding)

    def start(self, weight: mx.array) -> Parameters:
        """Parameters that give the layer as it is; ``weight`` (rows, columns) is at full precision."""
        found = {"scale": mx.zeros(self.packed.scales.shape), "bias": mx.zeros(self.packed.scales.shape)}
        if self.rounding:
            scales, biases = self._stored(found)
            real = (weight.astype(mx.float32).reshape(self.integers.shape) - biases[..., None]) / _divisor(scales)
            # No weight begins at the very edge, where GPTQ leaves those that make up for others.
            found["integer"] = (self.integers + SPREAD * mx.clip(real - self.integers, -0.5, 0.5)) / INTEGER
        return found

    def weight(self, parameters: Mapping[str, mx.array]) -> mx.array:
        """The dequantized weight, (rows, columns) float32."""
        scales, biases = self._stored(parameters)
        weight = scales[..., None] * self._rounded(parameters) + biases[..., None]
        return weight.reshape(len(weight), -1)

    def gradients(self, parameters: Mapping[str, mx.array], gradient: mx.array) -> Parameters:
        """Gradients by the parameters, of the gradient by the weight, (rows, columns)."""
        by_group, width = gradient.reshape(self.integers.shape), self._width()
        found = {
            "scale": (by_group * self._rounded(parameters)).sum(axis=-1) * (SCALE * width),
            "bias": by_group.sum(axis=-1) * (BIAS * width),
        }
        if self.rounding:
            found["integer"] = by_group * (INTEGER * self._stored(parameters)[0][..., None])
        return found

    def finished(self, parameters: Mapping[str, mx.array]) -> Packed:
        """The layer of ``parameters``, evaluated."""
        own = self.packed
        scales, biases = (array.astype(own.scales.dtype) for array in self._stored(parameters))
        integers = self._rounded(parameters).astype(mx.uint32).reshape(len(self.integers), -1)
        made = Packed.of_integers(integers, scales, biases, own.bits, own.group_size)
        mx.eval(made.weight, made.scales, made.biases)
        return made

    def _width(self) -> mx.array:
        return mx.abs(self.packed.scales.astype(mx.float32))

    def _stored(self, parameters: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        """Scales and biases as they are stored, in float32."""
        own, width = self.packed, self._width()
        scales = own.scales.astype(mx.float32) + SCALE * width * parameters["scale"]
        biases = own.biases.astype(mx.float32) + BIAS * width * parameters["bias"]
        dtype = own.scales.dtype
        return scales.astype(dtype).astype(mx.float32), biases.astype(dtype).astype(mx.float32)

    def _rounded(self, parameters: Mapping[str, mx.array]) -> mx.array:
        if not self.rounding:
            return self.integers
        return mx.clip(mx.round(INTEGER * parameters["integer"]), 0, 2**self.packed.bits - 1)


def _divisor(scales: mx.array) -> mx.array:
    return mx.where(scales == 0, 1.0, scales)[..., None]
