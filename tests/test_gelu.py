"""GELU from sums and products: as exact as float32 allows, and in the transformers' place of MLX's own."""

from calib.models import gelu
from calib.models.gelu import Gelu
from calib.models.mmdit.architecture import MMDiTArchitecture

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from numpy.typing import NDArray
from scipy.special import ndtr
from tiny_models import STRUCTURES, tiny_transformer

#: All magnitudes, and densely where the function bends.
INPUTS = np.concatenate(
    [np.linspace(-9, 9, 200_001), *([s * 10.0**e for e in range(-40, 39)] for s in (-1, 1)), [0.0, -0.0]]
).astype(np.float32)


def errors(found: mx.array, true: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.abs(np.array(found).astype(np.float64) - true)


def test_values() -> None:
    """Within two units in the last place of the input, and of MLX's own exactness; MLX's is within one."""
    x = INPUTS.astype(np.float64)
    true = x * ndtr(x)
    found = errors(Gelu()(mx.array(INPUTS)), true)
    assert np.all(found <= 2.5e-7 * np.abs(x) + 1e-38)
    assert found.max() < 5 * errors(nn.gelu(mx.array(INPUTS)), true).max()
    tails = np.abs(INPUTS) > gelu.LIMIT
    assert np.array_equal(np.array(Gelu()(mx.array(INPUTS[tails]))), np.maximum(INPUTS[tails], 0)), "exact beyond"
    assert mx.isnan(Gelu()(mx.array(float("nan")))).item()


def test_gradients() -> None:
    x = INPUTS[np.abs(INPUTS) < 1e18].astype(np.float64)
    true = ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    cotangent = mx.array(np.float32(3.0))
    _, (found,) = mx.vjp(Gelu(), [mx.array(x.astype(np.float32))], [mx.broadcast_to(cotangent, x.shape)])
    assert errors(found, 3 * true).max() < 1.5e-6


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_other_types_take_mlx_own(dtype: mx.Dtype) -> None:
    x = mx.array(INPUTS).astype(dtype)
    assert mx.array_equal(Gelu()(x), nn.gelu(x), equal_nan=True)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_transformers_have_it(structure: str) -> None:
    transformer = tiny_transformer(structure)
    count = sum(isinstance(module, nn.GELU) for module in transformer.modules())
    MMDiTArchitecture(transformer)
    kinds = [type(module) for module in transformer.modules()]
    assert count == kinds.count(Gelu) > 0 and nn.GELU not in kinds
    fast = nn.GELU(approx="fast")
    assert gelu.with_fast_gelu(nn.Sequential(fast)) is None and isinstance(fast, nn.GELU)
