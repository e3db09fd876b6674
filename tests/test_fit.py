"""Grids that are searched and fitted, and the quantizer ``fit``."""

from itertools import pairwise

from calib.models import grids
from calib.models.grids import searched
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.packed import Packed
from calib.quantization.fit import quantize
from calib.quantization.quantizer import QuantizerInput

import mlx.core as mx
import numpy as np
import pytest
from helpers import check_config_error
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from quantizing import same
from tiny_models import tiny_transformer

ROWS, COLUMNS = 6, 128


def weighted(weight: mx.array, other: mx.array, columns: mx.array, group_size: int) -> NDArray[np.float64]:
    """Σ h (w - ŵ)² of each group, in float64."""
    w, o, h = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (weight, other, columns))
    return ((w - o) ** 2 * h).reshape(-1, group_size).sum(axis=-1)


def normal(seed: int) -> mx.array:
    spread = np.exp(np.random.RandomState(seed).randn(ROWS, 1))
    return mx.array((spread * np.random.RandomState(seed + 1).randn(ROWS, COLUMNS)).astype(np.float32))


@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([mx.float16, mx.bfloat16]),
    even=st.booleans(),
    each_end=st.booleans(),
)
def test_no_group_is_worse(seed: int, bits: int, group_size: int, dtype: mx.Dtype, even: bool, each_end: bool) -> None:
    """Than rounded to nearest by MLX; and with more rounds than with fewer."""
    weight = normal(seed).astype(dtype)
    columns = mx.ones(COLUMNS) if even else mx.array(np.random.RandomState(seed).gamma(0.3, size=COLUMNS)) + 1e-3
    columns = columns.astype(mx.float32)
    packed = [searched(weight, bits, group_size, dtype, columns, rounds, each_end) for rounds in (0, 4)]
    errors = [
        weighted(weight, p.dequantize(), columns, group_size)
        for p in (Packed.nearest(weight, bits, group_size, dtype), *packed)
    ]
    for before, after in pairwise(errors):
        assert np.all(after <= before * (1 + 1e-3) + 1e-9)
    for p in packed:
        assert (p.scales.dtype, p.biases.dtype, p.bits, p.group_size) == (dtype, dtype, bits, group_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights_on_a_grid_are_kept(bits: int) -> None:
    random = np.random.RandomState(bits)
    q = random.randint(0, 2**bits, (ROWS, COLUMNS))
    q[:, ::32], q[:, 1::32] = 0, 2**bits - 1
    weight = mx.array((q * 0.125 - 3.0).astype(np.float32))
    packed = searched(weight, bits, 32, mx.float16, rounds=1)
    assert mx.array_equal(packed.dequantize(), weight)


@pytest.mark.parametrize("whole_rows", [False, True])
def test_a_layer_in_parts(whole_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comes out as in one piece, whatever rows are left for the last."""
    weight = mx.random.normal((11, 96), key=mx.random.key(0))
    found = []
    for rows in (11, 4, 1):
        monkeypatch.setattr(grids, "PART_CPU", rows * 96)
        monkeypatch.setattr(grids, "PART", rows * 96)
        found.append(searched(weight, 5, 32, mx.bfloat16, rounds=2, whole_rows=whole_rows))
    assert all(same(part, found[0]) for part in found[1:])


@pytest.mark.parametrize("value", [0.0, 1.5, -60000.0])
def test_weights_that_are_all_one(value: float) -> None:
    packed = searched(mx.full((ROWS, COLUMNS), value), 3, 64, mx.float16, rounds=4)
    assert mx.allclose(packed.dequantize(), mx.array(value), rtol=1e-3)


def test_columns_that_weigh_more_lose_less() -> None:
    weight, columns = normal(3), mx.where(mx.arange(COLUMNS) % 4 == 0, 100.0, 0.01)
    errors = [
        np.array((weight - searched(weight, 3, 64, mx.float16, h, 4).dequantize()) ** 2)[:, ::4].mean()
        for h in (columns, mx.ones(COLUMNS))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_negative_rounds() -> None:
    empty = QuantizerInput.without_layers(MMDiTArchitecture(tiny_transformer("sd3")), mx.float16)
    check_config_error(lambda: quantize(empty, rounds=-1), ["quantizer.rounds=-1", "0 or more"])
