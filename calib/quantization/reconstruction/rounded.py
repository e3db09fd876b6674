"""A rounded part of a transformer: packed weights and rules for inputs, run on rows of any steps, and kept on disk."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calib.analysis.ranges import StepRanges
from calib.base.errors import CalibError
from calib.models.packed import Packed
from calib.quantization import saved
from calib.quantization.model import InputRule

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

_PARTS = ("weight", "scales", "biases")


@dataclass
class Rounded:
    """Packed weights and rules of inputs by canonical layer name, and notes for people.

    Attributes:
        errors: by part, the error of what was held out before and after its training.
    """

    layers: dict[str, Packed] = field(default_factory=dict)
    inputs: dict[str, InputRule] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def joined(self, other: "Rounded") -> "Rounded":
        """This and another part."""
        layers, inputs = self.layers | other.layers, self.inputs | other.inputs
        return Rounded(layers, inputs, self.notes + other.notes, self.errors | other.errors)

    def run(self, steps: NDArray[np.intp], name: str, layer: nn.Module, x: mx.array) -> mx.array:
        """The output of a layer, in float32, for rows of these steps."""
        if name in self.inputs:
            x = applied_by_rows(self.inputs[name], x, steps)
        return linear(layer, self.layers[name].dequantize(), x) if name in self.layers else layer(x)

    def save(self, path: Path) -> None:
        """Write a file, whole or not at all."""
        rest = {
            "shapes": {name: [layer.bits, layer.group_size] for name, layer in self.layers.items()},
            "inputs": {name: asdict(rule) for name, rule in self.inputs.items()},
            "notes": self.notes,
            "errors": self.errors,
        }
        arrays = {f"{name}.{part}": getattr(layer, part) for name, layer in self.layers.items() for part in _PARTS}
        saved.save(path, arrays, rest)

    @classmethod
    def load(cls, path: Path) -> "Rounded | None":
        """Read what :meth:`save` wrote; None where it is missing or damaged."""
        with suppress(CalibError, KeyError, TypeError, ValueError, RuntimeError):
            if path.is_file():
                arrays, rest = saved.load(path)
                layers = {
                    name: Packed(
                        arrays[f"{name}.weight"], arrays[f"{name}.scales"], arrays[f"{name}.biases"], bits, size
                    )
                    for name, (bits, size) in rest["shapes"].items()
                }
                inputs = {name: _rule(**own) for name, own in rest["inputs"].items()}
                errors = {name: (start, least) for name, (start, least) in rest["errors"].items()}
                return cls(layers, inputs, rest["notes"], errors)
        return None


def _rule(
    ranges: dict[str, Any], bits: list[int], divisors: list[float], shifts: list[float], rotation: int = 0
) -> InputRule:
    own = StepRanges(**{key: tuple(values) for key, values in ranges.items()})
    return InputRule(own, tuple(bits), tuple(divisors), tuple(shifts), rotation)


def linear(layer: nn.Module, weight: mx.array, x: mx.array) -> mx.array:
    """The output of a linear layer with another ``weight``."""
    y: mx.array = x @ weight.T
    return y + layer.bias if "bias" in layer else y


def applied_by_rows(rule: InputRule, x: mx.array, steps: NDArray[np.intp]) -> mx.array:
    """:meth:`InputRule.apply` in float32 for rows of these steps; lazy."""
    grids = [rule.grid(step) for step in steps.tolist()]
    used = [grid is not None and bool(grid.scale) for grid in grids]
    scale, low, high = (
        np.array([0.0 if g is None else float(value(g)) for g in grids])
        for value in (lambda g: g.scale, lambda g: -g.zero_point, lambda g: 2**g.bits - 1 - g.zero_point)
    )
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.array(used))
    y = x / mx.array(rule.divisors) if rule.divisors else x
    shifts = mx.array(rule.shifts) if rule.shifts else mx.array(0.0)
    rounded = (
        mx.clip(mx.round((y - shifts) * by_row(x, inverse)), by_row(x, low), by_row(x, high)) * by_row(x, scale)
        + shifts
    )
    return mx.where(by_row(x, np.array(used)), rounded, y)


def by_row(x: mx.array, values: NDArray[Any]) -> mx.array:
    """A number of each row, (rows,), in a shape to be multiplied by ``x`` (rows, …); not in float64."""
    kept = values if values.dtype == bool else values.astype(np.float32)
    return mx.array(kept).reshape(-1, *[1] * (x.ndim - 1))
