"""``activations.h5`` as others will open it, and as calib reads it back."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from calib.activations.collect import Collection
from calib.activations.format import Block
from calib.activations.observer_mlx import MlxObserver
from calib.activations.reader import ActivationFile
from calib.activations.record import StepRecord
from calib.activations.statistics import Statistics
from calib.activations.store import Records, write_activations
from calib.activations.taps import Halves, TapPoint, TapSelection
from calib.activations.weights import weight_sqnr
from calib.base.affine import WEIGHT_BITS
from calib.base.errors import CalibError
from calib.dataset.manifest import Manifest
from calib.models.architecture import names_in_order
from calib.models.model import DiffusionModel

import h5py
import mlx.core as mx
import numpy as np
import pytest
from helpers import MLX_DTYPES, STEPS, flip_byte, run_here
from mlx import nn
from watching import check_equal, collected, collection_of, pooled, watch, write_collected

PER_CHANNEL = ("channel_min", "channel_max", "channel_mean", "channel_std")
ATTRIBUTES = {"producer": "calib test", "git_commit": "unknown", "config": "{}"}


@pytest.fixture(scope="module")
def stored(
    model: DiffusionModel,
    manifest: Manifest,
    collection: Collection,
    records: dict[int, StepRecord],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    sqnr = {name: weight_sqnr(module) for name, module in model.architecture.layers().items()}
    path = tmp_path_factory.mktemp("store") / "activations.h5"
    return write_collected(path, model, collection, STEPS, weight_sqnr=sqnr, attributes=ATTRIBUTES)


def test_root(stored: Path, manifest: Manifest) -> None:
    with h5py.File(stored, "r") as file:
        assert file.attrs["format"] == "calib-activations"
        assert file.attrs["format_version"] == 2
        assert {name: file.attrs[name] for name in ATTRIBUTES} == ATTRIBUTES
        assert file["step_index"].is_scale
        assert file["step_index"][:].tolist() == list(STEPS)
        for name in ("sigma", "timestep", "evaluated_by_sampler"):
            assert file[name].shape == (3,)
            assert file[name].dims[0][0] == file["step_index"]
        np.testing.assert_array_equal(file["sigma"][:], np.float32([manifest.sigmas[step] for step in STEPS]))
        np.testing.assert_array_equal(file["timestep"][:], np.float32([manifest.timesteps[step] for step in STEPS]))
        assert file["evaluated_by_sampler"][:].tolist() == [True, True, False]


def test_layers(stored: Path, model: DiffusionModel) -> None:
    modules = model.architecture.layers()
    blocks = [f"mm_block_{i}{stream}" for i in range(4) for stream in ("", ".image", ".text")][:-1]
    with h5py.File(stored, "r") as file:
        assert set(file["layers"]) == {*modules, *blocks}
        for name, group in file["layers"].items():
            channels = int(group.attrs["channels"])
            assert group.attrs["dtype"] == "float32"
            assert group.attrs["encoding-type"]
            assert group.attrs["encoding-version"]
            assert isinstance(group.attrs["encoding"], str)
            assert group["channel"].is_scale
            assert group["channel"][:].tolist() == list(range(channels))
            for field in PER_CHANNEL:
                dataset = group[field]
                assert dataset.shape == (3, channels), f"{name} {field}"
                assert len(dataset.dims[0]) == len(dataset.dims[1]) == 1, "one scale an axis"
                assert dataset.dims[0][0] == file["step_index"]
                assert dataset.dims[1][0] == group["channel"]
                assert dataset.fletcher32
                assert dataset.compression in (None, "gzip"), "readable without plugins"
            offsets = group["histogram_offsets"][:]
            assert offsets.shape == (4,)
            assert offsets[0] == 0
            assert group["histogram_keys"].shape == group["histogram_counts"].shape == (offsets[-1],)
            for i in range(3):
                assert np.all(np.diff(group["histogram_keys"][offsets[i] : offsets[i + 1]].astype(int)) > 0)
            assert group.attrs["count"] == group["histogram_counts"][:].sum(), "every row entered the histogram"
            if name in modules:
                module = modules[name]
                inputs = module.weight.shape[-1]
                assert channels == inputs


def test_shared_inputs_share_arrays(stored: Path, collection: Collection) -> None:
    shared = 0
    with h5py.File(stored, "r") as file:
        for point in collection.points:
            for alias in point.aliases:
                one, other = file["layers"][point.name], file["layers"][alias]
                assert dict(one.attrs) | {"order": 0} == dict(other.attrs) | {"order": 0}
                assert one.attrs["order"] < other.attrs["order"]
                assert set(one) - {"weight_sqnr"} == set(other) - {"weight_sqnr"}
                for field in set(one) - {"weight_sqnr"}:
                    assert one[field] == other[field], f"{alias} {field}: the very same dataset"
                shared += 1
        assert file["layers/x_embedder/channel_min"] != file["layers/final_layer.linear/channel_min"]
    assert shared == 24


def test_weight_sqnr(stored: Path, model: DiffusionModel) -> None:
    modules = model.architecture.layers()
    with h5py.File(stored, "r") as file:
        assert file["weight_bits"][:].tolist() == list(WEIGHT_BITS) == [2, 3, 4, 5, 6, 8]
        for name in ("mm_block_0.image.attn.q_proj", "mm_block_0.image.attn.k_proj", "mm_block_2.text.mlp.fc2"):
            weight = np.array(modules[name].weight).astype(np.float64)
            stored_sqnr = file[f"layers/{name}/weight_sqnr"]
            assert stored_sqnr.dims[0][0] == file["weight_bits"]
            for bits, found in zip(WEIGHT_BITS, stored_sqnr[:], strict=True):
                packed = mx.quantize(modules[name].weight, group_size=64, bits=bits)
                restored = np.array(mx.dequantize(*packed, group_size=64, bits=bits)).astype(np.float64)
                expected = 10 * np.log10(np.sum(weight**2) / np.sum((weight - restored) ** 2))
                assert found == pytest.approx(expected, abs=0.01)
            assert np.all(np.diff(stored_sqnr[:]) > 3), "more bits, less noise"
        assert "weight_sqnr" not in file["layers/x_embedder"], "a convolution is not quantized so"
        assert "weight_sqnr" not in file["layers/mm_block_0"]
    assert weight_sqnr(nn.Linear(48, 64)) == {}, "64 does not divide its width"
    assert weight_sqnr(nn.Linear(64, 8))[8] > 40


def check_same(found: Statistics, expected: Statistics) -> None:
    np.testing.assert_array_equal(found.minimum, expected.minimum)
    np.testing.assert_array_equal(found.maximum, expected.maximum)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_array_equal(found.histogram.keys, expected.histogram.keys)
    np.testing.assert_array_equal(found.histogram.counts, expected.histogram.counts)
    assert found.histogram.dtype == expected.histogram.dtype
    assert (found.nan, found.inf) == (expected.nan, expected.inf)
    # Moments are kept as float32 at the least.
    assert np.all(np.abs(found.mean - expected.mean) <= 1e-7 * np.hypot(expected.mean, expected.std))
    np.testing.assert_allclose(found.std, expected.std, rtol=1e-6)
    assert found.percentiles() == expected.percentiles()


def test_read_is_written(
    stored: Path, manifest: Manifest, collection: Collection, records: dict[int, StepRecord]
) -> None:
    streams = {f"{point.name}.{stream}" for point in collection.points for stream in ("image", "text")}
    kinds = {name: point.kind for point in collection.points for name in point.names}
    with ActivationFile(stored) as file:
        assert file.steps == list(STEPS)
        assert file.evaluated_steps() == [0, 3]
        assert file.images == [0, 1, 2, 3]
        assert int(file.attributes["num_steps"]) == manifest.num_steps
        assert set(file.layers) == set(kinds) | (streams & set(records[0].seen))
        for name in records[0].seen:
            assert file.kind(name) == kinds.get(name, "block")
            assert file.halves(name) == []
            for row, step in enumerate(STEPS):
                check_same(file.statistics(name, [step]), records[step].seen[name].statistics)
                ranges = records[step].seen[name].ranges
                np.testing.assert_array_equal(file.image_ranges(name, [step])[0], ranges.astype(np.float32))
                np.testing.assert_array_equal(file.image_ranges(name)[row], ranges.astype(np.float32))


def test_layers_are_in_network_order(stored: Path, model: DiffusionModel, tmp_path: Path) -> None:
    """Also in files of calib 0.1.0, which do not say it."""
    expected = names_in_order(model.architecture)
    shutil.copy(stored, tmp_path / "older.h5")
    with h5py.File(tmp_path / "older.h5", "a") as file:
        for group in file["layers"].values():
            del group.attrs["order"]
    with ActivationFile(stored) as file:
        assert [name for name in file.layers if not name.endswith((".image", ".text"))] == expected
        places = {name: file.layers.index(name) for name in file.layers}
        assert places["mm_block_1"] < places["mm_block_1.text"] < places["mm_block_1.image.adaln"]
    with ActivationFile(tmp_path / "older.h5") as file:
        layers = list(model.architecture.layers())
        assert [name for name in file.layers if name in layers] == layers


def test_merged_views(stored: Path, records: dict[int, StepRecord]) -> None:
    with ActivationFile(stored) as file:
        for name in ("mm_block_1.image.mlp.fc2", "final_layer.linear", "mm_block_2", "x_embedder"):
            check_same(file.statistics(name), pooled(records, name))
            check_same(file.statistics(name, [0, 8]), pooled({step: records[step] for step in (0, 8)}, name))
        check_same(
            file.statistics("mm_block_1.image.attn.v_proj"),
            pooled(records, "mm_block_1.image.attn.q_proj"),
        )


def test_exact_moments(
    model: DiffusionModel, collection: Collection, records: dict[int, StepRecord], tmp_path: Path
) -> None:
    path = write_collected(tmp_path / "activations.h5", model, collection, [3], exact=True)
    with ActivationFile(path) as file:
        for name, own in records[3].seen.items():
            np.testing.assert_array_equal(file.statistics(name).moments.sums, own.statistics.moments.sums)


def test_halves_apart(model: DiffusionModel, data_dir: Path, tmp_path: Path) -> None:
    taps = TapSelection(include=("mm_block_0.image.attn.?_proj", "x_embedder"), cfg_halves=Halves.APART)
    collection = collection_of(model, data_dir, tmp_path, [0, 1], taps)
    own = collected(collection, [3])[3]
    path = write_collected(tmp_path / "activations.h5", model, collection, [3])
    with ActivationFile(path) as file:
        assert set(file.layers) == {"x_embedder", *(f"mm_block_0.image.attn.{x}_proj" for x in "qkvo")}
        for name in file.layers:
            assert file.halves(name) == [f"{name}/conditional", f"{name}/unconditional"]
            tap = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
            for half in ("", "/conditional", "/unconditional"):
                check_same(file.statistics(name + half), own.seen[tap + half].statistics)
                ranges = own.seen[tap + half].ranges
                np.testing.assert_array_equal(file.image_ranges(name + half)[0], ranges.astype(np.float32))
        with pytest.raises(CalibError, match=r"activations\.h5"):
            file.statistics("x_embedder/other")


def test_few_taps_in_memory(
    model: DiffusionModel, stored: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the order of what lies in the file."""
    path = tmp_path / "activations.h5"
    monkeypatch.setattr("calib.activations.store.HELD_BYTES", collection.source(STEPS).nbytes // 7)
    groups = [names for names, _ in collection.source(STEPS).groups()]
    assert len(groups) > 6
    assert [name for names in groups for name in names] == list(collection.source(STEPS).names)
    write_collected(path, model, collection, STEPS, attributes=ATTRIBUTES)
    with ActivationFile(stored) as one, ActivationFile(path) as other:
        assert one.layers == other.layers
        for name in one.layers:
            check_same(other.statistics(name), one.statistics(name))


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_written_is_watched_as_it_will_be_read(
    tmp_path: Path, model: DiffusionModel, collection: Collection, exact: bool
) -> None:
    seen: dict[str, Mapping[int, Statistics]] = {}
    path = tmp_path / "activations.h5"
    write_collected(path, model, collection, STEPS, attributes=ATTRIBUTES, exact=exact, watch=seen.__setitem__)
    assert list(seen) == list(collection.source(STEPS).names)
    with ActivationFile(path) as file:
        for name, by_step in seen.items():
            read = file.by_step(name)
            assert list(by_step) == list(read)
            for step, statistics in by_step.items():
                check_equal(statistics, read[step])
                assert np.array_equal(statistics.moments.sums, read[step].moments.sums)


def test_a_block_pools_its_streams(records: dict[int, StepRecord]) -> None:
    for i in range(4):
        names = [f"mm_block_{i}.{stream}" for stream in ("image", "text")]
        streams = [pooled(records, name) for name in names if name in records[0].seen]
        block = pooled(records, f"mm_block_{i}")
        assert block.count.sum() == sum(int(stream.count.sum()) for stream in streams)
        np.testing.assert_array_equal(block.minimum, np.min([stream.minimum for stream in streams], axis=0))
        assert block.histogram.total == sum(stream.histogram.total for stream in streams)
    assert len(streams) == 1, "the last block has an image stream only"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_type_with_nan_and_inf(tmp_path: Path, manifest: Manifest, dtype: str) -> None:
    records = {}
    for step in (2, 5):
        values = np.random.RandomState(step).randn(3, 100, 7).astype(np.float32)
        values[0, 3, 1], values[1, 4, 2], values[1, 5, 2] = np.nan, np.inf, -np.inf
        x = mx.array(values).astype(MLX_DTYPES[dtype])
        seen = watch(MlxObserver(1, finite_only=True), [{"x_embedder": x}])
        records[step] = StepRecord(step, [4, 0, 9], seen)
    source = Records(["x_embedder"], lambda names: records, 1 << 20, [Block(0, (4, 0)), Block(1, (9,))], halves=1)
    path = tmp_path / "a.h5"
    write_activations(
        path, source, [TapPoint("x_embedder", "embedding")], manifest, [2, 5], {}, ATTRIBUTES, {"x_embedder": 0}
    )
    with ActivationFile(path) as file:
        assert file.images == [4, 0, 9]
        for step in (2, 5):
            own = records[step].seen["x_embedder"]
            check_same(file.statistics("x_embedder", [step]), own.statistics)
            np.testing.assert_array_equal(file.image_ranges("x_embedder", [step])[0], own.ranges.astype(np.float32))
            assert np.isfinite(own.ranges).all()
        merged = file.statistics("x_embedder")
        assert (merged.nan, merged.inf) == (2, 4)
        assert merged.histogram.dtype == dtype
        assert merged.count.tolist() == [600, 598, 596, 600, 600, 600, 600]
        assert file.weight_sqnr("x_embedder") == {}


def read_all(path: Path) -> list[list[float]]:
    with ActivationFile(path) as file:
        found: list[list[float]] = []
        for name in file.layers:
            statistics = file.statistics(name)
            kind = len(file.kind(name))
            found.append(
                [
                    *statistics.over_channels(),
                    *statistics.percentiles().values(),
                    kind,
                    *file.weight_sqnr(name).values(),
                ]
            )
        return found


def test_a_missing_layer_or_step(stored: Path) -> None:
    with ActivationFile(stored) as file:
        calls = (
            lambda: file.statistics("mm_block_9"),
            lambda: file.statistics("x_embedder", [4]),
            lambda: file.image_ranges("x_embedder", [4]),
            lambda: file.statistics("x_embedder/conditional"),
        )
        for call in calls:
            with pytest.raises(CalibError, match=r"activations\.h5"):
                call()


@pytest.mark.parametrize("damage", ["missing", "empty", "foreign", "half", "cut short", "another format", "folder"])
def test_a_file_that_is_not_whole(stored: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "activations.h5"
    content = stored.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_text('{"mm_block_0": {}}' * 1000)
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "cut short":
        path.write_bytes(content[:-1])
    elif damage == "another format":
        with h5py.File(path, "w") as file:
            file["x"] = np.zeros(3)
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(CalibError, match=r"activations\.h5") as error:
        read_all(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lost", ["step_index", "layers", "evaluated_by_sampler", "layers/x_embedder/channel_min"])
def test_a_file_that_lacks_a_part(stored: Path, tmp_path: Path, lost: str) -> None:
    path = tmp_path / "activations.h5"
    shutil.copy(stored, path)
    with h5py.File(path, "a") as file:
        del file[lost]
    with pytest.raises(CalibError, match=r"activations\.h5"), ActivationFile(path) as file:
        file.evaluated_steps()
        file.statistics("x_embedder")


def test_a_later_version(stored: Path, tmp_path: Path) -> None:
    path = tmp_path / "activations.h5"
    shutil.copy(stored, path)
    with h5py.File(path, "a") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(CalibError, match=r"activations\.h5.*version"):
        read_all(path)


@pytest.mark.parametrize("field", [*PER_CHANNEL, "histogram_keys", "histogram_counts"])
def test_a_flipped_bit(stored: Path, tmp_path: Path, field: str) -> None:
    path = tmp_path / "activations.h5"
    shutil.copy(stored, path)
    with h5py.File(path, "r") as file:
        chunk = file[f"layers/mm_block_0.image.mlp.fc1/{field}"].id.get_chunk_info(0)
    flip_byte(path, chunk.byte_offset + chunk.size // 2)
    with pytest.raises(CalibError, match=r"activations\.h5") as error:
        read_all(path)
    assert "\n" not in str(error.value)


def test_analyze_on_a_damaged_file(stored: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "run"
    run.mkdir()
    shutil.copy(stored, run)
    with h5py.File(stored, "r") as file:
        chunk = file["layers/x_embedder/channel_max"].id.get_chunk_info(0)
    flip_byte(run / "activations.h5", chunk.byte_offset + 1)
    outcome = run_here(["analyze", "stats=run"], capsys)
    assert outcome.status in (1, 2)
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("calib: ")
    assert "activations.h5" in outcome.err
    assert not (folder / "outputs").exists()


def test_a_runs_own_file(tiny_run: Path, model: DiffusionModel) -> None:
    with h5py.File(tiny_run / "activations.h5", "r") as file:
        attributes = dict(file.attrs)
    assert attributes["producer"].startswith("calib ")
    assert attributes["model"] == "emoji"
    assert attributes["fingerprint"] == model.fingerprint
    assert attributes["mlx_version"]
    assert attributes["device"]
    assert attributes["git_commit"]
    config = json.loads(attributes["config"])
    assert config["sampler"]["num_steps"] == 4
    assert config["num_images"] == 2
