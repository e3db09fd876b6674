"""Quantizers: each against a slow oracle in float64 NumPy, on every grid; what they ask for and refuse."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import StepRanges
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.base.errors import CalibError
from calib.base.targets import bind_target
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.packed import Packed
from calib.quantization import gptq, percentile, rtn, smooth
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx
import numpy as np
import pytest
from helpers import CHECKOUT, check_config_error, float64
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from quantizing import DTYPES, Array, Asked, Case, States, integers_of, same, tiny_states, values_of, work_on
from tiny_models import tiny_transformer

#: What oracle and quantizer may differ by, in parts of the largest weight of a group: two units of the last of the 16
#: bits in which scales and biases are kept. Where float32 sees a tie the next place, or scale, is as good: in so few.
ROUNDING = {mx.float16: 2**-10, mx.bfloat16: 2**-7}
TIES = 0.04


# Oracles


def rounded_to(dtype: mx.Dtype, x: Array) -> Array:
    return float64(mx.array(x.astype(np.float32)).astype(dtype))


def affine_grid(weight: Array, bits: int, group_size: int, dtype: mx.Dtype) -> tuple[Array, Array]:
    """MLX's rule, (rows, groups), before rounding to 16 bits: zero and the end farther from it are points of a grid."""
    w, most = rounded_to(dtype, weight).reshape(len(weight), -1, group_size), 2**bits - 1
    low, high = w.min(axis=2), w.max(axis=2)
    below = np.abs(low) > np.abs(high)
    step, edge = np.maximum((high - low) / most, 1e-7) * np.where(below, 1, -1), np.where(below, low, high)
    place = np.round(edge / step)
    return np.where(place != 0, edge / np.where(place != 0, place, 1), step), np.where(place != 0, edge, 0)


def places(weight: Array, scale: Array, bias: Array, bits: int) -> Array:
    """The nearest points of a grid; the first where 16 bits hold nothing so small as its scale."""
    usable = np.where(scale != 0, scale, 1)
    return np.clip(np.round(np.where(scale != 0, (weight - bias) / usable, 0)), 0, 2**bits - 1)


def nearest(weight: Array, bits: int, group_size: int, dtype: mx.Dtype) -> Array:
    """MLX's rounding to nearest, scale and bias rounded to 16 bits afterwards."""
    scale, bias = (np.repeat(x, group_size, axis=1) for x in affine_grid(weight, bits, group_size, dtype))
    found = places(rounded_to(dtype, weight), scale, bias, bits)
    return rounded_to(dtype, scale) * found + rounded_to(dtype, bias)


def by_the_paper(
    weight: Array,
    hessian: Array,
    bits: int,
    group_size: int,
    grid: tuple[Array, Array],
    damping: float,
    act_order: bool,
) -> Array:
    """GPTQ before its last two steps: equations 2 and 3, H⁻¹ itself, of the columns that are left, column by column."""
    left, values = weight.copy(), np.zeros(weight.shape)
    inverse = np.linalg.inv(hessian + damping * hessian.diagonal().mean() * np.eye(len(hessian)))
    order = np.argsort(-hessian.diagonal(), kind="stable") if act_order else np.arange(len(hessian))
    scale, bias = grid
    for q in order:
        group = q // group_size
        values[:, q] = scale[:, group] * places(left[:, q], scale[:, group], bias[:, group], bits) + bias[:, group]
        left = left - np.outer((left[:, q] - values[:, q]) / inverse[q, q], inverse[q])
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return values


def rounded(case: Case) -> Array:
    """The layer rounded to nearest as MLX does."""
    return nearest(case.weight, case.bits, case.group_size, case.dtype)


def on_its_grid(case: Case, made: Quantized, weight: Array | None = None) -> Array:
    """The layer, or another ``weight``, rounded to nearest on the grid that was made."""
    (packed,) = made.layers.values()
    scale, bias = (np.repeat(float64(x), case.group_size, axis=1) for x in (packed.scales, packed.biases))
    return scale * places(case.weight if weight is None else weight, scale, bias, case.bits) + bias


def check(case: Case, made: Quantized, expected: Array) -> None:
    """``made`` has the ``expected`` weights, but for a few that lie some places apart."""
    (packed,) = made.layers.values()
    assert (packed.bits, packed.group_size) == (case.bits, case.group_size)
    assert packed.scales.dtype == packed.biases.dtype == case.dtype
    scale = np.repeat(np.abs(float64(packed.scales)), case.group_size, axis=1)
    largest = np.abs(expected).reshape(len(expected), -1, case.group_size).max(axis=2)
    rounding = ROUNDING[case.dtype] * np.repeat(largest, case.group_size, axis=1)
    wrong = np.abs(values_of(packed) - expected)
    assert np.mean(wrong <= rounding) >= 1 - TIES
    assert np.all(wrong <= rounding + 4 * scale)


def check_rtn(case: Case) -> None:
    made = rtn.quantize(case.work(), search=False)
    check(case, made, rounded(case))
    assert (made.weights, made.ranges, made.notes) == ({}, {}, [])


def check_percentile(case: Case) -> None:
    made = percentile.quantize(case.work(), 1.0, 98.0)
    check(case, made, on_its_grid(case, made))
    assert case.clips == [(1.0, 98.0)]
    assert (set(made.ranges), made.weights) == ({"linear"}, {})


def check_searched(case: Case) -> None:
    """Every group's values are the nearest of its grid, and lose no more than on MLX's."""
    made = rtn.quantize(case.work())
    check(case, made, on_its_grid(case, made))
    losses = [
        ((case.weight - w) ** 2).reshape(len(w), -1, case.group_size).sum(axis=2)
        for w in (values_of(made.layers["linear"]), rounded(case))
    ]
    assert np.all(losses[0] <= losses[1] * (1 + 1e-4) + 1e-12)
    if case.bits <= 4:
        assert losses[0].sum() < 0.95 * losses[1].sum()


def turned(x: Array, block: int) -> Array:
    """By a regular Hadamard matrix of ±1/√block, written down by its signs."""
    if not block:
        return x
    place = np.arange(block)
    odd = np.zeros((block, block), int)
    for digit in range(4):  # of base four; those of row and column that make three give a minus
        odd += place[:, None] // 4**digit % 4 + place // 4**digit % 4 == 3
    used = np.where(odd % 2, -1, 1) / np.sqrt(block)
    return (x.reshape(-1, block) @ used).reshape(x.shape)


def check_gptq(case: Case, act_order: bool, search: bool = True, rotation: int = 0) -> None:
    """At inputs of steps that count differently."""
    shares = np.array([1.0, 0.25, 0.0, 0.5])
    work = replace(case.work(), importance=lambda _: shares)
    made = gptq.quantize(work, damping=0.01, act_order=act_order, search=search, rotation=rotation)
    x = np.repeat(np.sqrt(shares), len(case.x) // 4)[:, None] * case.x
    block = max((b for b in (16, 64) if b <= rotation and x.shape[1] % b == 0), default=0)
    x, weight = turned(x, block), turned(case.weight, block)
    hessian = x.T @ x
    (packed,) = made.layers.values()
    grid = float64(packed.scales), float64(packed.biases)
    paper = by_the_paper(weight, hessian, case.bits, case.group_size, grid, 0.01, act_order)
    losses = [np.sum((x @ (weight - w).T) ** 2) for w in (paper, on_its_grid(case, made, weight))]
    assert losses[0] < losses[1], "which would be taken otherwise"
    check(case, made, paper)


def check_smooth(case: Case, alpha: float) -> None:
    made = smooth.quantize(case.work(), alpha)
    widest, own = np.abs(case.x).max(axis=0), np.abs(case.weight).max(axis=0)
    s = np.where(widest > 0, widest**alpha / own ** (1 - alpha), 1)
    check(case, made, on_its_grid(case, made, case.weight * s))
    assert case.divisors[0] == pytest.approx(s)
    # Shift and scale are divided; the 1 that the scale is added to is no parameter.
    weight, bias = (float64(case.architecture.module.modulation[part]) for part in ("weight", "bias"))
    shift, scale = np.split(bias, 2)
    found = {path: float64(value) for path, value in made.weights.items()}
    assert set(found) == {"modulation.weight", "modulation.bias"}
    np.testing.assert_allclose(found["modulation.weight"], weight / np.tile(s, 2)[:, None], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found["modulation.bias"], [*shift / s, *(1 + scale) / s - 1], rtol=1e-6, atol=1e-6)


CHECKS: dict[str, Callable[[Case], None]] = {
    "rtn": check_rtn,
    "rtn, searched": check_searched,
    "percentile": check_percentile,
    "gptq": partial(check_gptq, act_order=False),
    "gptq in act order": partial(check_gptq, act_order=True),
    "gptq on MLX's grids": partial(check_gptq, act_order=True, search=False),
    "gptq, rotated": partial(check_gptq, act_order=False, rotation=64),
    "smooth": partial(check_smooth, alpha=0.3),
}


#: Group size and type; of one size both types by default.
GRIDS = [
    pytest.param(size, dtype, marks=pytest.mark.slow if (size, dtype) in ((32, "bfloat16"), (128, "bfloat16")) else ())
    for size, dtype in product(GROUP_SIZES, DTYPES)
]


@pytest.mark.parametrize(("group_size", "dtype"), GRIDS)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("quantizer", CHECKS)
def test_oracle(quantizer: str, bits: int, group_size: int, dtype: str) -> None:
    CHECKS[quantizer](Case(bits, group_size, DTYPES[dtype]))


# Packed weights


@given(
    bits=st.sampled_from(WEIGHT_BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**16),
)
def test_packing(bits: int, group_size: int, groups: int, dtype: str, seed: int) -> None:
    """Integers lie as MLX packs them, and come back."""
    random = np.random.RandomState(seed)
    nearest = Packed.nearest(mx.array(random.randn(5, groups * group_size)), bits, group_size, DTYPES[dtype])
    packed = Packed.of_integers(integers_of(nearest).astype(np.uint8), nearest.scales, nearest.biases, bits, group_size)
    assert same(packed, nearest)
    integers = random.randint(0, 2**bits, (5, groups * group_size)).astype(np.uint8)
    packed = Packed.of_integers(integers, nearest.scales, nearest.biases, bits, group_size)
    assert packed.weight.shape == nearest.weight.shape
    assert packed.nbytes == nearest.nbytes
    assert np.array_equal(integers_of(packed), integers)
    expected = values_of(packed)
    np.testing.assert_allclose(np.array(packed.dequantize()), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.fixture(scope="module")
def sd3() -> States:
    return tiny_states("sd3")


# Percentiles, and what is refused


def test_percentiles_of_planned_layers(sd3: States) -> None:
    """Blocks of the plan have no input of their own; a convolution has, though its weights stay."""
    asked = Asked(sd3)
    work = work_on(sd3, asked=asked)
    made = percentile.quantize(replace(work, plan=work.plan | {"mm_block_1": LayerPlan(4, 8)}), 1.0, 98.0)
    assert asked.asked == dict.fromkeys(sd3.architecture.layers(), ((1.0, 98.0), None))
    assert made.ranges == {name: StepRanges((0,), (-len(name),), (1.0,)) for name in asked.asked}
    assert list(made.layers) == list(work.layers)
    percentile.quantize(work)
    assert asked.asked["x_embedder"] == ((0.1, 99.9), None)


@pytest.mark.parametrize(
    ("quantizer", "parameters", "words"),
    [
        (gptq, {"damping": -0.1}, ("quantizer.damping=-0.1", "0 or more")),
        (gptq, {"damping": 1e308}, ("quantizer.damping=1e+308", "1000 at most")),
        (gptq, {"memory_gb": 0.0}, ("quantizer.memory_gb=0.0", "more than 0")),
        (smooth, {"alpha": -0.1}, ("quantizer.alpha=-0.1", "must be 0 to 1")),
        (smooth, {"alpha": 1.5}, ("quantizer.alpha=1.5", "must be 0 to 1")),
        (percentile, {"low": -1.0}, ("quantizer.low=-1.0", "0 or more")),
        (percentile, {"high": 100.5}, ("quantizer.high=100.5", "100 or less")),
        (percentile, {"low": 50.0, "high": 50.0}, ("quantizer.low=50.0", "less than quantizer.high")),
    ],
)
def test_impossible_parameters(quantizer: Any, parameters: Any, words: Sequence[str]) -> None:
    """Found before anything is loaded."""
    nothing = QuantizerInput.without_layers(MMDiTArchitecture(tiny_transformer("sd3")), mx.float16)
    check_config_error(lambda: quantizer.quantize(nothing, **parameters), words)


@pytest.mark.parametrize(
    ("quantizer", "lacking"), [(smooth, "channel_range"), (smooth, "ranges"), (percentile, "ranges")]
)
def test_missing_statistics(sd3: States, quantizer: Any, lacking: str) -> None:
    work = replace(work_on(sd3), **{lacking: lambda *_: None})
    with pytest.raises(CalibError) as error:
        quantizer.quantize(work)
    assert "needs activations.h5" in str(error.value)
    assert "calib collect" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["rtn", "percentile", "gptq", "smooth", "taqdit"])
def test_options_name_every_default(option: str) -> None:
    node = OmegaConf.to_container(OmegaConf.load(CHECKOUT / "conf" / "quantizer" / f"{option}.yaml"))
    assert isinstance(node, dict)
    bound = bind_target("quantizer", node, given=("work",))
    parameters = inspect.signature(bound.func).parameters
    assert bound.keywords == {name: p.default for name, p in parameters.items() if name != "work"}
