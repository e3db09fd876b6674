"""Quantizer ``rtn``: round every weight to the nearest value of its group's grid."""

from calib.base.progress import Progress
from calib.models.grids import searched
from calib.models.packed import Packed
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx


def quantize(work: QuantizerInput, search: bool = True) -> Quantized:
    """Quantize every weight by itself; activation ranges are the plan's.

    Args:
        search: shrink each group's range to where rounding errors and clipping errors add up to the least; else MLX's
            affine rounding as it is (``mx.quantize``).
    """
    layers = {}
    with Progress("rtn", len(work.layers), "layer", delay=2) as progress:
        for name, layer in work.layers.items():
            plan = work.plan[name]
            rounded = searched if search else Packed.nearest
            made = rounded(layer.weight, plan.weight_bits, plan.group_size, work.dtype)
            mx.eval(made.weight, made.scales, made.biases)  # layer by layer, as all weights may not fit into memory
            layers[name] = made
            progress.advance()
    return Quantized(layers)
