"""Heuristics from statistics alone: sqnr, mse and cv against sums over every single value."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.activations.histogram import Histogram
from calib.analysis.grid import Grid
from calib.analysis.heuristics import cv, mse, sqnr, uniform
from calib.analysis.heuristics import range as range_heuristic
from calib.analysis.layers import LayerSummary, read_summaries
from calib.analysis.plan import NO_CLIP, LayerPlan
from calib.analysis.rounding import Clip, best_clip, best_clip_of, percentile_at
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.base.errors import CalibError
from calib.base.targets import bind_target

import mlx.core as mx
import numpy as np
import pytest
import yaml
from helpers import CHECKOUT, check_config_error
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

Values = NDArray[np.float64]
BITS = (2, 3, 4, 5, 6, 8)


def histogram_of(values: Sequence[float] | Values, dtype: str = "float16") -> Histogram:
    """Of values that are rounded to float16, or of which the upper 16 bits of a float32 are kept."""
    x = np.asarray(values, np.float64)
    bits = x.astype(np.float16).view(np.uint16) if dtype == "float16" else x.astype(np.float32).view(np.uint32) >> 16
    return Histogram.from_counts(np.bincount(bits.astype(np.int64), minlength=1 << 16), dtype)


def summary(values: Sequence[float] | Values, **more: Any) -> LayerSummary:
    """What is known of a layer that has these values in float16."""
    x = np.asarray(values, np.float64).astype(np.float16).astype(np.float64)
    percentiles = {f"p{name}": float(np.percentile(x, p)) for name, p in {"01": 1, "50": 50, "99": 99}.items()}
    known: dict[str, Any] = {"histogram": histogram_of(x)} | more
    return LayerSummary(x.min(), x.max(), float(x.mean()), float(x.std()), percentiles, len(x), **known)


def quantized(x: float, low: float, high: float, bits: int) -> float:
    """One value on the grid over [low, high] and zero, by the definition."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (2**bits - 1)
    if step == 0:
        return x
    zero = round(-low / step)
    return (min(max(round(x / step) + zero, 0), 2**bits - 1) - zero) * step


def error_of(values: Values, low: float, high: float, bits: int, norm: float) -> float:
    """Σ|x - Q(x)|^norm, one value after the other."""
    return math.fsum(abs(x - quantized(x, low, high, bits)) ** norm for x in values.tolist())


def on_grid(values: Values, low: float, high: float, bits: int) -> Values:
    """:func:`quantized` of every value at once."""
    step = (max(high, 0.0) - min(low, 0.0)) / (2**bits - 1)
    zero = np.round(-min(low, 0.0) / step)
    result: Values = (np.clip(np.round(values / step) + zero, 0, 2**bits - 1) - zero) * step
    return result


def expanded(histogram: Histogram) -> Values:
    return np.repeat(histogram.values(), histogram.counts.astype(np.int64))


@st.composite
def some_values(draw: st.DrawFn, least: int = 1) -> Values:
    """Few values by hand, or many of a kind that layers have, at any scale; perhaps an outlier, perhaps one sign."""
    if draw(st.booleans()):
        few = st.floats(-1000, 1000, width=16) | st.sampled_from([0.0, -0.0, 2.0**-24, -(2.0**-24)])
        return np.array(draw(st.lists(few, min_size=least, max_size=12)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = draw(st.sampled_from([random.standard_normal, random.standard_cauchy, random.random]))(300)
    x = x * 10.0 ** draw(st.integers(-3, 1)) + draw(st.sampled_from([0, 0, 5, -5]))
    x[0] = draw(st.sampled_from([x[0], 1e4, -1e4]))
    x = draw(st.sampled_from([x, np.abs(x), -np.abs(x)]))
    return np.clip(x, -6e4, 6e4).astype(np.float16).astype(np.float64)


# Grids


@given(values=some_values(), bits=st.integers(2, 10), data=st.data())
def test_grid(values: Values, bits: int, data: st.DataObject) -> None:
    """Value by value as defined, on the host and, but for ties, on the device."""
    low, high = sorted(data.draw(st.tuples(*[st.floats(-100, 100, width=16)] * 2)))
    grid, expected = Grid.over(low, high, bits), [quantized(x, low, high, bits) for x in values.tolist()]
    np.testing.assert_allclose(grid.apply(values), expected, rtol=1e-12, atol=1e-300)
    found = np.array(grid.apply_mx(mx.array(values.astype(np.float32))))
    assert np.all(np.abs(found - expected) <= 1.001 * grid.scale + 1e-6 * np.abs(expected))
    assert np.mean(np.abs(found - expected) <= 1e-6 * np.abs(expected) + 1e-30) > 0.9 or len(values) < 12


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_sqnr_of_a_normal_layer(bits: int, dtype: str) -> None:
    """Also of float32, whose histogram knows values to 2^-8 only: to a quarter of a decibel."""
    x = np.random.default_rng(0).standard_normal(200_000).astype(dtype).astype(np.float64)
    found = best_clip(histogram_of(x, dtype), bits, extremes=(x.min(), x.max()))
    noise = np.sum((x - on_grid(x, found.low, found.high, bits)) ** 2)
    assert found.sqnr == pytest.approx(10 * math.log10(np.sum(x * x) / noise), abs=0.25 if dtype == "float32" else 1e-6)


# The best clip


def brute_force(values: Values, bits: int, norm: float) -> list[float]:
    """Errors of 100 clips, from 1% to 100% of the full range."""
    low, high = float(values.min()), float(values.max())
    if low == high == 0:
        return [0.0] * 100
    grids = [on_grid(values, i / 100 * low, i / 100 * high, bits) for i in range(1, 101)]
    return [float(np.sum(np.abs(values - grid) ** norm)) for grid in grids]


@given(values=some_values(), bits=st.sampled_from([*BITS, 10]), norm=st.sampled_from([2.0, 2.0, 2.4, 1.0]))
def test_best_clip(values: Values, bits: int, norm: float) -> None:
    found, errors = best_clip(histogram_of(values), bits, norm), brute_force(values, bits, norm)
    # What the search in float32 may miss by, and the cancellation in sums of squares.
    slack = 2 * 2**-22 * np.abs(values).max()
    root = (min(errors) / len(values)) ** (1 / norm) + slack
    assert found.error <= root**norm * len(values) * (1 + 1e-5)
    assert found.error <= errors[-1] * (1 + 1e-9) + 1e-20
    assert found.error == pytest.approx(error_of(values, found.low, found.high, bits, norm), rel=1e-9, abs=1e-20)
    if (noise := error_of(values, found.low, found.high, bits, 2)) > 1e-20:
        assert found.sqnr == pytest.approx(10 * math.log10(math.fsum(x * x for x in values) / noise), abs=1e-8)


@given(values=some_values(), bits=st.sampled_from(BITS), norm=st.sampled_from([2.0, 2.4]))
def test_a_clip_shrinks_both_ends_alike(values: Values, bits: int, norm: float) -> None:
    clip = best_clip(histogram_of(values), bits, norm)
    low, high = float(values.min()), float(values.max())
    assert low <= clip.low <= clip.high <= high
    if clip.percentiles == NO_CLIP:
        assert (clip.low, clip.high) == (low, high)
        return
    shares = [100 * end / full for end, full in ((clip.low, min(low, 0)), (clip.high, max(high, 0))) if full]
    assert shares[0] == pytest.approx(round(shares[0])), "of 100 steps"
    assert shares[0] == pytest.approx(shares[-1])
    assert clip.low == low or low < 0
    assert clip.high == high or high > 0


@given(values=some_values(), bits=st.sampled_from(BITS))
def test_percentiles_give_the_clip_back(values: Values, bits: int) -> None:
    histogram = histogram_of(values)
    clip = best_clip(histogram, bits)
    tolerance = 1e-9 * float(np.ptp(values)) + 1e-12
    assert histogram.percentiles(clip.percentiles) == pytest.approx((clip.low, clip.high), abs=tolerance)
    assert np.percentile(values, clip.percentiles) == pytest.approx((clip.low, clip.high), abs=tolerance)
    assert 0 <= clip.percentiles[0] < clip.percentiles[1] <= 100, "what a plan may hold"
    # An end that is not cut is 0 or 100 also where many values lie at it: those of a single step may not.
    assert (clip.percentiles[0] == 0) == (clip.low == values.min())
    assert (clip.percentiles[1] == 100) == (clip.high == values.max())


@given(values=some_values(least=2), share=st.floats(-0.2, 1.2))
def test_percentile_at_inverts_percentiles(values: Values, share: float) -> None:
    low, high = float(values.min()), float(values.max())
    value = low + share * (high - low)
    first, last = percentile_at(histogram_of(values), value, "left"), percentile_at(histogram_of(values), value)
    if low < value < high:
        assert np.percentile(values, [first, last]) == pytest.approx([value] * 2, abs=1e-9 * (high - low))
    elif value > high or value < low:
        assert first == last == (100.0 if value > high else 0.0)


def test_percentile_at_a_repeated_value() -> None:
    histogram = histogram_of([0.0, 0.0, 1.0, 1.0, 1.0, 2.0])
    assert [percentile_at(histogram, x, "left") for x in (0.0, 1.0, 2.0)] == pytest.approx([0, 40, 100])
    assert [percentile_at(histogram, x, "right") for x in (0.0, 1.0, 2.0)] == pytest.approx([20, 80, 100])


@given(values=some_values(), norm=st.sampled_from([2.0, 2.4]))
def test_finer_grids_lose_less(values: Values, norm: float) -> None:
    """Of values of one sign: 2^b - 1 divides 2^2b - 1, and zero is an end of the grid."""
    positive = histogram_of(np.abs(values))
    errors = {bits: best_clip(positive, bits, norm).error for bits in BITS}
    slack = 1 + 1e-3
    for coarse, fine in ((2, 4), (4, 8), (2, 6), (3, 6)):
        assert errors[fine] <= errors[coarse] * slack + 1e-9 * np.abs(values).max() ** norm


@given(values=some_values(), bits=st.sampled_from(BITS))
def test_half_a_step_is_the_most_lost(values: Values, bits: int) -> None:
    low, high = float(values.min()), float(values.max())
    half = (max(high, 0) - min(low, 0)) / (2**bits - 1) / 2
    assert best_clip(histogram_of(values), bits).error <= len(values) * half**2 * (1 + 1e-9)


@given(values=some_values(), bits=st.sampled_from(BITS), power=st.integers(-3, 3))
def test_scale_changes_nothing(values: Values, bits: int, power: int) -> None:
    """By a power of two, without rounding: as bfloat16, whose exponents reach that far."""
    bfloat = [(x.astype(np.float32).view(np.uint32) >> 16).astype(np.int64) for x in (values, values * 2.0**power)]
    one, other = (
        best_clip(Histogram.from_counts(np.bincount(bits_of, minlength=1 << 16), "bfloat16"), bits)
        for bits_of in bfloat
    )
    assert other.percentiles == pytest.approx(one.percentiles, abs=1e-9)
    assert other.low == pytest.approx(one.low * 2.0**power, rel=1e-9)
    assert other.sqnr == pytest.approx(one.sqnr, abs=1e-6) or min(one.sqnr, other.sqnr) > 250


# Layers that are not like others


@pytest.mark.parametrize("value", [3.0, -0.1, 6e-8, 60000.0])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_a_constant_layer_loses_nothing(value: float, norm: float) -> None:
    clip = best_clip(histogram_of([value] * 7), 2, norm)
    assert clip.percentiles == NO_CLIP
    assert clip.low == clip.high == float(np.float16(value))
    assert clip.sqnr > 250


def test_a_constant_float32_layer() -> None:
    clip = best_clip(histogram_of([3.0] * 7, "float32"), 2, extremes=(3.0, 3.0))
    assert (clip.low, clip.high, clip.percentiles) == (3.0, 3.0, NO_CLIP)
    assert clip.sqnr > 250


@pytest.mark.parametrize("bits", [2, 8, 10])
def test_a_layer_of_zeros(bits: int) -> None:
    assert best_clip(histogram_of([0.0, -0.0]), bits) == Clip(0.0, 0.0, 0.0, math.inf, NO_CLIP)


def test_without_values() -> None:
    clip = best_clip(Histogram("float16"), 4, extremes=(-1.0, 2.0))
    assert (clip.low, clip.high, clip.error, clip.percentiles) == (-1.0, 2.0, 0.0, NO_CLIP)
    assert math.isnan(clip.sqnr)
    plan = sqnr.plan_layer(replace(summary([0.0]), histogram=Histogram("float16")))
    assert (plan.activation_bits, plan.clips, plan.sensitive) == (8, False, True)


def test_a_huge_outlier() -> None:
    bulk = np.random.default_rng(0).standard_normal(100_000)
    outlier = histogram_of([*bulk, 100.0])
    assert best_clip(outlier, 4).high < 50
    bits_2 = best_clip(histogram_of([*bulk, 200.0, -200.0]), 2)
    assert bits_2.high < 4, "2% of the full range, or 1%"
    # Given up at 8 bits it would cost more than the coarser grid does.
    few = histogram_of([*bulk[:100], 1000.0])
    assert best_clip(few, 8).percentiles == NO_CLIP


def test_many_zeros_are_not_cut_off() -> None:
    """Of a step with fewer of them the same percentile would be a large value."""
    x = np.maximum(np.random.default_rng(0).standard_normal(10_000), 0)
    clip = best_clip(histogram_of(x), 4)
    assert clip.percentiles[0] == 0
    assert clip.percentiles[1] < 100


def test_bfloat16_does_not_overflow() -> None:
    bits = np.array([0x7F7F, 0xFF7F, 0x0001, 0x3F80])
    histogram = Histogram.from_counts(np.bincount(bits, minlength=1 << 16), "bfloat16")
    for norm in (2.0, 4.0):
        clip = best_clip(histogram, 8, norm)
        assert math.isfinite(clip.error)
        assert math.isfinite(clip.sqnr)


def test_exact_extremes_are_the_full_range() -> None:
    """A histogram of some rows only has not seen them."""
    x = np.random.default_rng(0).standard_normal(1000)
    histogram = histogram_of(x)
    clip = best_clip(histogram, 8, extremes=(-20.0, 10.0))
    shares = 100 * clip.low / -20, 100 * clip.high / 10
    assert shares[0] == pytest.approx(shares[1])
    assert shares[0] == pytest.approx(round(shares[0]))
    layer = replace(summary(x), minimum=-20.0, maximum=10.0)
    assert best_clip_of(layer, 8) == clip != best_clip(histogram, 8)
    # Beyond all that was counted: nothing to clip, and the error is that of the whole range.
    wide = best_clip(histogram_of([-1.0, 1.0]), 8, extremes=(-100.0, 100.0))
    assert wide.percentiles == NO_CLIP
    assert (wide.low, wide.high) == (-100.0, 100.0)
    assert wide.error == pytest.approx(error_of(np.array([-1.0, 1.0]), -100, 100, 8, 2))


# The heuristics


@given(values=some_values(), targets=st.tuples(st.floats(1, 80), st.floats(1, 80)))
def test_sqnr_takes_the_fewest_bits(values: Values, targets: tuple[float, float]) -> None:
    layer = summary(values)
    low, high = (sqnr.plan_layer(layer, target) for target in sorted(targets))
    assert low.activation_bits <= high.activation_bits
    reached = {bits: best_clip_of(layer, bits).sqnr for bits in BITS}
    expected = next((bits for bits in BITS if reached[bits] >= max(targets)), 8)
    assert high.activation_bits == expected
    assert high.clip_percentile == best_clip_of(layer, expected).percentiles
    assert high.reason.startswith("misses the target: activations") == (reached[expected] < max(targets))
    assert high.figure == f"SQNR {reached[expected]:.1f} dB"
    assert high.weight_bits == 8, "not known"
    assert high.sensitive == (expected == 8)
    assert not high.aggressive


MEASURED = {2: 8.1, 3: 14.2, 4: 20.6, 5: 26.8, 6: 33.0, 8: 45.1}


@pytest.mark.parametrize(
    ("target", "weight_target", "bits"),
    [(30.0, None, 6), (33.0, None, 6), (33.1, None, 8), (30.0, 20.6, 4), (30.0, 1.0, 2), (30.0, 50.0, 8)],
)
def test_sqnr_takes_the_fewest_weight_bits(target: float, weight_target: float | None, bits: int) -> None:
    layer = summary([0.0], weight_sqnr=MEASURED)
    plan = sqnr.plan_layer(layer, target, weight_target)
    assert plan.weight_bits == bits
    assert plan.reason.startswith("misses the target: weights") == (weight_target == 50.0)
    assert plan.figure.endswith(f"weights {MEASURED[bits]} dB")
    # Two bits do for zeros: what the layer needs is what its weights need.
    assert plan.activation_bits == 2
    assert plan.sensitive == (bits == 8)
    assert plan.aggressive == (bits <= 4)


@given(values=some_values(), bits=st.integers(2, 12), norm=st.sampled_from([2.0, 2.4]))
def test_mse(values: Values, bits: int, norm: float) -> None:
    plan = mse.plan_layer(summary(values), bits, norm)
    clip = best_clip(histogram_of(values), bits, norm)
    assert (plan.weight_bits, plan.activation_bits, plan.clip_percentile) == (8, bits, clip.percentiles)
    assert plan.figure == f"SQNR {clip.sqnr:.1f} dB"
    assert (plan.sensitive, plan.aggressive) == (bits == 8, bits <= 4)


def test_mse_leaves_16_bits_alone() -> None:
    plan = mse.plan_layer(replace(summary([1.0, 100.0]), histogram=None), 16)
    assert (plan.activation_bits, plan.clips) == (16, False)


def test_higher_norms_keep_outliers() -> None:
    layer = summary(np.random.default_rng(0).standard_t(4, 100_000))
    highs = [mse.plan_layer(layer, 4, norm).clip_percentile[1] for norm in (1.0, 2.0, 2.4, 4.0)]
    assert highs == sorted(set(highs))


def with_steps(mean: float, std: float, widths: Sequence[float]) -> LayerSummary:
    steps = {i: {"min": -width, "max": width, "p01": -width / 2, "p99": width / 2} for i, width in enumerate(widths)}
    return replace(summary([0.0]), mean=mean, std=std, steps=steps, histogram=None)


@pytest.mark.parametrize(
    ("mean", "std", "widths", "bits", "reason", "figure"),
    [
        (1.0, 30.0, [1.0, 0.8], 4, "steady", "std/|mean| 30, drift 0.20"),
        (-1.0, 30.1, [1.0, 0.8], 6, "high variation", "std/|mean| 30.1, drift 0.20"),
        (-1.0, 30.0, [0.7, 1.0, 0.9], 6, "drifting range", "std/|mean| 30, drift 0.30"),
        (0.0, 0.1, [0.0, 2.0], 8, "high variation, drifting range", "std/|mean| inf, drift 1.00"),
        (0.0, 0.0, [0.0, 0.0], 4, "steady", "std/|mean| 0, drift 0.00"),
        (1.0, 3.21, [], 4, "steady", "std/|mean| 3.21"),
        (1.0, 99.0, [5.0], 6, "high variation", "std/|mean| 99"),
        (1.0, 1.0, [math.nan, 1.0, 0.5], 6, "drifting range", "std/|mean| 1, drift 0.50"),
    ],
)
def test_cv(mean: float, std: float, widths: Sequence[float], bits: int, reason: str, figure: str) -> None:
    plan = cv.plan_layer(with_steps(mean, std, widths))
    assert (plan.activation_bits, plan.weight_bits, plan.clips) == (bits, 8, False)
    assert (plan.reason, plan.figure) == (reason, figure)
    assert (plan.sensitive, plan.aggressive) == (bits == 8, bits <= 4)


def test_cv_takes_thresholds() -> None:
    layer = with_steps(1.0, 3.0, [1.0, 0.75])
    given_bits = {(3, 0.25): 4, (2, 0.25): 6, (3, 0.24): 6, (2, 0.24): 8}
    for (variation, drift), bits in given_bits.items():
        assert cv.plan_layer(layer, variation, drift).activation_bits == bits


@pytest.mark.parametrize(
    ("width", "std", "figure"),
    [(12.44, 1.0, "r = 12.4"), (4.0, 3.0, "r = 4, std/r = 0.75"), (0.0, 0.5, "r = 0, std/r = inf")],
)
def test_range_tells_its_figures(width: float, std: float, figure: str) -> None:
    layer = replace(summary([0.0]), std=std, percentiles={"p01": 0.0, "p99": width})
    assert range_heuristic.plan_layer(layer).figure == figure


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_uniform_takes_a_group_size(size: int) -> None:
    plan = uniform.plan_layer(summary([0.0]), group_size=size)
    assert (plan.group_size, plan.to_json()["group_size"]) == (size, size)


# From the command line


OPTIONS = ("cv", "mse", "range", "sqnr", "uniform")


def option(name: str) -> dict[str, Any]:
    node = yaml.safe_load((CHECKOUT / "conf/analysis" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(node, dict)
    return node


def planned(name: str, layer: LayerSummary, **given_values: Any) -> LayerPlan:
    """By an option of the command line and values given to it there."""
    plan: LayerPlan = bind_target("analysis", option(name) | given_values, given=("layer",))(layer)
    return plan


@pytest.mark.parametrize("name", OPTIONS)
def test_options_name_every_default(name: str) -> None:
    layer = summary(np.random.default_rng(0).standard_normal(1000), weight_sqnr=MEASURED)
    node, function = option(name), {"range": range_heuristic, "uniform": uniform, "cv": cv, "mse": mse, "sqnr": sqnr}
    plan_layer = function[name].plan_layer
    defaults = dict(zip(plan_layer.__code__.co_varnames[1:], plan_layer.__defaults__, strict=False))
    assert {key: value for key, value in node.items() if key != "_target_"} == defaults
    assert planned(name, layer) == plan_layer(layer)


@pytest.mark.parametrize(
    ("name", "given_value", "words"),
    [
        ("sqnr", {"target": 0.0}, ("analysis.target=0.0", "more than 0 dB")),
        ("sqnr", {"target": -3}, ("analysis.target=-3.0",)),
        ("sqnr", {"weight_target": -1.0}, ("analysis.weight_target=-1.0",)),
        ("sqnr", {"target": "loud"}, ("analysis.target=loud", "a number")),
        ("sqnr", {"target": None}, ("analysis.target=None",)),
        ("mse", {"activation_bits": 1}, ("analysis.activation_bits=1", "2 to 16")),
        ("mse", {"activation_bits": 17}, ("analysis.activation_bits=17",)),
        ("mse", {"activation_bits": 4.5}, ("analysis.activation_bits=4.5",)),
        ("mse", {"norm": 0.5}, ("analysis.norm=0.5", "1 to 4")),
        ("mse", {"norm": 5}, ("analysis.norm=5.0",)),
        ("cv", {"variation": -0.1}, ("analysis.variation=-0.1", "0 or more")),
        ("cv", {"drift": 1.1}, ("analysis.drift=1.1", "0 to 1")),
        ("cv", {"drift": -0.1}, ("analysis.drift=-0.1",)),
        ("uniform", {"group_size": 16}, ("analysis.group_size=16", "(32, 64, 128)")),
    ],
)
def test_bad_values_are_refused(name: str, given_value: dict[str, Any], words: Sequence[str]) -> None:
    check_config_error(lambda: planned(name, summary([0.0]), **given_value), words)


def test_missing_histograms() -> None:
    layer = replace(summary([1.0]), histogram=None)
    for plan_layer in (sqnr.plan_layer, mse.plan_layer):
        with pytest.raises(CalibError, match=r"activations\.h5.*run directory") as error:
            plan_layer(layer)
        assert "\n" not in str(error.value)


# A real run


@pytest.fixture(scope="module")
def layers(tiny_run: Path) -> dict[str, LayerSummary]:
    return read_summaries(tiny_run)[0]


def test_real_layers(layers: dict[str, LayerSummary]) -> None:
    plans = {name: sqnr.plan_layer(layer, 25.0) for name, layer in layers.items()}
    assert len({plan.activation_bits for plan in plans.values()}) > 1
    for name, plan in plans.items():
        layer = layers[name]
        assert layer.histogram is not None
        assert plan.weight_bits in WEIGHT_BITS
        x = np.clip(expanded(layer.histogram), layer.minimum, layer.maximum)
        low, high = layer.histogram.percentiles(plan.clip_percentile) if plan.clips else (layer.minimum, layer.maximum)
        noise = np.sum((x - on_grid(x, low, high, plan.activation_bits)) ** 2)
        found = 10 * math.log10(np.sum(x * x) / noise)
        assert float(plan.figure.split()[1]) == pytest.approx(found, abs=0.06), name
        assert found >= 24.9, name


def test_a_layer_takes_a_tenth_of_a_second(layers: dict[str, LayerSummary]) -> None:
    start = time.process_time()
    for layer in layers.values():
        sqnr.plan_layer(layer, 60.0)  # which takes every bit-width
        mse.plan_layer(layer)
        cv.plan_layer(layer)
    assert (time.process_time() - start) / len(layers) < 0.1
