"""The cache of collected statistics: what is found there again, and what damage to it does."""

import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib.activations.cache import StepCache
from calib.activations.collect import Collection
from calib.activations.record import StepRecord, pack, unpack
from calib.activations.samples import Samples, SampleSettings
from calib.activations.taps import Halves, TapKind, TapSelection
from calib.base.errors import CalibError
from calib.base.progress import note
from calib.dataset.shards import Shard
from calib.models.model import DiffusionModel

import numpy as np
import pytest
from helpers import STEPS, flip_byte
from watching import EVERY_TAP, FEW, Whole, check_equal, collected, collection_of, in_parts, relabelled


def check_same_records(found: dict[int, StepRecord], expected: dict[int, StepRecord]) -> None:
    """Bit for bit."""
    assert list(found) == list(expected)
    for step, record in expected.items():
        assert found[step].images == record.images
        assert found[step].finite_output == record.finite_output
        assert list(found[step].seen) == list(record.seen)
        for name, own in record.seen.items():
            check_equal(found[step].seen[name].statistics, own.statistics)
            np.testing.assert_array_equal(found[step].seen[name].ranges, own.ranges)


# What is there already


def never() -> DiffusionModel:
    raise AssertionError("the model was loaded")


def test_what_was_collected_before_is_not_collected_again(whole: Whole, model: DiffusionModel) -> None:
    directory = whole.collection.cache.folder
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    cache_dir, data_dir = directory.parents[1], whole.collection.data_dir
    again = collection_of(model, data_dir, cache_dir, [0, 1, 2, 3], EVERY_TAP, load=never, histogram_rows=None)
    assert again.missing(STEPS) == []
    check_same_records(collected(again, STEPS), whole.records)
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_another_schedule_collects_the_steps_that_are_missing(
    model: DiffusionModel, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = collected(collection_of(model, data_dir, tmp_path, [0, 1], FEW), [0, 4, 8])
    paths = sorted(tmp_path.rglob("step_*"))
    before = {path: path.stat().st_mtime_ns for path in paths}
    capsys.readouterr()
    collection = collection_of(model, data_dir, tmp_path, [0, 1], FEW)
    assert collection.missing([0, 2, 4, 6, 8]) == [2, 6]
    found = collected(collection, [0, 2, 4, 6, 8])
    assert "collect 2 images at 2 steps: 2 forwards" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    check_same_records({step: found[step] for step in first}, first)


@pytest.mark.parametrize(
    "change",
    [
        {"image_ids": [0, 2]},
        {"image_ids": [1, 0]},
        {"seed": 1},
        {"histogram_rows": 7},
        {"batch_size": 1},
        {"selection": TapSelection(TapKind.LINEAR, include=("x_embedder",))},
        {"shard": Shard(0, 2)},
        {"selection": TapSelection(FEW.kind, FEW.include, cfg_halves=Halves.APART)},
        {"samples": SampleSettings(Samples.ROWS)},
    ],
)
def test_what_would_be_collected_otherwise_has_another_place(
    model: DiffusionModel, data_dir: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    def folder(**settings: Any) -> Path:
        given = {"image_ids": [0, 1, 2], "selection": FEW} | settings
        return collection_of(model, data_dir, tmp_path, **given).cache.folder

    assert folder() == folder()
    assert folder(**change) != folder()


def test_statistics_of_a_copied_dataset_are_found(model: DiffusionModel, data_dir: Path, tmp_path: Path) -> None:
    """The key is the content, not the place."""
    copy = relabelled(data_dir, tmp_path, model)
    one, other = (collection_of(model, folder, tmp_path, [0, 1], FEW).cache.folder for folder in (data_dir, copy))
    assert one == other


def test_a_folder_says_what_it_is_of(whole: Whole) -> None:
    about = json.loads((whole.collection.cache.folder / "about.json").read_text())
    assert about["dataset"]["fingerprint"] == whole.collection.manifest.fingerprint
    assert about["settings"]["batch_size"] == 2
    assert [point["name"] for point in about["taps"]] == [point.name for point in whole.collection.points]


def test_a_record_is_the_same_packed_and_unpacked_and_some_of_it_can_be_had(whole: Whole) -> None:
    record = whole.records[3]
    header, arrays = pack(record)
    header = json.loads(json.dumps(header))
    check_same_records({3: unpack(header, arrays)}, {3: record})
    names = ["mm_block_2.text", "x_embedder"]
    some = unpack(header, arrays, names)
    assert set(some.seen) == set(names)
    for name in names:
        check_equal(some.seen[name].statistics, record.seen[name].statistics)
        assert np.array_equal(some.seen[name].statistics.moments.sums, record.seen[name].statistics.moments.sums)
    assert unpack(header, {}, names=()).images == record.images


# Damage


@pytest.fixture(scope="module")
def cached(model: DiffusionModel, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """One step of one tap, with samples."""
    tap = TapSelection(include=("final_layer.linear",))
    collection = collection_of(
        model, data_dir, tmp_path_factory.mktemp("cached"), [0, 1], tap, samples=SampleSettings(Samples.ROWS)
    )
    collection.collect([3])
    return collection


@pytest.fixture
def damaged(cached: Collection, model: DiffusionModel, tmp_path: Path) -> Collection:
    """The same in a folder of its own, to be damaged."""
    note.cache_clear()
    cache_dir = cached.cache.folder.parents[1]
    shutil.copytree(cache_dir, tmp_path / "cache")
    tap = TapSelection(include=("final_layer.linear",))
    return collection_of(model, cached.data_dir, tmp_path / "cache", [0, 1], tap, samples=SampleSettings(Samples.ROWS))


def set_header(path: Path, **changes: Any) -> None:
    with np.load(path) as archive:
        content = dict(archive)
    header = json.loads(content["header"].tobytes()) | changes
    content["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, **content)


def drop_array(path: Path, name: str) -> None:
    with np.load(path) as archive:
        content = {key: value for key, value in archive.items() if key != name}
    np.savez(path, **content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "one byte": lambda path: os.truncate(path, 1),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "foreign": lambda path: path.write_text("statistics"),
    "another archive": lambda path: np.savez(path, x=np.zeros(3)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "the next version": lambda path: set_header(path, format_version=2),
    "another format": lambda path: set_header(path, format="calib-dataset"),
    "no header": lambda path: drop_array(path, "header"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_a_step_is_told_and_mended(
    damaged: Collection, cached: Collection, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = damaged.cache.path(3)
    DAMAGE[kind](path)
    assert damaged.missing([3]) == [3]
    found = collected(damaged, [3])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calib: ")]
    assert line.startswith(f"calib: note: {path}: cannot be used (")
    assert line.endswith("; step 3 is collected again")
    assert ("this calib reads 1; written by another version of calib" in line) == (kind == "the next version")
    check_same_records(found, cached.records([3]))
    assert path.read_bytes() == cached.cache.path(3).read_bytes()


def test_a_flipped_byte_anywhere_is_told_or_changes_nothing(
    damaged: Collection, cached: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    """An archive has bytes that nobody reads: times of day, and who made it."""
    path = damaged.cache.path(3)
    content = path.read_bytes()
    expected = cached.records([3])
    told, places = 0, [*range(0, 300), *range(300, len(content) - 300, 97), *range(len(content) - 300, len(content))]
    for place in places:
        flip_byte(path, place)
        note.cache_clear()
        record = damaged.cache.load(3)
        said = "cannot be used" in capsys.readouterr().err
        assert said == (record is None)
        told += said
        if record is not None:
            check_same_records({3: record}, expected)
            assert damaged.missing([3]) == []
        path.write_bytes(content)
    assert told > 0.8 * len(places)


@pytest.mark.parametrize("kind", ["lost", "cut short", "longer"])
def test_samples_that_are_not_whole_are_told_and_mended(
    damaged: Collection, cached: Collection, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = damaged.cache.samples_path(3)
    size = path.stat().st_size
    if kind == "lost":
        path.unlink()
    else:
        os.truncate(path, size - 2 if kind == "cut short" else size + 2)
    assert damaged.missing([3]) == [3]
    damaged.collect([3])
    assert "step_0003.samples is not there, or cut off" in capsys.readouterr().err
    assert path.read_bytes() == cached.cache.samples_path(3).read_bytes()


def test_a_cache_that_cannot_be_read_is_one_clear_line(damaged: Collection) -> None:
    path = damaged.cache.path(3)
    path.unlink()
    path.mkdir()
    with pytest.raises(CalibError, match=r"step_0003\.npz: cannot be read \(Is a directory\)$"):
        damaged.collect([3])


def test_damage_between_collecting_and_writing_is_one_clear_line(damaged: Collection) -> None:
    damaged.collect([3])
    os.truncate(damaged.cache.path(3), 100)
    with pytest.raises(CalibError, match=r"step_0003\.npz: was damaged just now; run the same command again$"):
        damaged.records([3])


def test_parts_that_were_finished_are_kept_and_damaged_ones_collected_again(
    model: DiffusionModel,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three parts at two steps, ended by an error after four of the six; then one of the four is spoiled."""
    settings = {"batch_size": 1, "samples": SampleSettings(Samples.ROWS)}
    expected = collected(collection_of(model, data_dir, tmp_path / "once", [0, 1, 2], FEW, **settings), [0, 3])
    in_parts(monkeypatch, 1, 1, 1)
    collection = collection_of(model, data_dir, tmp_path / "parts", [0, 1, 2], FEW, **settings)
    saved: list[tuple[int, int | None]] = []
    save = StepCache.save

    def until_the_fourth(cache: StepCache, record: StepRecord, part: int | None = None) -> None:
        if len(saved) == 4:
            raise RuntimeError("enough")
        save(cache, record, part)
        saved.append((record.step, part))

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="enough"):
        patch.setattr(StepCache, "save", until_the_fourth)
        collection.collect([0, 3])
    assert saved == [(0, 0), (3, 0), (0, 1), (3, 1)]
    assert collection.missing([0, 3]) == [0, 3]
    flip_byte(collection.cache.path(3, 1), 5000)
    note.cache_clear()
    capsys.readouterr()
    found = collected(collection, [0, 3])
    err = capsys.readouterr().err
    assert "step_0003.part_001.npz: cannot be used" in err
    assert "collect 3 images at 2 steps: 3 forwards" in err, "the damaged part, and two that were not begun"
    check_same_records(found, expected)
    left = {path.name for path in collection.cache.folder.iterdir() if not path.name.startswith(".")}
    steps = [f"step_{step:04d}" for step in (0, 3)]
    assert left == {"about.json", *(f"{step}.npz" for step in steps), *(f"{step}.samples" for step in steps)}


def test_parts_are_joined_one_at_a_time(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand images are collected in hundreds of parts: together they do not fit into memory."""
    cache = StepCache(tmp_path, {})
    for part in range(6):
        cache.save(whole.records[3], part)
    loaded: list[weakref.ref[StepRecord]] = []
    most = 0
    load = StepCache.load

    def counting(cache: StepCache, step: int, part: int | None = None) -> StepRecord | None:
        nonlocal most
        record = load(cache, step, part)
        assert record is not None
        loaded.append(weakref.ref(record))
        most = max(most, sum(one() is not None for one in loaded))
        return record

    with monkeypatch.context() as patch:
        patch.setattr(StepCache, "load", counting)
        cache.join_parts(3, 6)
    assert len(loaded) == 6 and most <= 2
    joined = cache.load(3)
    assert joined is not None and joined.images == whole.records[3].images * 6


def test_parts_of_other_images_are_collected_again(
    model: DiffusionModel, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many images make up a part is a matter of the machine's memory."""
    expected = collected(collection_of(model, data_dir, tmp_path / "once", [0, 1, 2], FEW, batch_size=1), [0])
    collection = collection_of(model, data_dir, tmp_path / "parts", [0, 1, 2], FEW, batch_size=1)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        in_parts(patch, 1, 1, 1)
        patch.setattr(StepCache, "join_parts", join_no_more)
        collection.collect([0])
    assert len(list(collection.cache.folder.glob("step_0000.part_*"))) == 3
    in_parts(monkeypatch, 2, 1)
    check_same_records(collected(collection, [0]), expected)


def join_no_more(cache: StepCache, step: int, parts: int) -> None:
    raise RuntimeError("ended before")
