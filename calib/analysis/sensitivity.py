"""Measured sensitivities: what quantizing one layer alone does to the model's output."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sensitivities:
    """S = ‖v - v_q‖² / ‖v‖² of the model's output v, one layer quantized at a time, on stored states.

    Attributes:
        steps: the step indices at which it was measured, ascending; (steps,) below runs along them.
        num_steps: of the trajectory.
        weights: by layer, by (bits, group size): S at each step, (steps,) float64.
        activations: by layer, by bits: S at each step with that layer's input quantized over its full range.
        shapes: (rows, columns) of each layer's weight; layers that MLX cannot quantize are not in here.
    """

    steps: tuple[int, ...]
    num_steps: int
    weights: dict[str, dict[tuple[int, int], NDArray[np.float64]]]
    activations: dict[str, dict[int, NDArray[np.float64]]]
    shapes: dict[str, tuple[int, int]]
