"""How well a layer's weights survive rounding, measured once at collection."""

import math
from typing import cast

import mlx.core as mx
from mlx import nn

WEIGHT_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZE = 64


def energy(x: mx.array) -> float:
    """Σx², summed in the type of ``x``."""
    return cast(float, mx.sum(mx.square(x)).item())


def weight_sqnr(layer: nn.Module) -> dict[int, float]:
    """Signal to quantization noise, dB, of MLX's affine rounding at each bit-width in groups of 64.

    Empty for layers that MLX cannot quantize so: convolutions, already quantized layers, and widths that 64 does
    not divide. SQNR = 10 log10(Σw² / Σ(w - Q(w))²), in float32.
    """
    if not isinstance(layer, nn.Linear) or layer.weight.shape[-1] % GROUP_SIZE:
        return {}
    weight = layer.weight.astype(mx.float32)
    signal = energy(weight)
    result = {}
    for bits in WEIGHT_BITS:
        packed = mx.quantize(weight, group_size=GROUP_SIZE, bits=bits)
        restored = mx.dequantize(*packed, group_size=GROUP_SIZE, bits=bits)
        noise = energy(weight - restored)
        result[bits] = 10 * math.log10(signal / noise) if noise and signal else math.inf
    return result
