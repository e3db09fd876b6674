"""Streaming statistics against float64 NumPy, on made-up data and on any split of it."""

import warnings

from calib.activations.observer_mlx import PHASES, first_sampled

import mlx.core as mx
import numpy as np
import pytest
from helpers import MLX_DTYPES, check_percentiles, check_statistics, float64, name_of, sound, statistics_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

DTYPES = st.sampled_from(list(MLX_DTYPES))


@st.composite
def activations(draw: st.DrawFn) -> mx.array:
    """Rows of channels, each channel with a mean and a spread of its own; some skewed, some sparse, some far off."""
    rows, channels = draw(st.integers(1, 400)), draw(st.integers(1, 12))
    random = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    spread = 10.0 ** random.uniform(-3, 2, channels)
    mean = spread * random.uniform(-30, 30, channels)
    x = mean + spread * random.randn(rows, channels)
    shape = draw(st.sampled_from(["normal", "gelu", "sparse"]))
    if shape == "gelu":
        x = np.maximum(x, 0.1 * np.tanh(x))
    if shape == "sparse":
        x = x * (random.rand(rows, channels) < 0.2)
    return mx.array(x.astype(np.float32)).astype(MLX_DTYPES[draw(DTYPES)])


def sampled_rows(rows: int, stride: int, phase: int) -> NDArray[np.int64]:
    return np.arange(first_sampled(rows, stride, phase), rows, stride)


@given(x=activations())
def test_statistics(x: mx.array) -> None:
    check_statistics(statistics_of(x), float64(x), name_of(x))


@given(x=activations())
def test_careful_statistics(x: mx.array) -> None:
    statistics = statistics_of(x, finite_only=True)
    check_statistics(statistics, float64(x), name_of(x))
    assert (statistics.nan, statistics.inf) == (0, 0)


@given(x=activations(), data=st.data())
def test_merging(x: mx.array, data: st.DataObject) -> None:
    cuts = sorted(set(data.draw(st.lists(st.integers(1, max(1, x.shape[0] - 1)), max_size=5))))
    cuts = [cut for cut in cuts if cut < x.shape[0]]
    parts = data.draw(st.permutations([statistics_of(part) for part in mx.split(x, cuts)]))
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole = statistics_of(x)
    for field in ("minimum", "maximum", "count"):
        assert np.array_equal(getattr(merged, field), getattr(whole, field)), field
    assert np.array_equal(merged.histogram.keys, whole.histogram.keys)
    assert np.array_equal(merged.histogram.counts, whole.histogram.counts)
    assert merged.percentiles() == whole.percentiles()
    check_statistics(merged, float64(x), name_of(x))


@pytest.mark.parametrize("dtype", list(MLX_DTYPES))
@pytest.mark.parametrize("rows", [100, 4_096, 20_480])
@pytest.mark.parametrize("parts", [1, 7])
def test_a_large_mean(dtype: str, rows: int, parts: int) -> None:
    x = mx.array((3 + 0.1 * np.random.RandomState(0).randn(rows, 6)).astype(np.float32)).astype(MLX_DTYPES[dtype])
    cuts = [rows * i // parts for i in range(1, parts)]
    merged, *others = [statistics_of(part) for part in mx.split(x, cuts)]
    for other in others:
        merged = merged.merge(other)
    check_statistics(merged, float64(x), dtype)


def test_constant_activations() -> None:
    for value in (0.0, 0.1, -3e4):
        statistics = statistics_of(mx.full((1000, 3), value))
        assert np.all(statistics.std <= 1e-6 * abs(value))
        assert np.array_equal(statistics.minimum, statistics.maximum)
        assert statistics.percentiles()["p01"] == statistics.percentiles()["p999"] == np.float32(value)


@pytest.mark.parametrize("scale", [1e-15, 1e10, 1e20, 1e35])
def test_extreme_scales(scale: float) -> None:
    x = mx.array((scale * np.random.RandomState(0).uniform(-1, 1, (500, 4))).astype(np.float32))
    careful = not sound(x)  # as collection decides
    check_statistics(statistics_of(x, finite_only=careful), float64(x), "float32")
    assert careful == (scale > 1e18)


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[str, NDArray[np.float64]]:
    """Rows of channels with NaNs and infinities strewn in, a whole channel of them perhaps."""
    dtype, rows, channels = draw(DTYPES), draw(st.integers(1, 60)), draw(st.integers(1, 6))
    random = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    values = (random.randn(rows, channels) + random.uniform(-5, 5, channels)).astype(np.float32)
    share = draw(st.sampled_from([0.02, 0.3, 1.0]))
    bad = random.rand(rows, channels) < share * (random.rand(channels) < 0.7)
    values[bad] = random.choice([np.nan, np.inf, -np.inf], size=int(bad.sum()))
    return dtype, float64(mx.array(values).astype(MLX_DTYPES[dtype]))


@given(case=spoiled())
@example(case=("float32", np.full((3, 2), np.nan)))
@example(case=("float16", np.array([[np.inf, 1.0], [-np.inf, 2.0]])))
def test_nan_and_infinity(case: tuple[str, NDArray[np.float64]]) -> None:
    dtype, values = case
    x = mx.array(values.astype(np.float32)).astype(MLX_DTYPES[dtype])
    found = statistics_of(x, finite_only=True)
    finite = np.isfinite(values)
    assert found.nan == np.isnan(values).sum()
    assert found.inf == np.isinf(values).sum()
    np.testing.assert_array_equal(found.count, finite.sum(axis=0))
    assert found.histogram.total == finite.sum()
    for channel in range(values.shape[1]):
        kept = values[finite[:, channel], channel]
        if len(kept):
            assert (found.minimum[channel], found.maximum[channel]) == (kept.min(), kept.max())
            assert found.mean[channel] == pytest.approx(kept.mean(), abs=1e-6 * np.sqrt(np.mean(kept**2)))
            assert found.std[channel] == pytest.approx(kept.std(), rel=1e-5, abs=1e-6 * np.abs(kept).max())
    low, high, mean, std, total = found.over_channels()
    assert total == finite.sum()
    if total:
        kept = values[finite]
        assert (low, high) == (kept.min(), kept.max())
        assert mean == pytest.approx(kept.mean(), abs=1e-6 * np.sqrt(np.mean(kept**2)))
        assert std == pytest.approx(kept.std(), rel=1e-5, abs=1e-6 * np.abs(kept).max())
        check_percentiles(found.percentiles(), kept, dtype)


@given(case=spoiled(), data=st.data())
def test_merging_spoiled_parts(case: tuple[str, NDArray[np.float64]], data: st.DataObject) -> None:
    dtype, values = case
    x = mx.array(values.astype(np.float32)).astype(MLX_DTYPES[dtype])
    cut = data.draw(st.integers(0, len(values)))
    parts = [statistics_of(part, finite_only=True) for part in (x[:cut], x[cut:]) if part.size]
    merged = parts[0] if len(parts) == 1 else parts[0].merge(parts[1])
    whole = statistics_of(x, finite_only=True)
    assert (merged.nan, merged.inf) == (whole.nan, whole.inf)
    for field in ("minimum", "maximum", "count"):
        np.testing.assert_array_equal(getattr(merged, field), getattr(whole, field))
    assert np.array_equal(merged.histogram.counts, whole.histogram.counts)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(merged.std, whole.std, rtol=1e-5, atol=1e-6)


@settings(max_examples=200)
@given(rows=st.integers(1, 5000), stride=st.integers(2, 600), phase=st.integers(0, PHASES - 1) | st.just(PHASES - 1))
def test_sampled_rows(rows: int, stride: int, phase: int) -> None:
    index = sampled_rows(rows, stride, phase)
    assert abs(len(index) - rows / stride) <= 1
    assert len(index) >= 1 and index[0] < stride and index[-1] < rows
    assert np.all(np.diff(index) == stride)


@settings(max_examples=20)
@given(rows=st.integers(1, 500), stride=st.integers(2, 600))
def test_all_rows_are_sampled_alike(rows: int, stride: int) -> None:
    firsts = [first_sampled(rows, stride, phase) for phase in range(PHASES)]
    times = np.bincount(firsts)
    assert len(times) == min(stride, rows)
    assert times.max() - times.min() <= 1
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("dtype", list(MLX_DTYPES))
@pytest.mark.parametrize("finite_only", [False, True])
def test_sampling_is_for_histograms_alone(dtype: str, finite_only: bool) -> None:
    x = mx.array(np.random.RandomState(0).randn(10, 100, 5).astype(np.float32)).astype(MLX_DTYPES[dtype])
    sampled = statistics_of(x, histogram_stride=7, phase=20_000, finite_only=finite_only)
    every = statistics_of(x, finite_only=finite_only)
    for field in ("minimum", "maximum", "count", "mean", "std"):
        assert np.array_equal(getattr(sampled, field), getattr(every, field)), field
    chosen = sampled_rows(1000, 7, 20_000)
    assert sampled.histogram.total == chosen.size * 5
    check_percentiles(sampled.percentiles(), float64(x.reshape(-1, 5))[chosen], dtype)
    assert every.minimum.min() <= sampled.percentiles()["p001"] < sampled.percentiles()["p999"] <= every.maximum.max()


def test_phases() -> None:
    x = mx.arange(1000, dtype=mx.float32).reshape(10, 100, 1).astype(mx.float16)
    first, second = (statistics_of(x, histogram_stride=100, phase=phase).histogram for phase in (0, 45_000))
    assert first.values().tolist() == list(range(0, 1000, 100))
    assert second.values().tolist() == list(range(68, 1000, 100))


def test_inputs_without_tokens() -> None:
    x = mx.array(np.random.RandomState(0).randn(20, 1, 1, 5).astype(np.float32))
    assert statistics_of(x, histogram_stride=7).histogram.total == 100


def test_percentiles_within_extremes() -> None:
    # The midpoint of 1.0's bin of float32 values is above 1.
    found = statistics_of(mx.full((10, 2), 1.0)).percentiles()
    assert set(found.values()) == {1.0}


def test_no_warnings() -> None:
    x = mx.array([[np.inf, np.nan, -np.inf, 1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in MLX_DTYPES.values():
            statistics_of(x.astype(dtype), finite_only=True).percentiles()
