"""Choosing by what was drawn or collected: states that differ most, and images that are unlike one another."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from calib.activations.choose_steps import choose_steps, distances, farthest_first
from calib.activations.histogram import Histogram
from calib.activations.record import StepRecord
from calib.activations.statistics import Moments, Statistics
from calib.base.errors import CalibError
from calib.base.seeds import generator
from calib.dataset import subsets, timesteps
from calib.dataset.latents import LARGEST_SIDE, features
from calib.dataset.manifest import Manifest

import numpy as np
import pytest
from helpers import check_config_error, everything, is_one_clear_line, run_here
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from watching import Whole

# States


def line(*places: float) -> NDArray[np.float64]:
    """Distances of points on a line."""
    return np.abs(np.subtract.outer(places, places))


@pytest.mark.parametrize(
    ("distance", "count", "expected"),
    [
        (line(0, 1, 2, 3, 4), 1, [0]),
        (line(0, 1, 2, 3, 4), 2, [0, 4]),
        (line(0, 1, 2, 3, 4), 3, [0, 2, 4]),
        (line(0, 1, 2, 3, 4), 5, [0, 1, 2, 3, 4]),
        (line(5, 0, 9, 5.5), 2, [0, 1]),
        (line(5, 0, 9, 5.5), 3, [0, 1, 2]),
        (line(0, 10, 10, 10, 6), 3, [0, 1, 4]),
        (np.zeros((4, 4)), 3, [0, 1, 2]),
        (np.array([[0.0, 3, 1], [3, 0, 1], [1, 1, 0]]), 2, [0, 1]),
    ],
)
def test_the_farthest_of_known_places_are_chosen(
    distance: NDArray[np.float64], count: int, expected: list[int]
) -> None:
    before = distance.copy()
    assert farthest_first(distance, count) == expected
    assert np.array_equal(distance, before)


@st.composite
def matrices(draw: st.DrawFn) -> NDArray[np.float64]:
    """Distances, symmetric; some of them equal."""
    size = draw(st.integers(1, 12))
    values = draw(st.lists(st.integers(0, 5).map(float) | st.floats(0, 1), min_size=size**2, max_size=size**2))
    square = np.array(values).reshape(size, size)
    distance: NDArray[np.float64] = np.maximum(square, square.T)
    np.fill_diagonal(distance, 0)
    return distance


@given(distance=matrices(), data=st.data())
def test_every_state_chosen_is_the_farthest_from_those_before_it(
    distance: NDArray[np.float64], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(distance)))
    chosen: list[int] = []
    for number in range(1, count + 1):
        found = farthest_first(distance, number)
        assert found == sorted(set(found))
        assert len(found) == number
        assert 0 in found
        assert set(chosen) <= set(found), "one more is one more, not others"
        (new,) = set(found) - set(chosen)
        if chosen:
            others = [i for i in range(len(distance)) if i not in chosen]
            assert distance[new, chosen].min() == max(distance[i, chosen].min() for i in others)
        chosen = found


def farthest_layer(whole: Whole, a: int, b: int) -> float:
    """The definition, step by step and layer by layer."""

    def of(step: int, name: str) -> tuple[float, float]:
        statistics = whole.records[step].seen[name].statistics
        low, high = statistics.histogram.percentiles([1, 99])
        return float(high - low), statistics.over_channels()[2]

    found = []
    for name in whole.records[a].seen:
        (range_a, mean_a), (range_b, mean_b) = of(a, name), of(b, name)
        larger = max(range_a, range_b)
        found.append(max(abs(range_a - range_b), abs(mean_a - mean_b)) / larger if larger else 0.0)
    return min(1.0, max(found))


def test_two_states_are_as_far_apart_as_their_farthest_layer(whole: Whole) -> None:
    distance = distances(whole.records)
    steps = list(whole.records)
    assert np.array_equal(distance, distance.T)
    assert np.all(np.diag(distance) == 0)
    for i, a in enumerate(steps):
        for j, b in enumerate(steps):
            assert distance[i, j] == pytest.approx(farthest_layer(whole, a, b))
    assert np.all(distance[np.triu_indices(3, 1)] > 0.1), "the model's states differ"
    assert choose_steps(whole.records, 1) == (0,)
    second = steps[1 + int(np.argmax(distance[0, 1:]))]
    assert choose_steps(whole.records, 2) == (0, second)
    assert choose_steps(whole.records, 3) == (0, 3, 8)


def test_a_layer_with_nothing_finite_says_nothing(whole: Whole) -> None:
    records = {step: StepRecord(step, record.images, dict(record.seen)) for step, record in whole.records.items()}
    lost = records[3].seen["x_embedder"]
    own, histogram = lost.statistics, Histogram(lost.dtype)
    empty = Statistics(own.minimum, own.maximum, own.count * 0, Moments.zero(own.channels), histogram)
    records[3].seen["x_embedder"] = replace(lost, statistics=empty)
    distance = distances(records)
    assert np.isfinite(distance).all()
    for record in records.values():
        del record.seen["x_embedder"]
    assert np.array_equal(distance[1], distances(records)[1])


def test_drift_is_a_schedule_of_the_states_that_the_sampler_evaluates() -> None:
    assert timesteps.drift(50) == timesteps.DriftSchedule(17, 8)
    assert timesteps.drift(4, count=4, images=1) == timesteps.DriftSchedule(4, 1)
    check_config_error(lambda: timesteps.drift(4, count=5), ("timestep_schedule.count=5", "1 to 4"))
    check_config_error(lambda: timesteps.drift(4, count=0), ("timestep_schedule.count=0", "1 to 4"))
    check_config_error(lambda: timesteps.drift(4, count=1, images=0), ("timestep_schedule.images=0", "1 or more"))


def drift(data_dir: Path, run: str, count: int, *more: str) -> list[str]:
    schedule = ("sampler.num_steps=8", "timestep_schedule=drift", f"timestep_schedule.count={count}")
    own = ("taps.include=['*.fc2']", f"hydra.run.dir={run}", "report=none")
    return ["collect", f"data_dir={data_dir}", *schedule, *own, *more]


def steps_of(run: Path) -> list[int]:
    return [step["step_index"] for step in json.loads((run / "collection_metadata.json").read_text())["steps"]]


def test_the_command_looks_at_some_images_and_collects_the_states_chosen(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run_here(drift(data_dir, "run", 4, "timestep_schedule.images=2"), capsys)
    assert outcome.status == 0, outcome.err
    assert "drift: a first look at 2 images at all 8 states" in outcome.err
    assert "collect 2 images at 8 steps" in outcome.err
    assert "collect 4 images at 4 steps" in outcome.err
    steps = steps_of(folder / "run")
    assert len(steps) == 4
    assert steps[0] == 0
    assert set(steps) <= set(range(8))
    assert f"drift: steps {', '.join(map(str, steps))}" in outcome.err
    # Another number of states looks at nothing anew; halves and samples are no matter of the first look.
    more = ("timestep_schedule.images=2", "taps.cfg_halves=apart", "storage=sampled")
    outcome = run_here(drift(data_dir, "run2", 2, *more), capsys)
    assert outcome.status == 0, outcome.err
    assert "at 8 steps" not in outcome.err
    assert set(steps_of(folder / "run2")) < set(steps)


def test_a_look_at_all_images_is_the_collection_itself(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run_here(drift(data_dir, "run", 4), capsys)
    assert outcome.status == 0, outcome.err
    assert outcome.err.count("forwards in") == 1, "the four states are among those looked at"


def test_more_states_than_there_are_is_one_clear_line(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = is_one_clear_line(run_here(drift(data_dir, "run", 9), capsys))
    assert "timestep_schedule.count=9" in line and "1 to 8" in line
    assert everything(folder) == []


# Images


def alike(points: NDArray[np.float32]) -> Any:
    return lambda ids: points[list(ids)]


@st.composite
def features_of_images(draw: st.DrawFn) -> NDArray[np.float32]:
    size, width = draw(st.integers(1, 10)), draw(st.integers(1, 3))
    values = draw(st.lists(st.integers(-8, 8), min_size=size * width, max_size=size * width))
    return np.array(values, np.float32).reshape(size, width)


def nearest(points: NDArray[np.float32], i: int, chosen: Sequence[int]) -> float:
    return min(float(np.linalg.norm(points[i] - points[j])) for j in chosen)


@given(points=features_of_images(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_diverse_images_are_those_of_a_greedy_search_by_hand(
    points: NDArray[np.float32], seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(points)))
    ids = range(len(points))
    first = int(generator("subset.seed", seed).randint(len(points)))
    chosen = [first]
    while len(chosen) < count:
        left = [i for i in ids if i not in chosen]
        chosen.append(max(left, key=lambda i: (nearest(points, i, chosen), -i)))
    found = subsets.diverse(ids, count, alike(points), seed)
    assert found == sorted(chosen)
    assert first in found
    assert found == subsets.diverse(ids, count, alike(points), seed)


@given(points=features_of_images(), data=st.data())
def test_diverse_images_cover_the_others_at_most_twice_as_far_as_can_be(
    points: NDArray[np.float32], data: st.DataObject
) -> None:
    """Gonzalez' bound: no centre's neighbourhood is more than twice as wide as the best choice's."""
    count = data.draw(st.integers(1, min(len(points), 4)))

    def radius(chosen: Sequence[int]) -> float:
        return max(nearest(points, i, chosen) for i in range(len(points)))

    best = min(radius(chosen) for chosen in combinations(range(len(points)), count))
    assert radius(subsets.diverse(range(len(points)), count, alike(points))) <= 2 * best + 1e-6


def test_diverse_images_have_their_own_ids_and_differ_by_seed() -> None:
    points = np.random.RandomState(0).randn(40, 5).astype(np.float32)
    asked: list[Sequence[int]] = []

    def latents(ids: Sequence[int]) -> NDArray[np.float32]:
        asked.append(ids)
        return points[[i // 3 for i in ids]]

    ids = range(0, 120, 3)
    drawn = {tuple(subsets.diverse(ids, 5, latents, seed)) for seed in range(20)}
    assert len(drawn) > 10
    assert {i for chosen in drawn for i in chosen} <= set(ids)
    assert all(len(chosen) == 5 for chosen in drawn)
    assert asked[0] == ids


def test_the_features_of_an_image_are_its_final_latent(data_dir: Path, manifest: Manifest) -> None:
    found = features(data_dir, manifest, [2, 0])
    assert found.shape == (2, 16 * 16 * 16)
    for row, image in zip(found, (2, 0), strict=True):
        np.testing.assert_array_equal(row, np.load(data_dir / manifest.images[image].latent_filename).ravel())


def test_the_features_of_a_large_image_are_averages_over_squares(tmp_path: Path, manifest: Manifest) -> None:
    latent = np.random.RandomState(0).randn(64, 48, 4).astype(np.float32)
    large = replace(manifest, latent_shape=(64, 48, 4))
    path = tmp_path / large.images[0].latent_filename
    path.parent.mkdir()
    np.save(path, latent)
    (found,) = features(tmp_path, large, [0])
    assert found.shape == (16 * 12 * 4,)
    assert LARGEST_SIDE == 16
    expected = [latent[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean(axis=(0, 1)) for i in range(16) for j in range(12)]
    np.testing.assert_allclose(found, np.ravel(expected), rtol=1e-5, atol=1e-6)


def test_the_command_collects_diverse_images(
    data_dir: Path, manifest: Manifest, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["collect", f"data_dir={data_dir}", "sampler.num_steps=8", "timestep_schedule=list", "seed=3"]
    given += ["timestep_schedule.steps=[0]", "taps.include=[x_embedder]", "subset=diverse", "subset.num_images=2"]
    assert run_here([*given, "hydra.run.dir=run", "report=none"], capsys).status == 0
    found = json.loads((folder / "run" / "collection_metadata.json").read_text())["image_ids"]
    assert found == subsets.diverse(range(4), 2, lambda ids: features(data_dir, manifest, ids), seed=3)


def test_a_latent_that_cannot_be_read_is_one_clear_line(data_dir: Path, manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(CalibError) as error:
        features(tmp_path, manifest, [1])
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / manifest.images[1].latent_filename}: cannot be read (")
    assert f"calib verify {tmp_path}" in message
