"""Quantizer ``rtn``: round every weight to the nearest value of its group's grid."""

from calib.models.packed import Packed
from calib.quantization.quantizer import Quantized, QuantizerInput


def quantize(work: QuantizerInput) -> Quantized:
    """Quantize weights by MLX's affine rounding (``mx.quantize``); activation ranges are the plan's."""
    layers = {
        name: Packed.nearest(layer.weight, work.plan[name].weight_bits, work.plan[name].group_size, work.dtype)
        for name, layer in work.layers.items()
    }
    return Quantized(layers)
