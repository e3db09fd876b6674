"""Σx and Σx² in 106 bits: exact rational arithmetic, rounded, whatever the split and the order of merging."""

import math
from collections.abc import Sequence
from fractions import Fraction

from calib.activations import double_double as doubled
from calib.activations.statistics import Moments

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

#: Of a doubled number; four or five units of 2^-106.
DOUBLED = Fraction(1, 2**103)

#: Magnitudes between which no product of two overflows and no error of one underflows.
numbers = st.floats(1e-100, 1e100) | st.floats(-1e100, -1e-100) | st.just(0.0)


def one(x: float) -> NDArray[np.float64]:
    return np.array([x])


def exactly(pair: tuple[NDArray[np.float64], NDArray[np.float64]]) -> Fraction:
    """What a doubled number of one channel stands for."""
    return Fraction(float(pair[0][0])) + Fraction(float(pair[1][0]))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A doubled number: the second part is less than half the last bit of the first."""
    high = draw(numbers)
    return one(high), one(math.ulp(high) * draw(st.floats(-0.5, 0.5)) if high else 0.0)


@given(a=numbers, b=numbers)
@example(a=1.0, b=2.0**-53)
@example(a=1e100, b=-1e100)
def test_exact_sums_and_products(a: float, b: float) -> None:
    assert exactly(doubled.two_sum(one(a), one(b))) == Fraction(a) + Fraction(b)
    assert doubled.two_sum(one(a), one(b))[0][0] == a + b
    assert exactly(doubled.two_product(one(a), one(b))) == Fraction(a) * Fraction(b)
    assert doubled.two_product(one(a), one(b))[0][0] == a * b


@settings(max_examples=200)
@given(a=pairs(), b=pairs(), by=st.integers(1, 2**40))
def test_a_hundred_bits(
    a: tuple[NDArray[np.float64], NDArray[np.float64]], b: tuple[NDArray[np.float64], NDArray[np.float64]], by: int
) -> None:
    for found, expected in (
        (doubled.add(a, b), exactly(a) + exactly(b)),
        (doubled.multiply(a, b), exactly(a) * exactly(b)),
        (doubled.divide(a, one(float(by))), exactly(a) / by),
    ):
        assert abs(exactly(found) - expected) <= DOUBLED * abs(expected)
        assert found[0][0] + found[1][0] == found[0][0], "the first part is the whole, rounded"


#: One channel's values as they come from a device: how many, a shift, and the sums of what differs from it.
Part = tuple[int, float, float, float]


@st.composite
def channels(draw: st.DrawFn) -> list[list[Part]]:
    """Parts of several channels, of any magnitude; the mean up to a million times the spread."""
    random = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    parts = draw(st.integers(1, 12))
    found = []
    for _ in range(draw(st.integers(1, 6))):
        spread = 10.0 ** random.uniform(-15, 15)
        mean = spread * random.choice([0.0, 1.0, -1.0]) * 10.0 ** random.uniform(-2, 6)
        channel = []
        for _ in range(parts):
            x = (mean + spread * random.randn(random.randint(1, 200))).astype(np.float32)
            shift = np.float32(x[: 1 + len(x) // 2].mean())
            d = x - shift
            channel.append((len(x), float(shift), float(d.sum()), float(np.square(d).sum())))
        found.append(channel)
    return found


def moments_of(channels: Sequence[Sequence[Part]], number: int) -> Moments:
    columns = zip(*(channel[number] for channel in channels), strict=True)
    return Moments.shifted(*(np.array(column, np.float64) for column in columns))


def merged(parts: Sequence[Moments], order: Sequence[int]) -> Moments:
    """In twos, neighbours of ``order`` first, as parts of parts would be."""
    left = [parts[i] for i in order]
    while len(left) > 1:
        left = [a.merge(b) for a, b in zip(left[::2], left[1::2], strict=False)] + left[len(left) & ~1 :]
    return left[0]


@settings(max_examples=100)
@given(channels=channels(), data=st.data())
def test_any_order_of_merging(channels: list[list[Part]], data: st.DataObject) -> None:
    count = np.array([sum(part[0] for part in channel) for channel in channels], np.uint64)
    parts = [moments_of(channels, i) for i in range(len(channels[0]))]
    total = [sum(n * Fraction(s) + Fraction(f) for n, s, f, _ in channel) for channel in channels]
    squares = [
        sum(Fraction(q) + Fraction(s) * (2 * Fraction(f) + n * Fraction(s)) for n, s, f, q in channel)
        for channel in channels
    ]
    means = [float(t / int(n)) for t, n in zip(total, count, strict=True)]
    m2 = [float(q - t * t / int(n)) for t, q, n in zip(total, squares, count, strict=True)]
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = one_by_one.merge(part)
    orders = [data.draw(st.permutations(range(len(parts)))) for _ in range(3)]
    for found in (one_by_one, *(merged(parts, order) for order in orders)):
        assert found.mean(count).tolist() == means
        assert found.m2(count).tolist() == m2


@given(channels=channels(), exponent=st.integers(-60, 60))
def test_scales(channels: list[list[Part]], exponent: int) -> None:
    """A scale, as summaries of very large or spoiled values have it, is undone exactly."""
    count = np.array([channel[0][0] for channel in channels], np.float64)
    plain = moments_of(channels, 0)
    rows = [np.array(column) for column in zip(*(channel[0] for channel in channels), strict=True)]
    scale = np.full(len(channels), 2.0**exponent)
    scaled = Moments.shifted(count, *rows[1:], scale)
    counted = count.astype(np.uint64)
    assert np.array_equal(scaled.mean(counted), plain.mean(counted) * scale)
    assert np.array_equal(scaled.m2(counted), plain.m2(counted) * scale**2)


@pytest.mark.parametrize("value", [0.1, -3e4, 1e-20, 65504.0])
def test_constants(value: float) -> None:
    shift, nothing = np.array([np.float32(value)], np.float64), np.zeros(1)
    whole = part = Moments.shifted(np.array([333.0]), shift, nothing, nothing)
    for _ in range(999):
        whole = whole.merge(part)
    count = np.array([333_000], np.uint64)
    assert whole.mean(count) == shift
    assert whole.m2(count) == 0


def test_the_smallest_spread() -> None:
    """Of 2^30 values one differs by its last bit."""
    zero, count = np.zeros(1), 2**30
    many = Moments.shifted(np.array([count - 1.0]), np.ones(1), zero, zero)
    other = Moments.shifted(np.ones(1), np.array([1 + 2.0**-23]), zero, zero)
    (found,) = many.merge(other).m2(np.array([count], np.uint64))
    assert found == pytest.approx(2.0**-46, rel=1e-6)


@given(channels=channels())
def test_sums_of_mean_and_deviation(channels: list[list[Part]]) -> None:
    """As files of version 1 have them."""
    count = np.array([channel[0][0] for channel in channels], np.uint64)
    moments = moments_of(channels, 0)
    mean, std = moments.mean(count), np.sqrt(moments.m2(count) / count)
    again = Moments.of(count, mean, std)
    assert np.array_equal(again.mean(count), mean)
    wide = count.astype(np.float64)
    assert np.array_equal(again.sums, Moments.shifted(wide, mean, np.zeros_like(mean), std**2 * wide).sums)
    np.testing.assert_allclose(np.sqrt(again.m2(count) / count), std, rtol=1e-15, atol=0)


def test_nothing() -> None:
    nothing, count = Moments.zero(3), np.array([0, 0, 0], np.uint64)
    assert nothing.mean(count).tolist() == nothing.m2(count).tolist() == [0, 0, 0]
    some = Moments.shifted(np.array([5.0, 6.0, 7.0]), np.array([1.0, 2.0, 3.0]), np.zeros(3), np.ones(3))
    assert np.array_equal(some.merge(nothing).sums, some.sums)
    assert np.array_equal(nothing.merge(some).sums, some.sums)
