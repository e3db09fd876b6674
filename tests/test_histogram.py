"""Histograms by bit pattern: keys in the order of values, exact percentiles, merging by addition."""

from typing import Any

from calib.activations.bits import count_bits, top_bits
from calib.activations.histogram import BINS, Histogram, key_values, merge_histograms, ordered_keys

import mlx.core as mx
import numpy as np
import pytest
from helpers import MLX_DTYPES, SMALLEST_NORMAL, from_bits, values_of_bits
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

DTYPES = ("float16", "bfloat16", "float32")
SIXTEEN_BIT = ("float16", "bfloat16")
PERCENTS = (0, 0.1, 1, 5, 25, 50, 75, 95, 99, 99.9, 100)

#: ±0, the smallest and largest subnormals, 1, the largest finite number, infinity and NaNs, of each type.
SPECIAL = {
    "float16": [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF],
    "bfloat16": [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x3F80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF],
    "float32": [
        *(0, 1 << 31, 1, 0x80000001, 0x7FFFFF, 0x3F800000, 0x7F7FFFFF, 0xFF7FFFFF),
        *(0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF),
    ],
}


@st.composite
def bit_patterns(draw: st.DrawFn, dtype: str, finite: bool = False) -> NDArray[Any]:
    """Bit patterns of any floats: zeros, subnormals, infinities and NaNs among them, few or many repeated."""
    width = 32 if dtype == "float32" else 16
    some = draw(st.lists(st.integers(0, 2**width - 1) | st.sampled_from(SPECIAL[dtype]), min_size=1, max_size=60))
    times = draw(st.lists(st.integers(1, 500), min_size=len(some), max_size=len(some)))
    bits = np.repeat(np.array(some, np.uint64), times)
    if finite:
        bits = bits[np.isfinite(values_of_bits(bits, dtype))]
        bits = bits if len(bits) else np.zeros(1, np.uint64)
    return bits


any_dtype = st.sampled_from(DTYPES).flatmap(lambda dtype: st.tuples(st.just(dtype), bit_patterns(dtype)))
finite_16 = st.sampled_from(SIXTEEN_BIT).flatmap(lambda dtype: st.tuples(st.just(dtype), bit_patterns(dtype, True)))


def histogram_of(bits: NDArray[Any], dtype: str) -> Histogram:
    return counted(from_bits(bits, dtype), dtype)


def counted(x: mx.array, dtype: str) -> Histogram:
    """Counted on the device."""
    return Histogram.from_counts(np.array(count_bits(top_bits(x))), dtype)


def keys_of(bits: NDArray[Any], dtype: str) -> NDArray[np.uint16]:
    """The keys of the device's values."""
    return ordered_keys(np.array(top_bits(from_bits(bits, dtype))))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_16_bit_keys_are_in_order(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32)
    keys, values = keys_of(bits, dtype), values_of_bits(bits, dtype)
    assert keys.dtype == np.uint16
    assert np.array_equal(np.sort(keys), bits)
    by_key = values[np.argsort(keys)]
    numbers = by_key[~np.isnan(by_key)]
    assert np.all(np.diff(numbers[np.isfinite(numbers)]) >= 0)
    assert numbers[0] == -np.inf
    assert numbers[-1] == np.inf
    assert np.sum(np.diff(numbers) == 0) == 1, "only -0 and 0 are equal"


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_16_bit_keys_give_values_back(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32)
    keys = keys_of(bits, dtype)
    found, values = key_values(keys, dtype), values_of_bits(bits, dtype)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, values)
    assert np.array_equal(np.signbit(found[~np.isnan(found)]), np.signbit(values[~np.isnan(values)]))


@given(bits=bit_patterns("float32"))
def test_float32_keys_are_in_order(bits: NDArray[Any]) -> None:
    keys, values = keys_of(bits, "float32"), values_of_bits(bits, "float32")
    numbers = ~np.isnan(values)
    order = np.argsort(values[numbers], kind="stable")
    sorted_keys, sorted_values = keys[numbers][order].astype(np.int64), values[numbers][order]
    larger = sorted_values[1:] > sorted_values[:-1]
    assert np.all(np.diff(sorted_keys)[larger] >= 0)


@given(bits=bit_patterns("float32"))
def test_float32_keys_give_values_back(bits: NDArray[Any]) -> None:
    keys = keys_of(bits, "float32")
    found, values = key_values(keys, "float32"), values_of_bits(bits, "float32")
    finite = np.isfinite(values)
    assert np.array_equal(np.isfinite(found), finite)
    normal = finite & (np.abs(values) >= SMALLEST_NORMAL)
    assert np.all(np.abs(found - values)[normal] <= 2**-8 * np.abs(values)[normal])
    assert np.all(np.abs(found - values)[finite & ~normal] <= SMALLEST_NORMAL)
    assert np.all(found[values == 0] == 0)


@given(case=any_dtype)
def test_counts(case: tuple[str, NDArray[Any]]) -> None:
    dtype, bits = case
    histogram, values = histogram_of(bits, dtype), values_of_bits(bits, dtype)
    assert histogram.keys.dtype == np.uint16
    assert histogram.counts.dtype == np.uint64
    assert histogram.total == np.isfinite(values).sum()
    assert np.all(np.diff(histogram.keys.astype(np.int64)) > 0)
    assert np.all(histogram.counts > 0)
    assert np.all(np.isfinite(histogram.values()))
    if dtype != "float32":
        distinct, counts = np.unique(bits[np.isfinite(values)], return_counts=True)
        expected = dict(zip(keys_of(distinct, dtype).tolist(), counts.tolist(), strict=True))
        assert dict(zip(histogram.keys.tolist(), histogram.counts.tolist(), strict=True)) == expected


@given(case=finite_16)
@example(case=("float16", np.array([0x7BFF, 0xFBFF])))
def test_16_bit_percentiles(case: tuple[str, NDArray[Any]]) -> None:
    dtype, bits = case
    found = histogram_of(bits, dtype).percentiles(PERCENTS)
    values = values_of_bits(bits, dtype)
    expected = np.percentile(values, PERCENTS)
    # Interpolation rounds in float64, relative to the two values between which it lies.
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13 * float(np.abs(values).max()))


@given(bits=bit_patterns("float32", finite=True))
def test_float32_percentiles(bits: NDArray[Any]) -> None:
    found = histogram_of(bits, "float32").percentiles(PERCENTS)
    values = values_of_bits(bits, "float32")
    below, above = (np.percentile(values, PERCENTS, method=side) for side in ("lower", "higher"))
    allowed = 0.004 * np.maximum(np.abs(below), np.abs(above)) + SMALLEST_NORMAL
    assert np.all(np.abs(found - np.percentile(values, PERCENTS)) <= allowed)


@given(case=any_dtype, data=st.data())
def test_merging(case: tuple[str, NDArray[Any]], data: st.DataObject) -> None:
    dtype, bits = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(bits)), max_size=4)))
    parts = [histogram_of(part, dtype) for part in np.split(bits, cuts) if len(part)]
    merged = Histogram(dtype)
    for part in data.draw(st.permutations(parts)):
        merged = merged.merge(part)
    whole = histogram_of(bits, dtype)
    assert np.array_equal(merged.keys, whole.keys)
    assert np.array_equal(merged.counts, whole.counts)
    assert merged.keys.dtype == np.uint16
    assert merged.counts.dtype == np.uint64
    at_once = merge_histograms(parts)
    assert np.array_equal(at_once.keys, whole.keys)
    assert np.array_equal(at_once.counts, whole.counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_views(dtype: str) -> None:
    """Those of a float32 are every second half of its words, also where it does not lie in one piece."""
    bits = np.random.RandomState(0).randint(0, 2**32, (3, 8, 10), dtype=np.uint64)
    bits = bits >> (32 - (32 if dtype == "float32" else 16))
    x, wanted = from_bits(bits, dtype), bits >> (16 if dtype == "float32" else 0)
    views = [(slice(None),), (slice(None), slice(1, 5)), (slice(None), slice(None, None, 3), slice(2, None))]
    for view in views:
        assert np.array_equal(np.array(top_bits(x[view])), wanted[view])
        counts = np.bincount(wanted[view].ravel(), minlength=BINS)
        assert np.array_equal(np.array(count_bits(top_bits(x[view]))), counts)
    turned = np.array(top_bits(x.transpose(0, 2, 1)))
    assert np.array_equal(turned, wanted.transpose(0, 2, 1))


def test_counts_beyond_32_bits() -> None:
    large = Histogram("float16", np.array([7], np.uint16), np.array([2**40], np.uint64))
    assert large.merge(large).counts.tolist() == [2**41]


def test_types_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"float16.*bfloat16"):
        Histogram("float16").merge(Histogram("bfloat16"))


def test_empty() -> None:
    empty = histogram_of(np.array([0x7E00, 0x7C00]), "float16")
    assert empty.total == 0
    assert np.isnan(empty.percentiles([1, 50])).all()


@given(case=finite_16)
def test_kurtosis(case: tuple[str, NDArray[Any]]) -> None:
    dtype, bits = case
    values = values_of_bits(bits, dtype)
    values = values[np.abs(values) <= 1e30]
    if len(values) == 0:
        values = np.zeros(1)
    x = mx.array(values.astype(np.float32)).astype(MLX_DTYPES[dtype])
    found = counted(x, dtype).kurtosis()
    centred = values / max(np.abs(values).max(), 1e-30)
    centred = centred - centred.mean()
    variance = np.mean(centred**2)
    if variance > 1e-20:
        assert found == pytest.approx(np.mean(centred**4) / variance**2, rel=1e-6)
    else:
        assert np.isfinite(found)


def test_kurtosis_of_known_distributions() -> None:
    normal = np.random.RandomState(0).randn(1 << 18).astype(np.float16)
    assert counted(mx.array(normal), "float16").kurtosis() == pytest.approx(3, rel=0.03)
    assert histogram_of(np.array([0x3C00] * 9), "float16").kurtosis() == 0
    two = histogram_of(np.array([0x3C00, 0xBC00]), "float16")
    assert two.kurtosis() == pytest.approx(1)
