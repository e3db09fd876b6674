"""Timestep schedules: the exact steps of METHODS section 1, and what holds for every number of steps."""

from collections.abc import Callable, Sequence

from calib.dataset import timesteps

import numpy as np
import pytest
from helpers import check_config_error
from hypothesis import given, settings
from hypothesis import strategies as st

NUM_STEPS = st.integers(1, 120)
every_number = settings(max_examples=400)  # hypothesis stops when it has tried all 120


def test_key_of_50_steps_is_the_origins_list_of_17() -> None:
    expected = [0, 5, 10, 12, 15, 16, 19, 22, 25, 28, 31, 33, 37, 38, 43, 48, 50]
    assert timesteps.key(50) == expected
    assert len(expected) == 17


@pytest.mark.parametrize(
    ("schedule", "num_steps", "expected"),
    [
        (timesteps.key, 1, [0, 1]),
        (timesteps.key, 4, [0, 1, 2, 3, 4]),
        (timesteps.key, 10, [0, 2, 3, 5, 6, 7, 10]),
        (timesteps.all_states, 4, [0, 1, 2, 3, 4]),
        (timesteps.quarters, 4, [0, 1, 2, 3, 4]),
        (timesteps.quarters, 10, [0, 2, 5, 7, 10]),
        (timesteps.quarters, 50, [0, 12, 25, 37, 50]),
        (timesteps.stride, 10, [0, 3, 6, 9]),
        (timesteps.taqdit, 10, list(range(10))),
        (timesteps.taqdit, 25, list(range(25))),
        (
            timesteps.taqdit,
            100,
            [0, 4, 8, 12, 16, 20, 24, 28, 33, 37, 41, 45, 49, 53, 57, 61, 66, 70, 74, 78, 82, 86, 90, 94, 99],
        ),
        (timesteps.phases, 50, [0, 5, 9, 14, 15, 17, 20, 22, 24, 27, 29, 32, 34, 35, 40, 45, 50]),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (str(value) if isinstance(value, int) else "steps"),
)
def test_steps_are_exactly(schedule: Callable[[int], list[int]], num_steps: int, expected: list[int]) -> None:
    assert schedule(num_steps) == expected


def test_parameters_change_the_steps() -> None:
    assert timesteps.uniform(50, count=6) == [0, 10, 20, 30, 40, 50]
    assert timesteps.uniform(50, count=51) == list(range(51))
    assert timesteps.uniform(50, count=2) == [0, 50]
    assert timesteps.stride(10, every=5) == [0, 5, 10]
    assert timesteps.stride(10, every=11) == [0]
    assert timesteps.phases(50, early=1, mid=0, late=2) == [0, 35, 50]
    assert timesteps.from_list(50, steps=[7, 0]) == [7, 0]


@every_number
@given(num_steps=NUM_STEPS)
def test_schedules_without_parameters_are_sorted_distinct_states(num_steps: int) -> None:
    for schedule in (timesteps.key, timesteps.all_states, timesteps.quarters, timesteps.taqdit, timesteps.stride):
        steps = schedule(num_steps)
        assert steps == sorted(set(steps))
        assert set(steps) <= set(range(num_steps + 1))


@every_number
@given(num_steps=NUM_STEPS)
def test_key_and_quarters_have_both_ends_and_the_quarters(num_steps: int) -> None:
    wanted = {0, num_steps // 4, num_steps // 2, 3 * num_steps // 4, num_steps}
    assert wanted <= set(timesteps.key(num_steps))
    assert wanted == set(timesteps.quarters(num_steps))


@every_number
@given(num_steps=NUM_STEPS)
def test_taqdit_is_the_floor_of_an_exact_linspace(num_steps: int) -> None:
    assert timesteps.taqdit(num_steps) == sorted({i * (num_steps - 1) // 24 for i in range(25)})


@given(num_steps=NUM_STEPS, data=st.data())
def test_uniform_has_count_states_evenly_spaced_with_both_ends(num_steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, num_steps + 1))
    steps = timesteps.uniform(num_steps, count=count)
    assert steps == sorted(set(steps))
    assert len(steps) == count
    assert (steps[0], steps[-1]) == (0, num_steps)
    gaps = np.diff(steps)
    assert gaps.max() - gaps.min() <= 1


@given(num_steps=NUM_STEPS, every=st.integers(1, 130))
def test_stride_is_every_so_many_from_0(num_steps: int, every: int) -> None:
    assert timesteps.stride(num_steps, every=every) == list(range(0, num_steps + 1, every))


@given(num_steps=NUM_STEPS, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_ndtc_draws_count_distinct_states_that_the_seed_decides(num_steps: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_steps + 1))
    steps = timesteps.ndtc(num_steps, count=count, seed=seed)
    assert steps == sorted(set(steps))
    assert len(steps) == count
    assert set(steps) <= set(range(num_steps + 1))
    assert steps == timesteps.ndtc(num_steps, count=count, seed=seed)


def test_ndtc_lies_towards_the_clean_end_and_differs_by_seed() -> None:
    drawn = [timesteps.ndtc(100, count=10, seed=seed) for seed in range(50)]
    assert len({tuple(steps) for steps in drawn}) == 50
    # n - t with t ~ N(40, 40²) clamped to 0 … 100: the mean is near 58, and distinct states spread a little.
    assert 50 < np.mean(drawn) < 66


def test_phases_of_50_steps_are_those_of_the_origin() -> None:
    assert timesteps.phase_bounds(50) == {"early": (0, 14), "mid": (15, 34), "late": (35, 50)}


@every_number
@given(num_steps=NUM_STEPS)
def test_phase_bounds_scale_and_cover_every_state_once(num_steps: int) -> None:
    bounds = timesteps.phase_bounds(num_steps)
    covered = [step for first, last in bounds.values() for step in range(first, last + 1)]
    assert covered == list(range(num_steps + 1))
    assert list(bounds) == ["early", "mid", "late"]
    assert abs(bounds["mid"][0] - 0.3 * num_steps) <= 0.5
    assert abs(bounds["late"][0] - 0.7 * num_steps) <= 0.5


@given(num_steps=NUM_STEPS, data=st.data())
def test_phases_take_so_many_evenly_within_each(num_steps: int, data: st.DataObject) -> None:
    bounds = timesteps.phase_bounds(num_steps)
    counts = {name: data.draw(st.integers(0, last - first + 1)) for name, (first, last) in bounds.items()}
    steps = timesteps.phases(num_steps, **counts)
    assert steps == sorted(set(steps))
    for name, (first, last) in bounds.items():
        within = [step for step in steps if first <= step <= last]
        assert len(within) == counts[name]
        if len(within) > 1:
            gaps = np.diff(within)
            assert (within[0], within[-1]) == (first, last)
            assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: timesteps.uniform(50, count=52), ("timestep_schedule.count=52", "2 to 51")),
        (lambda: timesteps.uniform(50, count=1), ("timestep_schedule.count=1", "2 to 51")),
        (lambda: timesteps.ndtc(50, count=0), ("timestep_schedule.count=0", "1 to 51")),
        (lambda: timesteps.ndtc(8), ("timestep_schedule.count=17", "1 to 9", "sampler.num_steps=8")),
        (lambda: timesteps.stride(50, every=0), ("timestep_schedule.every=0", "1 or more")),
        (lambda: timesteps.phases(50, early=16), ("timestep_schedule.early=16", "0 to 15")),
        (lambda: timesteps.phases(50, mid=21), ("timestep_schedule.mid=21", "0 to 20")),
        (lambda: timesteps.phases(50, late=-1), ("timestep_schedule.late=-1", "0 to 16")),
        (lambda: timesteps.from_list(50), ("timestep_schedule.steps=[]", "at least one")),
        (lambda: timesteps.from_list(50, steps=[0, 51]), ("timestep_schedule.steps=51", "0 … 50")),
        (lambda: timesteps.from_list(50, steps=[-1]), ("timestep_schedule.steps=-1", "0 … 50")),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(call: Callable[[], object], words: Sequence[str]) -> None:
    check_config_error(call, words)
