"""Quantizer ``fit``: search each group's range, then fit its scale and bias by weighted least squares.

Errors of a column are weighted by the mean square of its inputs, each step by how much an error of the layer's output
there reaches the picture, so that the picture is what is fitted (docs/METHODS.md). No states are replayed: the inputs'
squares come from the statistics, the steps' weights from the gradients that the plan was made by.
"""

from calib.base.errors import ConfigError
from calib.base.progress import Progress
from calib.models.grids import searched
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx
import numpy as np

#: Columns' weights are at least this share of their mean: an input that was zero may not be so elsewhere.
LEAST_WEIGHT = 1e-3


def quantize(work: QuantizerInput, rounds: int = 4) -> Quantized:
    """Quantize every layer by itself; activation ranges are the plan's.

    Args:
        rounds: alternations of integers and grid from the best range.

    Raises:
        ConfigError: ``rounds`` is negative.
    """
    if rounds < 0:
        raise ConfigError.bad_value("quantizer.rounds", rounds, "must be 0 or more")
    layers = {}
    with Progress("fit", len(work.layers), "layer", delay=2) as progress:
        for name, layer in work.layers.items():
            plan, columns = work.plan[name], column_weights(work, name)
            layers[name] = searched(layer.weight, plan.weight_bits, plan.group_size, work.dtype, columns, rounds)
            progress.advance()
    return Quantized(layers)


def column_weights(work: QuantizerInput, name: str) -> mx.array:
    """Mean square of each input channel relative to the mean of all, (columns,); 1 where there are no statistics."""
    power = work.channel_power(name)
    if power is None:
        return mx.ones(work.layers[name].weight.shape[1])
    relative = power / max(float(power.mean()), float(np.finfo(np.float32).tiny))
    return mx.array(np.maximum(relative, LEAST_WEIGHT).astype(np.float32))
