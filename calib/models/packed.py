"""Packed weights of MLX's affine quantization: w = scale · q + bias, in groups along a row."""

from dataclasses import dataclass
from typing import Self

from calib.models.rotation import rotated

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


def half_of(dtype: mx.Dtype) -> mx.Dtype:
    """The 16-bit type of scales and biases for weights of ``dtype``."""
    return dtype if dtype != mx.float32 else mx.float16


@dataclass(frozen=True)
class Packed:
    """A quantized weight of shape (rows, columns).

    Attributes:
        weight: (rows, columns · bits / 32) uint32, the integers q as one little-endian bit stream per row.
        scales, biases: (rows, columns / group_size), in a 16-bit type.
        rotation: the columns are those of W H in blocks of this size (:mod:`calib.models.rotation`); 0: of W.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int
    rotation: int = 0

    @classmethod
    def nearest(cls, weight: mx.array, bits: int, group_size: int, dtype: mx.Dtype) -> Self:
        """Quantize ``weight`` (rows, columns) by MLX's rounding to nearest, in ``dtype``; lazy."""
        packed, scales, biases = mx.quantize(weight.astype(dtype), group_size=group_size, bits=bits)
        return cls(packed, scales, biases, bits, group_size)

    @classmethod
    def of_integers(
        cls, integers: NDArray[np.uint8] | mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
    ) -> Self:
        """Pack the integers q (rows, columns), 0 … 2^bits - 1; lazy."""
        rows, columns = integers.shape
        # 32 integers fill ``bits`` words; integer j begins at bit j · bits of these.
        q = mx.array(integers).astype(mx.uint32).reshape(rows, columns // 32, 32)
        words = [mx.zeros((rows, columns // 32), mx.uint32) for _ in range(bits)]
        for j in range(32):
            word, place = divmod(j * bits, 32)
            words[word] |= q[..., j] << place
            if place + bits > 32:  # the rest of it
                words[word + 1] |= q[..., j] >> (32 - place)
        return cls(mx.stack(words, axis=-1).reshape(rows, -1), scales, biases, bits, group_size)

    def dequantize(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The weight that inputs are multiplied by, (rows, columns), rotated back; computed in ``dtype``."""
        scales, biases = self.scales.astype(dtype), self.biases.astype(dtype)
        weight: mx.array = mx.dequantize(self.weight, scales, biases, group_size=self.group_size, bits=self.bits)
        return rotated(weight, self.rotation) if self.rotation else weight

    @property
    def nbytes(self) -> int:
        return int(self.weight.nbytes + self.scales.nbytes + self.biases.nbytes)
