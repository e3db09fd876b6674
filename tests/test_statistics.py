"""Streaming statistics against float64 NumPy, on made-up data, on any split of it, and on the model's activations."""

import warnings
from typing import Any

from calib.activations.collect import CollectSettings, LayerActivations, collect, observe
from calib.activations.statistics import Statistics, is_sound, merge_all, sampled_rows, summarize
from calib.activations.taps import TapKind, TapSelection, linear_layers, tap_points, tapped
from calib.dataset.manifest import Manifest
from calib.dataset.store import read_state
from calib.models.model import Conditioning, DiffusionModel

import mlx.core as mx
import numpy as np
import pytest
from helpers import MLX_DTYPES, STEPS, check_percentiles, check_statistics, float64, pooled
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

DTYPES = st.sampled_from(list(MLX_DTYPES))


def statistics_of(x: mx.array, **options: Any) -> Statistics:
    summary = summarize(x, **options)
    mx.eval(summary)
    return Statistics.from_summary(summary, x.dtype)


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


def name_of(x: mx.array) -> str:
    return next(name for name, dtype in MLX_DTYPES.items() if dtype == x.dtype)


@given(x=activations())
def test_statistics_equal_numpys(x: mx.array) -> None:
    check_statistics(statistics_of(x), float64(x), name_of(x))


@given(x=activations())
def test_statistics_that_look_for_non_finite_values_equal_numpys_too(x: mx.array) -> None:
    statistics = statistics_of(x, finite_only=True)
    check_statistics(statistics, float64(x), name_of(x))
    assert (statistics.nan, statistics.inf) == (0, 0)


@given(x=activations(), data=st.data())
def test_any_split_merges_to_the_whole(x: mx.array, data: st.DataObject) -> None:
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
def test_a_mean_that_is_large_against_the_spread_costs_no_accuracy(dtype: str, rows: int, parts: int) -> None:
    x = mx.array((3 + 0.1 * np.random.RandomState(0).randn(rows, 6)).astype(np.float32)).astype(MLX_DTYPES[dtype])
    cuts = [rows * i // parts for i in range(1, parts)]
    merged, *others = [statistics_of(part) for part in mx.split(x, cuts)]
    for other in others:
        merged = merged.merge(other)
    check_statistics(merged, float64(x), dtype)


def test_constant_activations_have_no_spread() -> None:
    for value in (0.0, 0.1, -3e4):
        statistics = statistics_of(mx.full((1000, 3), value))
        assert np.all(statistics.std <= 1e-6 * abs(value))
        assert np.array_equal(statistics.minimum, statistics.maximum)
        assert statistics.percentiles()["p01"] == statistics.percentiles()["p999"] == np.float32(value)


@pytest.mark.parametrize("scale", [1e-15, 1e10, 1e20, 1e35])
def test_very_small_and_very_large_values_have_finite_statistics(scale: float) -> None:
    x = mx.array((scale * np.random.RandomState(0).uniform(-1, 1, (500, 4))).astype(np.float32))
    careful = not is_sound(summarize(x))  # as collection decides
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
def test_nan_and_infinity_are_counted_apart_and_never_enter_a_range(case: tuple[str, NDArray[np.float64]]) -> None:
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
def test_spoiled_parts_merge_to_the_whole(case: tuple[str, NDArray[np.float64]], data: st.DataObject) -> None:
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
@given(
    rows=st.integers(1, 5000),
    stride=st.integers(2, 600),
    phase=st.floats(0, 1, exclude_max=True) | st.just(float(np.nextafter(1, 0))),
)
def test_sampled_rows_are_a_stride_apart_and_exist(rows: int, stride: int, phase: float) -> None:
    index = np.array(sampled_rows(rows, stride, phase)).astype(np.int64)
    assert abs(len(index) - rows / stride) <= 1
    assert len(index) >= 1 and index[0] < stride and index[-1] < rows
    assert np.all(np.diff(index) == stride)


def test_sampled_rows_differ_by_phase_and_a_stride_of_one_means_all() -> None:
    assert sampled_rows(1000, 1, 0.5) is None
    first, second = (np.array(sampled_rows(1000, 100, phase)) for phase in (0.0, 0.7))
    assert not np.array_equal(first, second)


def test_rows_are_sampled_for_the_histogram_alone() -> None:
    x = mx.array(np.random.RandomState(0).randn(10, 100, 5).astype(np.float32))
    sampled, every = statistics_of(x, histogram_stride=7, phase=0.3), statistics_of(x)
    for field in ("minimum", "maximum", "count", "mean", "m2"):
        assert np.array_equal(getattr(sampled, field), getattr(every, field)), field
    chosen = sampled_rows(1000, 7, 0.3)
    assert chosen is not None
    assert sampled.histogram.total == chosen.size * 5
    check_percentiles(sampled.percentiles(), float64(x.reshape(-1, 5)[chosen]), "float32")
    assert every.minimum.min() <= sampled.percentiles()["p001"] < sampled.percentiles()["p999"] <= every.maximum.max()


def test_an_input_without_tokens_is_counted_whole() -> None:
    x = mx.array(np.random.RandomState(0).randn(20, 1, 1, 5).astype(np.float32))
    assert statistics_of(x, histogram_stride=7).histogram.total == 100


def test_percentiles_stay_within_the_exact_extremes() -> None:
    # The midpoint of 1.0's bin of float32 values is above 1.
    found = statistics_of(mx.full((10, 2), 1.0)).percentiles()
    assert set(found.values()) == {1.0}


def test_infinities_and_nans_cause_no_warning() -> None:
    x = mx.array([[np.inf, np.nan, -np.inf, 1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in MLX_DTYPES.values():
            statistics_of(x.astype(dtype), finite_only=True).percentiles()


# Real activations


@pytest.fixture(scope="module")
def text(model: DiffusionModel, manifest: Manifest) -> Conditioning:
    return model.encode([manifest.images[image].prompt for image in (0, 1)], manifest.cfg_weight)


@pytest.fixture(scope="module")
def seen(
    model: DiffusionModel, data_dir: Any, manifest: Manifest, text: Conditioning
) -> dict[int, dict[str, NDArray[np.float64]]]:
    """The input of every linear layer as it went by, (rows, channels), at each step: images 0 and 1, with guidance."""
    points = tap_points(model.transformer, TapSelection(kind=TapKind.LINEAR))
    seen: dict[int, dict[str, NDArray[np.float64]]] = {}
    for step in STEPS:
        states = [read_state(data_dir, manifest, image, step) for image in (0, 1)]
        x = mx.array(np.stack(states).astype(np.float32))
        arrays: dict[str, mx.array] = {}
        with tapped(model.transformer, points, arrays.__setitem__):
            timestep, sigma = mx.array(manifest.timesteps[step]), mx.array(manifest.sigmas[step])
            mx.eval(model.denoise(x, timestep, sigma, text, manifest.cfg_weight))
        seen[step] = {name: float64(array).reshape(-1, array.shape[-1]) for name, array in arrays.items()}
    return seen


def collected(model: DiffusionModel, data_dir: Any, **options: Any) -> dict[str, LayerActivations]:
    points = tap_points(model.transformer, TapSelection(kind=TapKind.LINEAR))
    return collect(model, data_dir, [0, 1], STEPS, points, CollectSettings(**options))


def test_collected_statistics_of_every_layer_equal_numpys_on_what_went_by(
    model: DiffusionModel, data_dir: Any, seen: dict[int, dict[str, NDArray[np.float64]]]
) -> None:
    layers = collected(model, data_dir, batch_size=2, histogram_rows=None)
    assert set(layers) == set(seen[0])
    covered = {name for layer in layers.values() for name in layer.point.names}
    assert covered == set(linear_layers(model.transformer))
    for name, layer in layers.items():
        assert list(layer.steps) == list(STEPS)
        assert layer.dtype == "float32"
        for step in STEPS:
            check_statistics(layer.steps[step], seen[step][name], "float32")
        check_statistics(pooled(layer), np.concatenate([seen[step][name] for step in STEPS]), "float32")
        check_statistics(
            merge_all([layer.steps[0], layer.steps[3]]),
            np.concatenate([seen[step][name] for step in (0, 3)]),
            "float32",
        )


def test_the_batch_size_of_collection_changes_nothing_but_rounding(
    model: DiffusionModel, data_dir: Any, seen: dict[int, dict[str, NDArray[np.float64]]]
) -> None:
    for name, layer in collected(model, data_dir, batch_size=1, histogram_rows=None).items():
        values = np.concatenate([seen[step][name] for step in STEPS])
        statistics, spread = pooled(layer), values.std()
        assert statistics.count.sum() == values.size
        np.testing.assert_allclose(statistics.minimum, values.min(axis=0), rtol=1e-3, atol=1e-3 * spread)
        np.testing.assert_allclose(statistics.mean, values.mean(axis=0), rtol=1e-4, atol=1e-4 * spread)


def test_collection_is_the_same_every_time(model: DiffusionModel, data_dir: Any) -> None:
    first, again = (collected(model, data_dir, batch_size=2, histogram_rows=16, seed=3) for _ in range(2))
    for name in first:
        one, two = pooled(first[name]), pooled(again[name])
        assert np.array_equal(one.histogram.keys, two.histogram.keys)
        assert np.array_equal(one.histogram.counts, two.histogram.counts)
        assert np.array_equal(one.mean, two.mean)
        assert np.array_equal(one.m2, two.m2)


def test_a_layer_that_overflows_is_counted_and_the_others_are_unharmed(
    model: DiffusionModel, data_dir: Any, manifest: Manifest, text: Conditioning
) -> None:
    states = [read_state(data_dir, manifest, image, 3) for image in (0, 1)]
    x = np.stack(states).astype(np.float32)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = np.inf, np.nan
    points = tap_points(model.transformer, TapSelection(include=["x_embedder", "context_embedder", "t_embedder.0"]))
    observed = observe(model, mx.array(x), text, manifest, 3, points, 1, 0.0)
    statistics = observed["x_embedder"][2]
    doubled = np.concatenate([x, x]).reshape(-1, x.shape[-1]).astype(np.float64)
    assert (statistics.nan, statistics.inf) == (2, 2), "one each in the conditional and the unconditional half"
    finite = np.where(np.isfinite(doubled), doubled, np.nan)
    np.testing.assert_allclose(statistics.maximum, np.nanmax(finite, axis=0))
    np.testing.assert_allclose(statistics.mean, np.nanmean(finite, axis=0), atol=1e-5)
    assert np.isfinite(list(statistics.percentiles().values())).all()
    for name in ("context_embedder", "t_embedder.0"):
        assert (observed[name][2].nan, observed[name][2].inf) == (0, 0)
        assert np.isfinite(observed[name][2].mean).all()


def test_streams_and_short_blocks_are_sampled_at_one_rate(model: DiffusionModel, data_dir: Any) -> None:
    """Or a merged histogram would weigh the text as heavily as the image, and the last image as several others."""
    points = tap_points(model.transformer, TapSelection(kind=TapKind.BLOCK, include=["mm_block_0"]))
    settings = CollectSettings(batch_size=2, histogram_rows=50)
    alone, together = (collect(model, data_dir, ids, STEPS, points, settings) for ids in ([2], [0, 1, 2]))
    for step in STEPS:
        totals = {name: layer.steps[step].histogram.total for name, layer in together.items()}
        assert totals["mm_block_0.image"] / totals["mm_block_0.text"] == pytest.approx(64 / 16, rel=0.15)
        share = alone["mm_block_0"].steps[step].histogram.total / totals["mm_block_0"]
        assert share == pytest.approx(1 / 3, rel=0.1)
