"""A quantized transformer as data: packed weights, other parameters at 16 bits, and rules for activations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from calib.analysis.grid import Grid
from calib.analysis.plan import UNQUANTIZED
from calib.analysis.ranges import StepRanges
from calib.models.packed import Packed
from calib.models.rotation import rotated

import mlx.core as mx


@dataclass(frozen=True)
class InputRule:
    """Quantization of a layer's input, with a range and bits that may vary with the denoising step.

    The layer reads Q(x / m - z) + z, with a divisor m and a shift z of each channel: its weights were multiplied by m;
    or Q(x H) H, rotated in blocks.

    Attributes:
        ranges: of x / m - z, or of x H.
        bits: bit-width at each step, (num_steps,); 16: not quantized.
        divisors: m, (channels,); empty: 1.
        shifts: z, (channels,); empty: 0.
        rotation: size of the blocks of H (:mod:`calib.models.rotation`), with neither divisors nor shifts; 0: none.
    """

    ranges: StepRanges
    bits: tuple[int, ...]
    divisors: tuple[float, ...] = ()
    shifts: tuple[float, ...] = ()
    rotation: int = 0

    def grid(self, step: int) -> Grid | None:
        """The grid at a step; None where the input is not quantized."""
        bits = self.bits[min(step, len(self.bits) - 1)]
        return None if bits >= UNQUANTIZED else Grid.over(*self.ranges.at(step), bits)

    def apply(self, x: mx.array, step: int) -> mx.array:
        """What the layer reads in place of ``x`` (…, channels) at a step, in the type of ``x``; lazy."""
        grid, y = self.grid(step), x
        if self.divisors:
            y = y.astype(mx.float32) / mx.array(self.divisors)
        if grid is not None and self.shifts:
            shifts = mx.array(self.shifts)
            y = grid.apply_mx(y.astype(mx.float32) - shifts) + shifts
        elif grid is not None and self.rotation:
            y = rotated(grid.apply_mx(rotated(y.astype(mx.float32), self.rotation)), self.rotation)
        elif grid is not None:
            y = grid.apply_mx(y)
        return y.astype(x.dtype)


@dataclass
class QuantizedModel:
    """All of a transformer's weights, and the rules for its activations.

    Attributes:
        layers: packed weights by canonical layer name.
        weights: every other parameter by path, in the 16-bit type.
        inputs: rules by layer name.
        timesteps: timesteps of steps 0 … n - 1 of the trajectories that the rules were made from.
        copies: separate weights by phase and layer, for the phase's steps; other steps use ``layers``.
        phases: first and last step of each phase.
        about: origin of the model, JSON-able: model, fingerprint, quantizer …
        paths: path of the module of each of ``layers``.
    """

    layers: dict[str, Packed]
    weights: dict[str, mx.array]
    inputs: dict[str, InputRule]
    timesteps: tuple[float, ...]
    paths: dict[str, str]
    copies: dict[str, dict[str, Packed]] = field(default_factory=dict)
    phases: dict[str, tuple[int, int]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def size(self) -> "Size":
        """Bytes and bits, computed from the arrays."""
        packed = [*self.layers.values(), *(p for copies in self.copies.values() for p in copies.values())]
        values = sum(layer.weight.size * 32 // layer.bits for layer in self.layers.values())
        dense = sum(array.nbytes for array in self.weights.values())
        return Size(
            quantized_values=values,
            other_values=sum(array.size for array in self.weights.values()),
            quantized_bytes=sum(layer.nbytes for layer in packed),
            other_bytes=dense,
        )

    def metrics(self) -> dict[str, float]:
        """Flat numbers for ``metrics.json``."""
        average = self.about.get("average_activation_bits")
        return {**self.size().metrics(), **({} if average is None else {"average_activation_bits": float(average)})}

    def parameters(self) -> dict[str, mx.array]:
        """Arrays by the paths that they have after ``nn.quantize``; without the copies of phases."""
        found = dict(self.weights)
        for name, layer in self.layers.items():
            path = self.paths[name]
            found |= {f"{path}.weight": layer.weight, f"{path}.scales": layer.scales, f"{path}.biases": layer.biases}
        return found


@dataclass(frozen=True)
class Size:
    """Size of a quantized transformer; values are counted before packing."""

    quantized_values: int
    other_values: int
    quantized_bytes: int
    other_bytes: int

    @property
    def average_bits(self) -> float:
        """Bits per quantized weight, scales, biases and all copies included."""
        return 8 * self.quantized_bytes / self.quantized_values if self.quantized_values else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter of the whole transformer, unquantized ones included."""
        return 8 * self.nbytes / (self.quantized_values + self.other_values)

    @property
    def nbytes(self) -> int:
        return self.quantized_bytes + self.other_bytes

    @property
    def nbytes_before(self) -> int:
        """Bytes with 16 bits per parameter."""
        return 2 * (self.quantized_values + self.other_values)

    def metrics(self) -> Mapping[str, float]:
        """Flat numbers for ``metrics.json``."""
        return {
            "quantized_bytes": self.nbytes,
            "unquantized_bytes": self.nbytes_before,
            "average_weight_bits": self.average_bits,
            "bits_per_weight": self.bits_per_weight,
        }
