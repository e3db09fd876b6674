"""Bit patterns of activations on the device, and their counts, for :mod:`calib.activations.histogram`."""

from calib.activations.histogram import BINS

import mlx.core as mx

DTYPES = {mx.float16: "float16", mx.bfloat16: "bfloat16", mx.float32: "float32"}


def top_bits(x: mx.array) -> mx.array:
    """Bit patterns of ``x`` as uint16, of its shape: for float32 the upper 16 bits."""
    return x.view(mx.uint16)[..., 1::2] if x.dtype == mx.float32 else x.view(mx.uint16)


def count_bits(bits: mx.array) -> mx.array:
    """Counts of each pattern, (65536,) uint32; lazy. Metal has no 64-bit scatter: widen on the host."""
    indices = bits.reshape(-1).astype(mx.uint32)
    return mx.zeros((BINS,), dtype=mx.uint32).at[indices].add(mx.array(1, dtype=mx.uint32))
