"""What observes forwards, in plain MLX operations, against float64 NumPy; and what it has seen, merged."""

from collections.abc import Sequence
from typing import Any

from calib.activations import observer_mlx as plain
from calib.activations.histogram import BINS, Histogram
from calib.activations.observer import TapResult
from calib.activations.observer_mlx import PICKED, MlxObserver, first_sampled, pick_stride

import mlx.core as mx
import numpy as np
import pytest
from helpers import MLX_DTYPES, check_statistics, float64, name_of
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from watching import by_row, watch

#: A user would see it among calib's own lines.
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=["host counts", "device counts"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the host counts sampled rows; the way a GPU goes is gone on the CPU as well."""
    monkeypatch.setattr(plain, "on_gpu", lambda: request.param == "device counts")


def array(*shape: int, dtype: str = "float32", seed: int = 0, mean: float = 0.5) -> mx.array:
    return mx.array((mean + np.random.RandomState(seed).randn(*shape)).astype(np.float32)).astype(MLX_DTYPES[dtype])


def bits_of(x: mx.array) -> NDArray[Any]:
    """Bit patterns, of a float32 the upper half, (rows · tokens, channels)."""
    wide = np.array(x).view(np.uint32) >> 16 if x.dtype == mx.float32 else np.array(x.view(mx.uint16))
    return wide.reshape(-1, wide.shape[-1])


def check_seen(seen: TapResult, arrays: Sequence[mx.array]) -> None:
    """``seen`` is of ``arrays``, one a forward, every row of which entered the histogram."""
    parts = [by_row(x) for x in arrays]
    assert seen.dtype == name_of(arrays[0])
    check_statistics(seen.statistics, np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]), seen.dtype)
    check_ranges(seen.ranges, parts, seen.dtype)


def check_ranges(ranges: NDArray[np.float64], parts: Sequence[NDArray[np.float64]], dtype: str) -> None:
    """Extremes of each row are exact; percentiles those of values evenly picked, all of a row's where they are few."""
    rows = [row for part in parts for row in part]
    assert ranges.shape == (len(rows), 4)
    np.testing.assert_array_equal(ranges[:, 0], [row.min() for row in rows])
    np.testing.assert_array_equal(ranges[:, 1], [row.max() for row in rows])
    for found, row in zip(ranges[:, 2:], rows, strict=True):
        picked = row.ravel()[:: pick_stride(row.size, row.shape[-1])]
        assert len(picked) == row.size or PICKED / 2 < len(picked) <= 2 * PICKED
        expected = np.percentile(picked, (1, 99))
        # float32 is known by its upper half; interpolation lies between two such
        tolerance = 2**-8 * np.abs(picked).max() if dtype == "float32" else 1e-12
        assert np.all(np.abs(found - expected) <= tolerance + 1e-6 * np.abs(expected))


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], x: NDArray[np.float32], dtype: str) -> mx.array:
    """``x`` of ``shape`` (rows, tokens, channels) as it may lie in memory: in one piece, or part of a larger array."""
    rows, tokens, channels = shape
    layout = draw(st.sampled_from(["whole", "tokens", "channels", "turned", "four axes"]))
    whole = mx.array(x).astype(MLX_DTYPES[dtype])
    other = mx.full((rows, 3, channels), 1e4, dtype=whole.dtype)
    if layout == "tokens":
        return mx.concatenate([other, whole, other], axis=1)[:, 3 : 3 + tokens]
    if layout == "channels":
        return mx.concatenate([whole, whole], axis=2)[..., :channels]
    if layout == "turned":
        return mx.contiguous(whole.transpose(0, 2, 1)).transpose(0, 2, 1)
    return whole[:, :, None] if layout == "four axes" else whole


@st.composite
def forwards(draw: st.DrawFn) -> list[dict[str, mx.array]]:
    """One to three forwards of a few taps, the last of fewer rows; channels have means and spreads of their own."""
    random = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    rows = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(lambda r: sorted(r, reverse=True)))
    found: list[dict[str, mx.array]] = [{} for _ in rows]
    for tap in range(draw(st.integers(1, 3))):
        tokens, channels = draw(st.sampled_from([1, 2, 33, 64, 65, 150])), draw(st.integers(1, 30))
        dtype = draw(st.sampled_from(list(MLX_DTYPES)))
        spread = 10.0 ** random.uniform(-2, 2, channels)
        mean = spread * random.uniform(-30, 30, channels)
        for forward, own in zip(found, rows, strict=True):
            x = (mean + spread * random.randn(own, tokens, channels)).astype(np.float32)
            forward[f"tap {tap}"] = draw(layouts((own, tokens, channels), x, dtype))
    return found


@given(forwards=forwards(), finite_only=st.booleans())
def test_any_forwards(forwards: list[dict[str, mx.array]], finite_only: bool) -> None:
    observer = MlxObserver(1, finite_only)
    seen = watch(observer, forwards)
    assert observer.sound
    assert list(seen) == list(forwards[0])
    for name in seen:
        check_seen(seen[name], [forward[name] for forward in forwards])


@pytest.mark.parametrize("dtype", list(MLX_DTYPES))
def test_parts_of_a_batch(dtype: str) -> None:
    whole = [{"a": array(5, 40, 24, dtype=dtype, seed=i), "b": array(5, 1, 8, dtype=dtype, seed=i)} for i in range(3)]
    cuts = [[2], [1, 3], []]
    parts = [
        [{name: x[first:last] for name, x in forward.items()} for first, last in zip([0, *cut], [*cut, 5], strict=True)]
        for forward, cut in zip(whole, cuts, strict=True)
    ]
    seen = watch(MlxObserver(1), parts)
    for name in ("a", "b"):
        check_seen(seen[name], [forward[name] for forward in whole])


@pytest.mark.parametrize("dtype", list(MLX_DTYPES))
def test_sampled_rows(device: None, dtype: str) -> None:
    arrays = [array(4, 50, 1, 12, dtype=dtype, seed=i) for i in range(4)]
    phases, stride = (0, 65_535, 30_000), 7
    seen = watch(MlxObserver(stride), [{"x": x, "row": x[:, :1]} for x in arrays], phases)
    counts, alone = np.zeros(BINS, int), np.zeros(BINS, int)
    for number, x in enumerate(arrays):
        bits = bits_of(x)
        chosen = bits[first_sampled(len(bits), stride, phases[number % 3]) :: stride]
        counts += np.bincount(chosen.ravel(), minlength=BINS)
        alone += np.bincount(bits.reshape(4, 50, 12)[:, 0].ravel(), minlength=BINS)
    for name, expected in (("x", counts), ("row", alone)):
        histogram = Histogram.from_counts(expected, dtype)
        assert np.array_equal(seen[name].statistics.histogram.keys, histogram.keys)
        assert np.array_equal(seen[name].statistics.histogram.counts, histogram.counts)
        assert seen[name].statistics.histogram.counts.dtype == np.uint64
    assert seen["x"].statistics.count.tolist() == [800] * 12


def test_leaving_the_device_early(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = [{"a": array(3, 60, 20, seed=i), "b": array(3, 8, 16, dtype="float16", seed=i)} for i in range(5)]
    expected = watch(MlxObserver(3), forwards, (1000, 50_000))
    for most in ("MOST_PENDING", "MOST_PENDING_GPU", "MOST_COUNTS"):
        monkeypatch.setattr(plain, most, 1)
    found = watch(MlxObserver(3), forwards, (1000, 50_000))
    for name in expected:
        for field in ("minimum", "maximum", "count", "mean", "std"):
            one, other = (getattr(seen[name].statistics, field) for seen in (found, expected))
            assert np.array_equal(one, other), field
        assert np.array_equal(found[name].ranges, expected[name].ranges)
        histograms = found[name].statistics.histogram, expected[name].statistics.histogram
        assert np.array_equal(histograms[0].counts, histograms[1].counts)


def test_activations_are_passed_on(device: None) -> None:
    observer, x = MlxObserver(1), array(2, 30, 16)
    observer.begin(0)
    observer.see("x", x)
    tied = observer.tie(x)
    assert np.array_equal(np.array(tied), np.array(x))
    assert np.array_equal(np.array(observer.tie(x)), np.array(x)), "nothing new to wait for"


@pytest.mark.parametrize("dtype", list(MLX_DTYPES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value(dtype: str, bad: float) -> None:
    values = [np.random.RandomState(i).randn(2, 70, 9).astype(np.float32) for i in range(3)]
    values[1][1, 66, 4] = bad
    forwards = [{"good": array(2, 5, 8, dtype=dtype), "x": mx.array(v).astype(MLX_DTYPES[dtype])} for v in values]
    observer = MlxObserver(1)
    watch(observer, forwards)
    assert not observer.sound
    careful = MlxObserver(1, finite_only=True)
    seen = watch(careful, forwards)
    assert careful.sound
    assert (seen["x"].statistics.nan, seen["x"].statistics.inf) == ((1, 0) if np.isnan(bad) else (0, 1))
    assert seen["x"].statistics.count.tolist() == [420] * 4 + [419] + [420] * 4
    assert (seen["good"].statistics.nan, seen["good"].statistics.inf) == (0, 0)
    parts = [by_row(forward["x"]) for forward in forwards]
    parts[1][1, 66, 4] = np.nan
    pooled = np.concatenate([part.reshape(-1, 9) for part in parts])
    np.testing.assert_allclose(seen["x"].statistics.mean, np.nanmean(pooled, axis=0), atol=1e-6)
    np.testing.assert_allclose(seen["x"].statistics.std, np.nanstd(pooled, axis=0), rtol=1e-5)
    rows = np.concatenate(parts)
    np.testing.assert_array_equal(seen["x"].ranges[:, 0], np.nanmin(rows, axis=(1, 2)))
    np.testing.assert_array_equal(seen["x"].ranges[:, 1], np.nanmax(rows, axis=(1, 2)))
    assert np.isfinite(seen["x"].ranges).all()


def test_a_tap_with_nothing_finite() -> None:
    nothing = mx.full((2, 5, 4), float("nan"))
    observer = MlxObserver(1, finite_only=True)
    seen = watch(observer, [{"x": nothing, "y": array(2, 5, 4)}])
    assert seen["x"].statistics.count.tolist() == [0] * 4
    assert seen["x"].statistics.nan == 40
    assert np.isnan(seen["x"].ranges[:, 2:]).all()
    check_seen(seen["y"], [array(2, 5, 4)])
    merged = seen["x"].merge(seen["y"])
    assert merged.statistics.minimum.tolist() == seen["y"].statistics.minimum.tolist()
    assert merged.statistics.mean.tolist() == seen["y"].statistics.mean.tolist()


def test_values_too_large_to_be_squared() -> None:
    x = mx.array(np.random.RandomState(0).uniform(-1e30, 1e30, (2, 60, 5)).astype(np.float32))
    observer = MlxObserver(1)
    watch(observer, [{"x": x}])
    assert not observer.sound
    seen = watch(MlxObserver(1, finite_only=True), [{"x": x}])["x"]
    check_statistics(seen.statistics, float64(x).reshape(-1, 5), "float32")


@given(data=st.data())
def test_merging(data: st.DataObject) -> None:
    arrays = [array(data.draw(st.integers(1, 3)), 20, 6, seed=i) for i in range(data.draw(st.integers(2, 5)))]
    each = [watch(MlxObserver(1), [{"x": x}])["x"] for x in arrays]
    cut = data.draw(st.integers(1, len(each) - 1))

    def together(parts: Sequence[TapResult]) -> TapResult:
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merge(part)
        return merged

    merged = together(each[:cut]).merge(together(each[cut:]))
    whole = watch(MlxObserver(1), [{"x": x} for x in arrays])["x"]
    assert np.array_equal(merged.ranges, whole.ranges)
    for field in ("minimum", "maximum", "count", "mean", "std"):
        assert np.array_equal(getattr(merged.statistics, field), getattr(whole.statistics, field)), field
    check_seen(merged, arrays)


@given(size=st.integers(1, 5_000_000), channels=st.sampled_from([1, 2, 8, 64, 96, 1000, 1536, 6144]))
def test_picked_values(size: int, channels: int) -> None:
    size = max(1, size // channels) * channels
    stride = pick_stride(size, channels)
    picked = np.arange(0, size, stride)
    assert len(picked) == size or PICKED / 2 < len(picked) <= 2 * PICKED
    if len(picked) >= channels:
        times = np.bincount(picked % channels, minlength=channels)
        assert times.max() - times.min() <= 1
