"""docs/FORMAT.md says what real files hold, opened as others will: by h5py, xarray and h5dump, not calib's reader."""

import json
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from calib.activations.format import Block
from calib.activations.histogram import Histogram
from calib.activations.observer import TapResult
from calib.activations.record import StepRecord
from calib.activations.statistics import Moments, Statistics
from calib.activations.store import Records, write_activations
from calib.activations.taps import TapPoint

import h5py
import numpy as np
import pytest
import xarray as xr
from helpers import CHECKOUT, TINY, flip_byte, run_in
from numpy.typing import NDArray

DOCUMENT = (CHECKOUT / "docs" / "FORMAT.md").read_text(encoding="utf-8")
HALVES = ("conditional", "unconditional")

#: Runs on the dataset of ``tiny_run``, itself "whole"; together they have every field.
ONE_BLOCK = ("taps=all", "taps.include=mm_block_0*")
ONE_STREAM = ("taps=all", "taps.include=['mm_block_0','mm_block_0.image.*']")
SHARD = ("taps.include=mm_block_0*", "collect.batch_size=1", "shard.count=2")
RUNS = {
    "sampled": (*ONE_BLOCK, "storage=sampled"),
    "apart": (*ONE_STREAM, "taps.cfg_halves=apart", "storage=full", "storage.dtype=bfloat16"),
    "shard 0": (*SHARD, "shard.index=0"),
    "shard 1": (*SHARD, "shard.index=1"),
}
NAMES = ("whole", *RUNS)
every_file = pytest.mark.parametrize("name", NAMES)


def some_files(*by_default: str) -> pytest.MarkDecorator:
    """Every file, of which those that are not named are slow."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in by_default else pytest.mark.slow) for name in NAMES]
    )


@pytest.fixture(scope="module")
def files(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("format")
    found = {"whole": tiny_run / "activations.h5"}
    for name, overrides in RUNS.items():
        place = (f"data_dir={tiny_run.parent / 'dataset'}", f"hydra.run.dir={folder / name.replace(' ', '_')}")
        outcome = run_in(folder, "collect", *TINY, *place, *overrides)
        assert outcome.status == 0, outcome.err
        found[name] = folder / name.replace(" ", "_") / "activations.h5"
    return found


def section(title: str) -> str:
    """The document's text under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[1]


def table(title: str, what: str) -> dict[str, list[str]]:
    """Rows of a section's table of ``what``, by the name in the first column."""
    _, _, rest = section(title).partition(f"| {what} |")
    lines = [line.split(" | ") for line in rest.partition("\n\n")[0].splitlines()[2:]]
    return {name: cells for first, *cells in lines for name in re.findall(r"`([^`]+)`", first)}


ATTRIBUTES = {place: table(place, "attribute") for place in ("Root", "Layers")}
#: By place and name: type, axes, when it is there, what it is.
DATASETS = {place: table(place, "dataset") for place in ("Root", "Layers")}
GROUPS = table("Root", "group")
CHECKED = set(re.findall(r"`(\w+)`", section("Checksums").partition("MUST")[0]))
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def layer_groups(file: h5py.File) -> Iterator[tuple[str, h5py.Group]]:
    for place in GROUPS:
        for name, group in file[place].items() if place in file else ():
            yield f"{place}/{name}", group


def places(file: h5py.File) -> Iterator[tuple[str, str, h5py.Group]]:
    yield "Root", "", file
    for path, group in layer_groups(file):
        yield "Layers", path, group


def documented(place: str, *when: str) -> set[str]:
    return {name for name, cells in DATASETS[place].items() if cells[2] in when}


def own(group: h5py.Group) -> dict[str, h5py.Dataset]:
    return {name: item for name, item in group.items() if isinstance(item, h5py.Dataset)}


def type_of(dtype: np.dtype[Any]) -> str:
    return "string" if h5py.check_string_dtype(dtype) else str(dtype)


def test_the_document_can_be_tested() -> None:
    assert [len(ATTRIBUTES[place]) for place in ("Root", "Layers")] == [14, 8]
    assert {place: len(found) for place, found in DATASETS.items()} == {"Root": 9, "Layers": 19}
    assert set(GROUPS) == {"layers", *HALVES}
    assert {"channel_min", "samples"} < CHECKED < set(DATASETS["Layers"])
    assert len(BLOCKS) == 2


@every_file
def test_fields(files: dict[str, Path], name: str) -> None:
    with h5py.File(files[name]) as file:
        shards = ["shards"] if file.attrs["shard_count"] > 1 else []
        assert bool(shards) == name.startswith("shard")
        assert set(file) - set(own(file)) == ({"layers", *HALVES} if name == "apart" else {"layers"})
        for place, path, group in places(file):
            assert set(group.attrs) == set(ATTRIBUTES[place]), path
            if place == "Layers":
                assert len(own(group)) == len(group), "no groups in groups of layers"
            fields = set(own(group))
            assert fields >= documented(place, "always", *shards), path
            optional = fields - documented(place, "always", *shards)
            assert not optional or path.startswith("layers/"), path
            pooled = group.attrs.get("kind") == "block" and not path.endswith((".image", ".text"))
            sampled = name in ("sampled", "apart") and path.startswith("layers/") and not pooled
            assert optional - documented(place, "weights") == (documented(place, "samples") if sampled else set()), path


def test_every_field_is_in_some_file(files: dict[str, Path]) -> None:
    found: dict[str, set[str]] = {"Root": set(), "Layers": set()}
    for path in files.values():
        with h5py.File(path) as file:
            for place, _, group in places(file):
                found[place] |= set(own(group))
    assert found == {place: set(fields) for place, fields in DATASETS.items()}
    mentioned = set(re.findall(r"`(\w+)`", DOCUMENT))
    assert {"CLASS", "NAME", "REFERENCE_LIST", "DIMENSION_LIST"} <= mentioned


@every_file
def test_attributes(files: dict[str, Path], name: str) -> None:
    with h5py.File(files[name]) as file:
        for place, path, group in places(file):
            for field, (kind, _) in ATTRIBUTES[place].items():
                found = group.attrs[field]
                assert kind == ("string" if isinstance(found, str) else found.dtype), f"{path} {field}"
        assert (file.attrs["format"], file.attrs["format_version"]) == ("calib-activations", 2)
        assert json.loads(file.attrs["config"])["model"]["name"] == file.attrs["model"]
        named = re.findall(r"`(\w+)`", ATTRIBUTES["Root"]["collection"][1])
        assert list(json.loads(file.attrs["collection"])) == named
        kinds = set(re.findall(r"`([\w-]+)`", ATTRIBUTES["Layers"]["kind"][1]))
        for path, group in layer_groups(file):
            assert group.attrs["kind"] in kinds
            assert (group.attrs["encoding-type"], group.attrs["encoding-version"]) == ("layer-statistics", "2")
            assert f"| `{group.attrs['dtype']}` | `{group.attrs['encoding']}` |" in section("Layers")
            assert group.attrs["count"] == group["channel_count"][:].sum(), path


@every_file
def test_types_and_scales(files: dict[str, Path], name: str) -> None:
    with h5py.File(files[name]) as file:
        for place, path, group in places(file):
            for field, dataset in own(group).items():
                kind, along, *_ = DATASETS[place][field]
                axes, where = along.split(", "), f"{path}/{field}"
                assert type_of(dataset.dtype) in kind.split(" or "), where
                assert dataset.ndim == len(axes), where
                assert bool(dataset.is_scale) == (axes == [field]), where
                for axis, scale in enumerate(axes):
                    wanted = group[scale] if scale in group else file[scale]
                    assert dataset.shape[axis] == len(wanted), where
                    if scale != field:
                        assert [*dataset.dims[axis].values()] == [wanted], f"{where}: one scale an axis"
            if place == "Layers":
                assert group["channel"][:].tolist() == list(range(group.attrs["channels"]))
        statistics = file["range_statistic"].asstr()[:].tolist()
        assert ", ".join(f"`{statistic}`" for statistic in statistics) == DATASETS["Root"]["range_statistic"][3][:-2]
        if "moment" in file:
            moments = file["moment"].asstr()[:].tolist()
            assert ", ".join(f"`{moment}`" for moment in moments) == DATASETS["Root"]["moment"][3][:-2]


@every_file
def test_filters_and_checksums(files: dict[str, Path], name: str) -> None:
    builtin = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
    with h5py.File(files[name]) as file:
        assert file.id.get_create_plist().get_version()[0] == 0, "a superblock that HDF5 1.8 reads"
        tracked = h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED
        order = file["step_index"].id.get_create_plist().get_attr_creation_order()
        assert order == tracked, "or no more than 4,096 datasets could lie along the steps"
        for _, path, group in places(file):
            for field, dataset in own(group).items():
                plist = dataset.id.get_create_plist()
                assert {plist.get_filter(i)[0] for i in range(plist.get_nfilters())} <= builtin, f"{path}/{field}"
                assert bool(dataset.fletcher32) == (field in CHECKED), f"{path}/{field}"


def test_steps(files: dict[str, Path], tiny_run: Path) -> None:
    manifest = json.loads((tiny_run.parent / "dataset" / "manifest.json").read_text())
    with h5py.File(files["whole"]) as file:
        steps, last = file["step_index"][:], file.attrs["num_steps"]
        assert np.all(np.diff(steps) > 0)
        assert file["evaluated_by_sampler"][:].tolist() == (steps < last).tolist() == [True] * 4 + [False]
        assert file["sigma"][[0, -1]].tolist() == [1, 0]
        np.testing.assert_allclose(file["timestep"][:], 1000 * file["sigma"][:], rtol=1e-6)
        assert file["image_id"][:].tolist() == [image["image_id"] for image in manifest["images"]]


def documented_key_values() -> Any:
    """The example's own decoding of keys."""
    namespace: dict[str, Any] = {}
    exec(BLOCKS[0].partition("with h5py.File")[0], namespace)
    return namespace["key_values"]


def keys_of(patterns: NDArray[Any]) -> NDArray[np.uint16]:
    """As the document defines them."""
    return np.where(patterns & 0x8000, patterns ^ 0xFFFF, patterns | 0x8000).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_keys(dtype: str) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint32)
    wide = patterns << 16
    with np.errstate(invalid="ignore"):
        values = patterns.astype(np.uint16).view(np.float16) if dtype == "float16" else wide.view(np.float32)
    finite = np.isfinite(values)
    keys, lower = keys_of(patterns[finite]), values[finite].astype(np.float64)
    assert len(set(keys)) == len(keys)
    assert np.all(np.diff(lower[np.argsort(keys)]) >= 0)
    found = documented_key_values()(keys, dtype)
    if dtype != "float32":
        np.testing.assert_array_equal(found, lower)
        return
    # Both ends of each bin lie within 2^-8 of what stands for it.
    upper = (wide[finite] | 0xFFFF).view(np.float32).astype(np.float64)
    normal = np.abs(lower) >= np.finfo(np.float32).tiny
    for end in (lower, upper):
        assert np.all(np.abs(found - end)[normal] <= np.abs(end)[normal] * 2.0**-8)
    assert found[lower == 0].tolist() == [0, 0]


@every_file
def test_bins(files: dict[str, Path], name: str) -> None:
    key_values = documented_key_values()
    with h5py.File(files[name]) as file:
        for path, group in layer_groups(file):
            offsets, keys, counts = (group[f"histogram_{field}"][:] for field in ("offsets", "keys", "counts"))
            assert (offsets[0], offsets[-1]) == (0, len(keys)) and np.all(np.diff(offsets) > 0), path
            assert np.all(counts > 0)
            for row in range(len(offsets) - 1):
                part = slice(offsets[row], offsets[row + 1])
                assert np.all(np.diff(keys[part].astype(int)) > 0), path
                sampled, seen = counts[part].sum(), group["channel_count"][row].sum()
                assert sampled == seen if group.attrs["kind"] == "post-silu" else 0 < sampled <= seen, path
                values, room = key_values(keys[part], group.attrs["dtype"]), 1 + 2.0**-7
                low, high = group["channel_min"][row].min(), group["channel_max"][row].max()
                assert values[0] >= min(low * room, low / room) and values[-1] <= max(high * room, high / room), path
            assert not group["nan_count"][:].any() and not group["inf_count"][:].any()


@every_file
def test_image_ranges(files: dict[str, Path], name: str) -> None:
    with h5py.File(files[name]) as file:
        for path, group in layer_groups(file):
            low, high, p01, p99 = np.moveaxis(group["image_ranges"][:], -1, 0)
            np.testing.assert_array_equal(low.min(axis=1), group["channel_min"][:].min(axis=1), path)
            np.testing.assert_array_equal(high.max(axis=1), group["channel_max"][:].max(axis=1), path)
            assert np.all((low <= p01 + 0.004 * abs(p01)) & (p01 <= p99) & (p99 - 0.004 * abs(p99) <= high)), path


@every_file
def test_layers_that_read_one_array(files: dict[str, Path], name: str) -> None:
    shared = 0
    with h5py.File(files[name]) as file:
        for path, group in layer_groups(file):
            if not path.endswith("attn.q_proj"):
                continue
            for alias in ("k_proj", "v_proj"):
                other = file[path.replace("q_proj", alias)]
                assert {**other.attrs, "order": 0} == {**group.attrs, "order": 0}
                assert {field for field in other if other[field] == group[field]} == set(other) - {"weight_sqnr"}
                assert set(other) == set(group)
                shared += 1
    assert shared == (16 if name == "whole" else 6 if name == "apart" else 4)


def test_order(files: dict[str, Path]) -> None:
    """A block stands before its layers, its streams stand with it, and no two layers in one place."""
    with h5py.File(files["apart"]) as file:
        order = {name: int(group.attrs["order"]) for name, group in file["layers"].items()}
    assert order.pop("mm_block_0.image") == order.pop("mm_block_0.text") == order["mm_block_0"]
    ends = ("adaln", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2")
    assert sorted(order, key=order.__getitem__) == ["mm_block_0", *(f"mm_block_0.image.{end}" for end in ends)]
    assert len(set(order.values())) == len(order)


def histograms(group: h5py.Group) -> list[dict[int, int]]:
    offsets, keys, counts = (group[f"histogram_{field}"][:] for field in ("offsets", "keys", "counts"))
    parts = [slice(*offsets[row : row + 2]) for row in range(len(offsets) - 1)]
    return [dict(zip(keys[part].tolist(), counts[part].tolist(), strict=True)) for part in parts]


def test_halves(files: dict[str, Path]) -> None:
    with h5py.File(files["apart"]) as file:
        assert set(file["layers"]) == set(file["conditional"]) == set(file["unconditional"])
        for name, both in file["layers"].items():
            one, other = (file[half][name] for half in HALVES)
            assert one["channel_min"] != other["channel_min"]
            np.testing.assert_array_equal(both["channel_count"][:], one["channel_count"][:] + other["channel_count"])
            np.testing.assert_array_equal(both["channel_min"][:], np.minimum(one["channel_min"], other["channel_min"]))
            np.testing.assert_array_equal(both["channel_max"][:], np.maximum(one["channel_max"], other["channel_max"]))
            for merged, *parts in zip(*map(histograms, (both, one, other)), strict=True):
                keys = {key for part in parts for key in part}
                assert merged == {key: sum(part.get(key, 0) for part in parts) for key in keys}


def sampled_values(group: h5py.Group) -> NDArray[np.float32]:
    samples = group["samples"]
    if samples.attrs["dtype"] == "bfloat16":
        return (samples[:].astype(np.uint32) << 16).view(np.float32)
    assert samples.attrs["dtype"] == "float16"
    return np.asarray(samples[:].astype(np.float32))


@pytest.mark.parametrize("name", ["sampled", "apart"])
def test_samples(files: dict[str, Path], name: str) -> None:
    rounding = 2.0**-11 if name == "sampled" else 2.0**-8
    found = 0
    with h5py.File(files[name]) as file:
        images = file["image_id"][:].tolist()
        for path, group in layer_groups(file):
            if "samples" not in group:
                continue
            found += 1
            values, steps = sampled_values(group), len(file["step_index"])
            low, high = group["channel_min"][:][:, None], group["channel_max"][:][:, None]
            room = rounding * np.maximum(abs(low), abs(high)) + 2.0**-24
            assert np.all((low - room <= values) & (values <= high + room)), path
            order = [*zip(group["sample_half"][:].tolist(), group["sample_image"][:].tolist(), strict=True)]
            each = len(order) // 2 // len(images)
            assert order == [(half, image) for half in (0, 1) for image in images for _ in range(each)]
            tokens = group["sample_token"][:].reshape(steps, 2, len(images), each)
            assert np.all(np.diff(tokens, axis=-1) > 0), path
            np.testing.assert_array_equal(tokens[:, 0], tokens[:, 1])
            if name == "apart":  # everything was kept: the samples give the statistics back
                assert values.shape[1] == group["channel_count"][0, 0]
                np.testing.assert_allclose(values.max(axis=1)[:, None], high, atol=room.max(), rtol=0)
                np.testing.assert_allclose(values.min(axis=1)[:, None], low, atol=room.max(), rtol=0)
    assert found == (16 if name == "sampled" else 9), "six layers of a stream, its adaLN, and both streams' outputs"


def test_shards(files: dict[str, Path]) -> None:
    with h5py.File(files["whole"]) as whole, h5py.File(files["shard 0"]) as one, h5py.File(files["shard 1"]) as other:
        for attribute in ("collection", "fingerprint", "shard_count"):
            assert one.attrs[attribute] == other.attrs[attribute]
        assert [file.attrs["shard_index"] for file in (one, other)] == [0, 1]
        assert [file["image_block"][:].tolist() for file in (whole, one, other)] == [[0, 0], [0], [1]]
        assert one["image_id"][:].tolist() + other["image_id"][:].tolist() == whole["image_id"][:].tolist()
        for name in one["layers"]:
            groups = [file["layers"][name] for file in (one, other)]
            count = sum(group["channel_count"][:].astype(np.longdouble) for group in groups)
            sums = sum(group["channel_sums"][:].astype(np.longdouble) for group in groups)
            first, second = sums[:, 0] + sums[:, 1], sums[:, 2] + sums[:, 3]
            mean, std = whole["layers"][name]["channel_mean"][:], whole["layers"][name]["channel_std"][:]
            np.testing.assert_array_equal(count, whole["layers"][name]["channel_count"])
            # Batches of another size are other matrix shapes, and differ by float rounding.
            scale = np.abs(mean) + std + 1e-6
            assert np.all(np.abs(first / count - mean) <= 1e-4 * scale)
            assert np.all(np.abs(np.sqrt(np.maximum(second - first**2 / count, 0) / count) - std) <= 1e-3 * scale)


@some_files("whole", "sampled", "shard 0")
def test_xarray(files: dict[str, Path], name: str) -> None:
    with h5py.File(files[name]) as file:
        paths = [path for path, _ in layer_groups(file)]
    # Of many groups every fifth: xarray is slow, and axes of all are looked at by h5py.
    groups = [("Root", None), *(("Layers", path) for path in paths[:: 5 if len(paths) > 20 else 1])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # renamed and invented dimensions are told by warnings
        for place, path in groups:
            with xr.open_dataset(files[name], engine="h5netcdf", group=path) as opened:
                assert opened.load().variables
                for field, variable in opened.variables.items():
                    assert ", ".join(map(str, variable.dims)) == DATASETS[place][str(field)][1], f"{path}/{field}"


def test_xarray_tree(files: dict[str, Path]) -> None:
    with xr.open_datatree(files["apart"], engine="h5netcdf") as tree, h5py.File(files["apart"]) as file:
        assert set(tree.children) == {"layers", *HALVES}
        for path, group in layer_groups(file):
            layer = tree[path]
            assert set(layer.dataset.data_vars) | set(layer.dataset.coords) >= set(group)
            assert layer["step_index"].values.tolist() == file["step_index"][:].tolist(), "inherited from the root"
        chosen = tree["conditional/mm_block_0.image.mlp.fc2"].image_ranges.sel(range_statistic="max", step_index=0)
        assert chosen.dims == ("image_id",)


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not installed (Debian's package hdf5-tools)")
@some_files("whole", "sampled")
def test_h5dump(files: dict[str, Path], name: str, tmp_path: Path) -> None:
    surroundings = os.environ | {"HDF5_PLUGIN_PATH": str(tmp_path / "nowhere")}
    done = subprocess.run(["h5dump", str(files[name])], capture_output=True, text=True, env=surroundings)
    assert (done.returncode, done.stderr) == (0, "")
    with h5py.File(files[name]) as file:
        printed = re.findall(r'^ *DATASET "(.*)" \{', done.stdout, re.MULTILINE)
        assert len(printed) == sum(len(own(group)) for *_, group in places(file))
        count = file["layers/mm_block_0.image.mlp.fc2/histogram_counts"][:].max()
        assert re.search(rf"\b{count}\b", done.stdout), "compressed data is printed, not only described"


@pytest.fixture
def run_folder(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> h5py.Group:
    """The layer of the examples; they run beside its file."""
    monkeypatch.chdir(files["whole"].parent)
    with h5py.File("activations.h5") as file:
        yield file["layers/mm_block_0.image.mlp.fc2"]


def test_h5py_example(run_folder: h5py.Group, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {}
    exec(BLOCKS[0], found)
    first, end = run_folder["histogram_offsets"][:2]
    keys, counts = run_folder["histogram_keys"][first:end], run_folder["histogram_counts"][first:end]
    values = np.repeat(found["key_values"](keys, "float32"), counts.astype(int))
    assert found["p99"] == np.percentile(values, 99, method="lower")
    np.testing.assert_array_equal(found["channel_low"], run_folder["channel_min"][:4].min(axis=0))
    assert found["image_high"].max() == found["channel_high"].max() == run_folder["channel_max"][:4].max()
    assert capsys.readouterr().out.startswith("p99 ")


def test_xarray_example(run_folder: h5py.Group, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {}
    exec(BLOCKS[1], found)
    spread = run_folder["channel_max"][:4].max(axis=1) - run_folder["channel_min"][:4].min(axis=1)
    np.testing.assert_array_equal(found["spread"].values, spread)
    assert found["spread"].coords["step_index"].values.tolist() == [0, 1, 2, 3]
    assert found["spread"].sigma.values[0] == 1
    assert found["p99_of_images"].image_id.values.tolist() == [0, 1]
    assert "range" in capsys.readouterr().out


@pytest.mark.parametrize("field", sorted(CHECKED))
def test_a_flipped_bit(files: dict[str, Path], tmp_path: Path, field: str) -> None:
    layer = "layers/mm_block_0.image.mlp.fc2"
    damaged = shutil.copy(files["shard 0" if field == "channel_sums" else "sampled"], tmp_path / "activations.h5")
    with h5py.File(damaged) as file:
        chunk = file[layer][field].id.get_chunk_info(0)
    flip_byte(damaged, chunk.byte_offset + chunk.size // 2)
    with h5py.File(damaged) as file:
        for other, dataset in own(file[layer]).items():
            if other == field:
                with pytest.raises(OSError):
                    dataset[:]
            else:
                dataset[:]


def written(path: Path, seen: Mapping[str, Statistics]) -> Path:
    """A file of one step of one image."""
    record = StepRecord(0, [0], {name: TapResult("float32", found, np.zeros((1, 4))) for name, found in seen.items()})

    def load(names: Any) -> dict[int, StepRecord]:
        return {0: StepRecord(0, [0], {name: record.seen[name] for name in names})}

    source = Records(list(seen), load, 1 << 20, [Block(0, (0,))], 1)
    order = {name: place for place, name in enumerate(seen)}
    manifest: Any = SimpleNamespace(num_steps=1, sigmas=[1.0, 0.0], timesteps=[1000.0, 0.0])
    write_activations(path, source, [TapPoint(name, "embedding") for name in seen], manifest, [0], {}, {}, order)
    return path


def one_value(value: float) -> Statistics:
    bounds, count = np.full(1, value, np.float32), np.ones(1, np.uint64)
    moments = Moments.of(count, bounds.astype(np.float64), np.zeros(1))
    return Statistics(bounds, bounds, count, moments, Histogram("float32", np.full(1, 0x8000, np.uint16), count))


@pytest.mark.slow
def test_more_datasets_than_fit_a_compact_attribute(tmp_path: Path) -> None:
    """SD3 with its halves apart has some 4,700; a list of 4,096 exceeds the 64 KiB of an old attribute."""
    path = written(tmp_path / "a.h5", {f"layer_{i}": one_value(i) for i in range(520)})
    with h5py.File(path) as file:
        assert len(file["step_index"].attrs["REFERENCE_LIST"]) > 4096
        for i in (0, 519):
            assert file[f"layers/layer_{i}/channel_max"].dims[0][0] == file["step_index"]
            assert file[f"layers/layer_{i}/channel_max"][0, 0] == i
    with xr.open_dataset(path, engine="h5netcdf", group="layers/layer_519") as opened:
        assert opened.channel_max.dims == ("step_index", "channel")
    if shutil.which("h5dump"):
        command = ["h5dump", "-d", "/layers/layer_7/channel_max", str(path)]
        assert "(0,0): 7" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Scales are attached last, or every new entry would leave the old list's room empty: a fifth of a large file.
    with h5py.File(path) as file:
        bare = sum(dataset.id.get_storage_size() for _, _, group in places(file) for dataset in own(group).values())
        assert path.stat().st_size - bare < 520 * 40_000


def test_no_finite_value(tmp_path: Path) -> None:
    nothing = Statistics(
        np.full(3, np.inf, np.float32),
        np.full(3, -np.inf, np.float32),
        np.zeros(3, np.uint64),
        Moments.zero(3),
        Histogram("float32"),
        nan=7,
    )
    path = written(tmp_path / "a.h5", {"x_embedder": nothing, "y_embedder.0": one_value(1)})
    with h5py.File(path) as file:
        group = file["layers/x_embedder"]
        assert group["channel_min"][0].tolist() == [np.inf] * 3
        assert group["channel_max"][0].tolist() == [-np.inf] * 3
        assert not group["channel_mean"][:].any() and not group["channel_std"][:].any()
        assert (group["histogram_offsets"][:].tolist(), len(group["histogram_keys"])) == ([0, 0], 0)
        assert group["nan_count"][0] == 7
    with xr.open_dataset(path, engine="h5netcdf", group="layers/x_embedder") as opened:
        assert opened.histogram_counts.dims == ("histogram_keys",)
