"""EfficientNet-Lite0 (arXiv 1905.11946; without squeeze-and-excitation, ReLU6 for swish) in MLX, up to its features.

Arrays are (channels, pictures, height, width): products with 1×1 kernels are then one matrix product, and depthwise
convolutions are as :mod:`.depthwise` has them. Batch normalisation is folded into the kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from calib.evaluation.features.depthwise import Depthwise

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Side of the pictures, length of the features.
SIZE, FEATURES = 224, 1280
EPSILON = 1e-3
#: Blocks in a row, and the stride of the first of them.
BLOCKS = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))
#: The last block at each resolution: of 112, 56, 28, 14 and 7 pixels, with 16, 24, 40, 112 and 320 channels.
STAGES = (0, 2, 4, 10, 15)

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Pointwise:
    """A 1×1 convolution with bias, over (channels, …)."""

    weight: mx.array
    bias: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(x.shape[0], -1)
        return mx.addmm(self.bias[:, None], self.weight, rows).reshape(-1, *x.shape[1:])


@dataclass(frozen=True)
class Block:
    """Expansion, depthwise convolution, projection; ``adds``: its input is added to what comes out."""

    expand: Pointwise | None
    depthwise: Depthwise
    project: Pointwise
    adds: bool

    def __call__(self, x: mx.array) -> mx.array:
        wide = x if self.expand is None else _relu6(self.expand(x))
        found = self.project(_relu6(self.depthwise(wide)))
        return found + x if self.adds else found


class EfficientNetLite0:
    """The network with weights as PyTorch's port of it names them."""

    def __init__(self, weights: Weights):
        kernel, bias = _folded(weights, "_conv_stem", "_bn0")
        self._stem = mx.array(kernel.transpose(0, 2, 3, 1)), mx.array(bias)
        self._blocks = _blocks(weights)
        self._head = _pointwise(weights, "_conv_head", "_bn1")

    def __call__(self, x: mx.array) -> tuple[mx.array, list[mx.array]]:
        """Pooled features, (pictures, 1280), and maps at the :data:`STAGES`, (channels, pictures, height, width).

        ``x`` is (pictures, 224, 224, 3), pixels less 127 over 128.
        """
        kernel, bias = self._stem
        x = mx.conv2d(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]), kernel, stride=2) + bias
        x, maps = _relu6(x).transpose(3, 0, 1, 2), []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in STAGES:
                maps.append(x)
        return mx.mean(_relu6(self._head(x)), axis=(2, 3)).T, maps


def _relu6(x: mx.array) -> mx.array:
    return mx.clip(x, 0, 6)


def _blocks(weights: Weights) -> list[Block]:
    found: list[Block] = []
    size = SIZE // 2
    for count, first in BLOCKS:
        for stride in (first, *[1] * (count - 1)):
            name = f"_blocks.{len(found)}"
            expands = f"{name}._expand_conv.weight" in weights
            expand = _pointwise(weights, f"{name}._expand_conv", f"{name}._bn0") if expands else None
            kernels, bias = _folded(weights, f"{name}._depthwise_conv", f"{name}._bn1")
            project = _pointwise(weights, f"{name}._project_conv", f"{name}._bn2")
            taken = len(kernels) if expand is None else expand.weight.shape[1]
            adds = stride == 1 and taken == project.weight.shape[0]
            found.append(Block(expand, Depthwise(kernels[:, 0], bias, size, stride), project, adds))
            size //= stride
    return found


def _pointwise(weights: Weights, convolution: str, norm: str) -> Pointwise:
    kernel, bias = _folded(weights, convolution, norm)
    return Pointwise(mx.array(kernel[:, :, 0, 0]), mx.array(bias))


def _folded(weights: Weights, convolution: str, norm: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Kernel, (out, in, k, k), and bias of a convolution with the batch normalisation after it."""
    gamma, beta, mean, variance = (
        weights[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    factor = gamma / np.sqrt(variance + EPSILON)
    kernel = weights[f"{convolution}.weight"].astype(np.float64) * factor[:, None, None, None]
    return kernel.astype(np.float32), (beta - mean * factor).astype(np.float32)
