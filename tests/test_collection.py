"""Collection on the shipped model: what is collected is what goes by, however the work is divided."""

import ctypes
from pathlib import Path

from calib.activations import collect
from calib.activations.collect import histogram_stride
from calib.activations.format import HALVES
from calib.activations.histogram import BINS, Histogram
from calib.activations.observer_mlx import PHASES, first_sampled, pick_stride
from calib.activations.statistics import Statistics
from calib.activations.taps import Halves, TapKind, TapSelection, tapped
from calib.base import blas
from calib.base.seeds import generator
from calib.dataset.manifest import Manifest
from calib.dataset.shards import Shard
from calib.dataset.store import read_state
from calib.models import emoji, parallel
from calib.models.model import DiffusionModel, ModelDtype

import mlx.core as mx
import numpy as np
import pytest
from helpers import STEPS, check_statistics, float64
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from watching import (
    EVERY_TAP,
    FEW,
    Whole,
    check_equal,
    collected,
    collection_of,
    in_parts,
    keep,
    pooled,
    recording,
    relabelled,
)


def rows(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.reshape(-1, values.shape[-1])


def check_same_but_rounding(found: Statistics, expected: Statistics) -> None:
    """Of the same values; where sums were split otherwise their rounding differs."""
    for field in ("minimum", "maximum", "count"):
        assert np.array_equal(getattr(found, field), getattr(expected, field)), field
    assert np.array_equal(found.histogram.counts, expected.histogram.counts)
    scale = np.hypot(expected.mean, expected.std)
    assert np.all(np.abs(found.mean - expected.mean) <= 1e-6 * scale)
    np.testing.assert_allclose(found.std, expected.std, rtol=1e-5, atol=1e-7 * float(scale.max()))


# What went by


def test_statistics_of_every_tap_are_numpys_of_what_went_by(whole: Whole, model: DiffusionModel) -> None:
    covered = {name for point in whole.collection.points for name in point.names if point.kind != "block"}
    assert covered == set(model.architecture.layers())
    blocks = {point.name for point in whole.collection.points if point.kind == "block"}
    for step in STEPS:
        record, activations = whole.records[step], whole.activations[step]
        assert record.images == [0, 1, 2, 3]
        assert record.finite_output
        assert set(record.seen) == set(activations) | blocks
        for name, values in activations.items():
            assert record.seen[name].dtype == "float32"
            check_statistics(record.seen[name].statistics, rows(values), "float32")
    for name in whole.activations[0]:
        for steps in (STEPS, (0, 3)):
            values = np.concatenate([rows(whole.activations[step][name]) for step in steps])
            check_statistics(pooled({step: whole.records[step] for step in steps}, name), values, "float32")


def test_a_block_is_both_its_streams(whole: Whole) -> None:
    for name in ("mm_block_0", "mm_block_2", "mm_block_3"):
        streams = [f"{name}.{stream}" for stream in ("image", "text") if f"{name}.{stream}" in whole.activations[3]]
        values = np.concatenate([rows(whole.activations[3][stream]) for stream in streams])
        check_statistics(whole.records[3].seen[name].statistics, values, "float32")
        ranges = np.stack([whole.records[3].seen[stream].ranges for stream in streams])
        found = whole.records[3].seen[name].ranges
        np.testing.assert_array_equal(found[:, 0], ranges[..., 0].min(axis=0))
        np.testing.assert_array_equal(found[:, 1], ranges[..., 1].max(axis=0))
        np.testing.assert_allclose(found[:, 2:], ranges[..., 2:].mean(axis=0))


def test_each_image_has_the_range_of_its_own_two_rows(whole: Whole) -> None:
    """Rows are two blocks of two images, each with its conditional and then its unconditional half."""
    owners = np.array([0, 1, 0, 1, 2, 3, 2, 3])
    for name, values in whole.activations[3].items():
        ranges = whole.records[3].seen[name].ranges
        assert ranges.shape == (4, 4)
        for image in range(4):
            own = values[owners == image]
            assert ranges[image, 0] == own.min(), name
            assert ranges[image, 1] == own.max(), name
            picked = [row.ravel()[:: pick_stride(row.size, row.shape[-1])] for row in own]
            expected = np.mean([np.percentile(values, (1, 99)) for values in picked], axis=0)
            # float32 is known by its upper half.
            assert np.all(np.abs(ranges[image, 2:] - expected) <= 0.004 * np.abs(picked).max()), name


def test_what_goes_by_is_what_a_plain_forward_computes(
    whole: Whole, model: DiffusionModel, data_dir: Path, manifest: Manifest
) -> None:
    for step in STEPS:
        text = model.encode([str(manifest.images[image].prompt) for image in (0, 1)], manifest.cfg_weight)
        x = mx.array(np.stack([read_state(data_dir, manifest, image, step) for image in (0, 1)]).astype(np.float32))
        seen: dict[str, mx.array] = {}
        with tapped(model.architecture, whole.collection.points, keep(seen)):
            timestep, sigma = mx.array(manifest.timesteps[step]), mx.array(manifest.sigmas[step])
            mx.eval(model.denoise(x, timestep, sigma, text, manifest.cfg_weight))
        assert set(seen) == set(whole.activations[step])
        for name, array in seen.items():
            expected, found = rows(float64(array)), rows(whole.activations[step][name][:4])
            assert np.abs(found - expected).max() <= 1e-4 * np.sqrt(np.mean(expected**2)), name


@pytest.mark.parametrize("dtype", [ModelDtype.FLOAT16, ModelDtype.BFLOAT16])
def test_statistics_of_a_16_bit_model_are_exact(dtype: ModelDtype, data_dir: Path, tmp_path: Path) -> None:
    model = emoji.load(dtype=dtype)
    taps = TapSelection(include=("x_embedder", "mm_block_0.image.mlp.fc2", "mm_block_0.text.attn.q_proj"))
    with recording() as observers:
        dataset = relabelled(data_dir, tmp_path, model)
        collection = collection_of(model, dataset, tmp_path, [1], taps, histogram_rows=None)
        record = collected(collection, [3])[3]
    for name, values in observers[0].values().items():
        assert record.seen[name].dtype == dtype.value
        check_statistics(record.seen[name].statistics, rows(values), dtype.value)


# The histogram's rows


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_sampled_histograms_count_the_rows_of_each_forwards_phase(
    model: DiffusionModel,
    data_dir: Path,
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
) -> None:
    """Rows of a forward in parts are those of the forward at once."""
    monkeypatch.setattr(parallel, "cores", lambda: cores)
    with recording() as observers:
        collection = collection_of(model, data_dir, tmp_path, [0, 1, 2, 3], FEW, histogram_rows=40, seed=3)
        record = collected(collection, [3])[3]
    assert collection.stride == histogram_stride(model.architecture, manifest, 2, 40) == 7, "6 and 64 have a factor"
    for name, values in observers[0].values().items():
        counts = np.zeros(BINS, int)
        for block, forward in enumerate((rows(values[:4]), rows(values[4:]))):
            phase = int(generator("seed", 3, block, 3).randint(PHASES))
            first = first_sampled(len(forward), 7, phase)
            chosen = forward if len(forward) == 4 else forward[first::7]  # without tokens: all
            counts += np.bincount(chosen.astype(np.float32).view(np.uint32).ravel() >> 16, minlength=BINS)
        found, expected = record.seen[name].statistics.histogram, Histogram.from_counts(counts, "float32")
        assert np.array_equal(found.keys, expected.keys), name
        assert np.array_equal(found.counts, expected.counts), name
        assert np.array_equal(record.seen[name].statistics.count, np.full(values.shape[2], rows(values).shape[0]))


def test_the_seed_moves_the_sampled_rows_and_nothing_else(
    model: DiffusionModel, data_dir: Path, tmp_path: Path
) -> None:
    one, same, other = (
        collected(collection_of(model, data_dir, tmp_path / folder, [0, 1], FEW, histogram_rows=16, seed=seed), [0, 3])
        for folder, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for step, record in one.items():
        for name, own in record.seen.items():
            check_equal(same[step].seen[name].statistics, own.statistics)
            assert np.array_equal(same[step].seen[name].ranges, own.ranges)
            assert np.array_equal(other[step].seen[name].statistics.mean, own.statistics.mean)
            assert np.array_equal(other[step].seen[name].ranges, own.ranges)
    counts = [seen[3].seen["mm_block_1.image"].statistics.histogram.keys.tolist() for seen in (one, other)]
    assert counts[0] != counts[1]


def test_streams_and_short_blocks_are_sampled_at_one_rate(
    model: DiffusionModel, data_dir: Path, tmp_path: Path
) -> None:
    """Or a merged histogram would weigh the text as heavily as the image, and the last image as several others."""
    taps = TapSelection(kind=TapKind.BLOCK, include=("mm_block_0",))
    alone, together = (
        collected(collection_of(model, data_dir, tmp_path, ids, taps, histogram_rows=50), STEPS)
        for ids in ([2], [0, 1, 2])
    )
    for step in STEPS:
        totals = {name: seen.statistics.histogram.total for name, seen in together[step].seen.items()}
        assert totals["mm_block_0.image"] / totals["mm_block_0.text"] == pytest.approx(64 / 16, rel=0.15)
        share = alone[step].seen["mm_block_0"].statistics.histogram.total / totals["mm_block_0"]
        assert share == pytest.approx(1 / 3, rel=0.1)


# However the work is divided


def test_the_batch_size_changes_nothing_but_rounding(
    whole: Whole, model: DiffusionModel, data_dir: Path, tmp_path: Path
) -> None:
    for batch_size in (1, 3):
        collection = collection_of(
            model, data_dir, tmp_path, [0, 1, 2, 3], EVERY_TAP, histogram_rows=None, batch_size=batch_size
        )
        for name, own in collected(collection, [3])[3].seen.items():
            expected = whole.records[3].seen[name]
            spread = expected.statistics.over_channels()[3]
            assert np.array_equal(own.statistics.count, expected.statistics.count)
            np.testing.assert_allclose(own.statistics.minimum, expected.statistics.minimum, atol=1e-3 * spread)
            np.testing.assert_allclose(own.statistics.mean, expected.statistics.mean, atol=1e-4 * spread)
            np.testing.assert_allclose(own.ranges, expected.ranges, rtol=1e-2, atol=1e-3 * spread)


@given(count=st.integers(1, 80), rows=st.integers(1, 100))
def test_the_rows_of_a_batch_are_shared_out_among_processors(count: int, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "cores", lambda: count)
        patch.setattr(parallel, "on_gpu", lambda: False)
        parts = parallel.parts_of(rows)
        patch.setattr(parallel, "on_gpu", lambda: True)
        assert parallel.parts_of(rows) == [slice(0, rows)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert len(parts) == min(count, rows) and max(sizes) - min(sizes) <= 1


@pytest.mark.skipif(blas.status().library is None, reason="MLX's own BLAS is not told how many threads to take")
def test_products_take_so_many_threads_within_the_context_only() -> None:
    library = ctypes.CDLL(str(blas.status().library))
    number = next(getattr(library, name) for name in blas._GET_THREADS if hasattr(library, name))
    before = number()
    with pytest.raises(RuntimeError), blas.threads(1):
        assert number() == 1
        raise RuntimeError
    assert number() == before


@pytest.mark.parametrize("cores", [1, 3])
def test_the_number_of_processors_changes_nothing_but_rounding(
    whole: Whole, model: DiffusionModel, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(parallel, "cores", lambda: cores)
    collection = collection_of(model, data_dir, tmp_path, [0, 1, 2, 3], EVERY_TAP, histogram_rows=None)
    with recording() as observers:
        record = collected(collection, [3])[3]
    parts = {len(arrays) for arrays in observers[0].kept.values()}
    assert parts == {2 * cores}, "forwards of two blocks, each in so many parts"
    for name, values in observers[0].values().items():
        check_statistics(record.seen[name].statistics, rows(values), "float32")
        expected = whole.activations[3][name]
        assert np.abs(values - expected).max() <= 1e-4 * np.sqrt(np.mean(expected**2)), name
        spread = expected.std()
        np.testing.assert_allclose(record.seen[name].ranges, whole.records[3].seen[name].ranges, atol=0.01 * spread)


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_halves_of_the_guidance_batch_are_apart_and_merge_to_the_whole(
    model: DiffusionModel, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    """Three images in blocks of two: the halves' border lies within a part, or between two."""
    monkeypatch.setattr(parallel, "cores", lambda: cores)
    apart = TapSelection(FEW.kind, FEW.include, cfg_halves=Halves.APART)
    pooled_record, record = (
        collected(collection_of(model, data_dir, tmp_path, [0, 1, 2], taps, histogram_rows=None), [3])[3]
        for taps in (FEW, apart)
    )
    names = [name for name in record.seen if "/" not in name]
    assert set(names) == set(pooled_record.seen)
    assert set(record.seen) == {*names, *(f"{name}/{half}" for name in names for half in HALVES)}
    for name in names:
        halves = [record.seen[f"{name}/{half}"] for half in HALVES]
        own, together = record.seen[name], pooled_record.seen[name]
        check_equal(own.statistics, halves[0].statistics.merge(halves[1].statistics))
        check_same_but_rounding(own.statistics, together.statistics)
        assert all(len(half.ranges) == 3 for half in halves)
        np.testing.assert_array_equal(own.ranges, together.ranges)
        np.testing.assert_array_equal(own.ranges[:, 0], np.minimum(halves[0].ranges[:, 0], halves[1].ranges[:, 0]))
    different = record.seen["mm_block_1.text"], pooled_record.seen["mm_block_1.text"]
    assert different[0].statistics.count.tolist() == different[1].statistics.count.tolist()
    one, other = (record.seen[f"mm_block_1.text/{half}"].statistics for half in HALVES)
    assert not np.array_equal(one.mean, other.mean), "a prompt and no prompt"
    # Without a prompt the text is the same for every image.
    empty = record.seen["mm_block_1.text/unconditional"].ranges
    assert np.ptp(empty[:, 0]) < np.ptp(record.seen["mm_block_1.text/conditional"].ranges[:, 0])


def test_halves_hold_the_rows_of_their_half(
    whole: Whole, model: DiffusionModel, data_dir: Path, tmp_path: Path
) -> None:
    apart = TapSelection(FEW.kind, FEW.include, cfg_halves=Halves.APART)
    record = collected(collection_of(model, data_dir, tmp_path, [0, 1, 2, 3], apart, histogram_rows=None), [0])[0]
    for name in ("x_embedder", "mm_block_1.text.mlp.fc2", "mm_block_1.image"):
        for half, chosen in zip(HALVES, ([0, 1, 4, 5], [2, 3, 6, 7]), strict=True):
            values = whole.activations[0][name][chosen]
            seen = record.seen[f"{name}/{half}"]
            check_statistics(seen.statistics, rows(values), "float32")
            np.testing.assert_array_equal(seen.ranges[:, 1], values.max(axis=(1, 2)))


def test_shards_merge_to_the_whole_bit_for_bit(
    whole: Whole, model: DiffusionModel, data_dir: Path, tmp_path: Path
) -> None:
    for count in (2, 3):
        shards = [
            collection_of(model, data_dir, tmp_path, [0, 1, 2, 3], FEW, Shard(i, count), batch_size=1)
            for i in range(count)
        ]
        assert sorted(image for shard in shards for image in shard.images) == [0, 1, 2, 3]
        unsplit = collected(collection_of(model, data_dir, tmp_path, [0, 1, 2, 3], FEW, batch_size=1), STEPS)
        records = [collected(shard, STEPS) for shard in shards]
        for step in STEPS:
            for order in (records, records[::-1]):
                merged = order[0][step]
                for record in order[1:]:
                    merged = merged.merge(record[step])
                assert sorted(merged.images) == [0, 1, 2, 3]
                place = np.argsort(merged.images)
                for name, own in unsplit[step].seen.items():
                    check_equal(merged.seen[name].statistics, own.statistics)
                    np.testing.assert_array_equal(merged.seen[name].ranges[place], own.ranges)


def test_a_subset_in_parts_is_the_subset_at_once(
    model: DiffusionModel, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many images are collected so many at a time, through all steps."""
    at_once = collected(collection_of(model, data_dir, tmp_path / "once", [0, 1, 2, 3], FEW, batch_size=1), STEPS)
    collection = collection_of(model, data_dir, tmp_path / "parts", [0, 1, 2, 3], FEW, batch_size=1)
    with monkeypatch.context() as patch:
        in_parts(patch, 3, 1)
        found = collected(collection, STEPS)
    for step in STEPS:
        assert found[step].images == [0, 1, 2, 3]
        for name, own in at_once[step].seen.items():
            check_equal(found[step].seen[name].statistics, own.statistics)
            np.testing.assert_array_equal(found[step].seen[name].ranges, own.ranges)
    left = {path.name for path in collection.cache.folder.iterdir() if not path.name.startswith(".")}
    assert left == {"about.json", *(f"step_{step:04d}.npz" for step in STEPS)}
    assert collection._parts(model) == [collection.blocks], "prompts of four images are no burden"
    monkeypatch.setattr(collect, "TEXT_SHARE", 0)
    assert collection._parts(model) == [[block] for block in collection.blocks]
