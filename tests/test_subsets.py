"""Subsets: which images of a dataset are collected."""

from collections.abc import Callable

from calib.dataset import subsets

import numpy as np
import pytest
from helpers import check_config_error
from hypothesis import given
from hypothesis import strategies as st

IDS = st.lists(st.integers(0, 10_000), min_size=1, max_size=200, unique=True).map(sorted)


def test_images_are_exactly() -> None:
    ids = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert subsets.first(ids, 3) == [0, 1, 2]
    assert subsets.stride(ids, 4) == [0, 3, 6, 9]
    assert subsets.stride(ids, 1) == [0]
    assert subsets.random(ids, 10, seed=5) == ids
    assert subsets.from_list(ids, 10, ids=[7, 0, 7]) == [0, 7]


@given(ids=IDS, data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_every_subset_gives_that_many_distinct_ids_in_order(ids: list[int], data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, len(ids)))
    for chosen in (subsets.first(ids, count), subsets.stride(ids, count), subsets.random(ids, count, seed)):
        assert chosen == sorted(set(chosen))
        assert len(chosen) == count
        assert set(chosen) <= set(ids)
    assert subsets.random(ids, count, seed) == subsets.random(ids, count, seed)


@given(available=st.integers(2, 300), data=st.data())
def test_stride_is_evenly_spaced_with_both_ends(available: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, available))
    chosen = subsets.stride(range(available), count)
    assert (chosen[0], chosen[-1]) == (0, available - 1)
    gaps = np.diff(chosen)
    assert gaps.max() - gaps.min() <= 1


def test_random_subsets_differ_by_seed_and_cover_all_images() -> None:
    drawn = [subsets.random(range(20), 5, seed=seed) for seed in range(40)]
    assert len({tuple(chosen) for chosen in drawn}) > 30
    assert {image for chosen in drawn for image in chosen} == set(range(20))


@pytest.mark.parametrize(("available", "expected"), [(1, 1), (10, 10), (100, 100), (101, 100), (5000, 100)])
def test_the_default_is_100_images_or_all_if_fewer(available: int, expected: int) -> None:
    assert subsets.resolve_count(None, available) == expected


@given(available=st.integers(1, 500), data=st.data())
def test_a_possible_request_is_met(available: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, available))
    assert subsets.resolve_count(count, available) == count


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: subsets.resolve_count(0, 10), ("subset.num_images=0", "1 to 10")),
        (lambda: subsets.resolve_count(-3, 10), ("subset.num_images=-3", "1 to 10")),
        (lambda: subsets.resolve_count(11, 10), ("subset.num_images=11", "1 to 10", "calib generate")),
        (lambda: subsets.from_list([0, 1], 2), ("subset.ids=[]", "at least one")),
        (lambda: subsets.from_list([0, 1], 2, ids=[0, 2]), ("subset.ids=2", "no such image", "2 images")),
        (lambda: subsets.from_list([0, 1], 2, ids=[-1]), ("subset.ids=-1", "no such image")),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(call: Callable[[], object], words: tuple[str, ...]) -> None:
    check_config_error(call, words)
