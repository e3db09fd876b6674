"""Packed weights of MLX's affine quantization: w = scale · q + bias, in groups along a row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from calib.base.device import on_gpu
from calib.models.rotation import rotated

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


def half_of(dtype: mx.Dtype) -> mx.Dtype:
    """The 16-bit type of scales and biases for weights of ``dtype``."""
    return dtype if dtype != mx.float32 else mx.float16


def _in_whole_bytes(bits: int) -> int:
    """How many integers of so many bits fill whole bytes, of which each lies in two at most."""
    return 8 // math.gcd(bits, 8)


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
        count = _in_whole_bytes(bits)
        q = mx.array(integers).astype(mx.uint8).reshape(rows, columns // count, count)
        found = [mx.zeros(q.shape[:2], mx.uint8) for _ in range(count * bits // 8)]
        for j in range(count):
            byte, place = divmod(j * bits, 8)
            found[byte] |= q[..., j] << place
            if place + bits > 8:  # the rest of it
                found[byte + 1] |= q[..., j] >> (8 - place)
        return cls(mx.stack(found, axis=-1).reshape(rows, -1).view(mx.uint32), scales, biases, bits, group_size)

    @classmethod
    def of_rows(cls, parts: Sequence[Self]) -> Self:
        """The weight with the rows of all ``parts`` in turn; evaluated."""
        arrays = [mx.concatenate([getattr(part, name) for part in parts]) for name in ("weight", "scales", "biases")]
        mx.eval(arrays)
        return replace(parts[0], weight=arrays[0], scales=arrays[1], biases=arrays[2])

    def rows(self, first: int, last: int) -> Self:
        """Some rows of the weight; lazy."""
        return replace(
            self,
            weight=self.weight[first:last],
            scales=self.scales[first:last],
            biases=self.biases[first:last],
        )

    def dequantize(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The weight that inputs are multiplied by, (rows, columns), rotated back; computed in ``dtype``."""
        scales, biases = self.scales.astype(dtype), self.biases.astype(dtype)
        if on_gpu():
            weight = mx.dequantize(self.weight, scales, biases, group_size=self.group_size, bits=self.bits)
        else:
            # The same to the bit. MLX widens integers to 32 bits there, of 3, 5 and 6 bits each bit by itself.
            q = self._integers()
            groups = q.reshape(*scales.shape, self.group_size).astype(dtype)
            weight = (groups * scales[..., None] + biases[..., None]).reshape(q.shape)
        return rotated(weight, self.rotation) if self.rotation else weight

    def _integers(self) -> mx.array:
        """The integers q, (rows, columns) uint8."""
        rows, count = len(self.weight), _in_whole_bytes(self.bits)
        bytes_ = self.weight.view(mx.uint8).reshape(rows, -1, count * self.bits // 8)
        found = []
        for j in range(count):
            byte, place = divmod(j * self.bits, 8)
            q = bytes_[..., byte] >> place
            if place + self.bits > 8:
                q |= bytes_[..., byte + 1] << (8 - place)
            found.append(q & (2**self.bits - 1))
        return mx.stack(found, axis=-1).reshape(rows, -1)

    @property
    def nbytes(self) -> int:
        return int(self.weight.nbytes + self.scales.nbytes + self.biases.nbytes)
