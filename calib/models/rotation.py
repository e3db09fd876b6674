"""Rotation of a layer's input channels by a regular Hadamard matrix in blocks, which spreads outliers evenly.

X W ᵀ = (X H)(W H)ᵀ for an orthogonal H (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; ConvRot, arXiv 2512.03673, has
regular matrices, whose rows sum alike, for diffusion transformers). H = H₄ ⊗ H₄ ⊗ … with H₄ = ±½, symmetric.
"""

from functools import cache

import mlx.core as mx
import numpy as np

#: Sizes of blocks: powers of four.
BLOCKS = (16, 64, 256)


def block_of(columns: int, largest: int) -> int:
    """The largest block of at most ``largest`` that divides ``columns``; 0 where there is none."""
    return max((block for block in BLOCKS if block <= largest and columns % block == 0), default=0)


@cache
def hadamard(block: int) -> mx.array:
    """H (block, block), symmetric and orthogonal; ``block`` is a power of four."""
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    found = four
    while len(found) < block:
        found = np.asarray(np.kron(found, four))
    return mx.array(found.astype(np.float32))


def rotated(x: mx.array, block: int) -> mx.array:
    """``x`` (…, columns) with every block of columns multiplied by H, in the type of ``x``; twice gives it back."""
    # By the block and not by mx.hadamard_transform, which is wrong on a CPU at some widths.
    return (x.reshape(-1, block) @ hadamard(block).astype(x.dtype)).reshape(x.shape)
