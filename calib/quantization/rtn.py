"""Quantizer ``rtn``: every weight rounded to the nearest value of its group's grid."""

from calib.quantization.packed import Packed
from calib.quantization.quantizer import Quantized, QuantizerInput


def quantize(work: QuantizerInput) -> Quantized:
    """MLX's affine rounding (``mx.quantize``); activation ranges as the plan has them."""
    layers = {
        name: Packed.nearest(layer.weight, work.plan[name].weight_bits, work.plan[name].group_size, work.dtype)
        for name, layer in work.layers.items()
    }
    return Quantized(layers)
