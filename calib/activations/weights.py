"""How well a layer's weights survive rounding, measured once at collection."""

import math

import mlx.core as mx
from mlx import nn

WEIGHT_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZE = 64


def weight_sqnr(layer: nn.Module) -> dict[int, float]:
    """Signal to quantization noise, dB, of MLX's affine rounding at each bit-width in groups of 64.

    Empty for layers that MLX cannot quantize so: convolutions, already quantized layers, and widths that 64 does
    not divide. SQNR = 10 log10(Σw² / Σ(w - Q(w))²), in float32.
    """
    if not isinstance(layer, nn.Linear) or layer.weight.shape[-1] % GROUP_SIZE:
        return {}
    weight = layer.weight.astype(mx.float32)
    signal = mx.sum(mx.square(weight))
    result = {}
    for bits in WEIGHT_BITS:
        packed = mx.quantize(weight, group_size=GROUP_SIZE, bits=bits)
        restored = mx.dequantize(*packed, group_size=GROUP_SIZE, bits=bits)
        noise = mx.sum(mx.square(weight - restored)).item()
        result[bits] = 10 * math.log10(signal.item() / noise) if noise and signal.item() else math.inf
    return result
