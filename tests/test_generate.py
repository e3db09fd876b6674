"""Generation in one process: batches, padding, prompts, memory, stored types and states, shards, expected disk."""

import fcntl
import gc
import json
import re
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import calib.dataset.generate
import calib.dataset.writer
import calib.models.model
from calib.activations.taps import TapSelection
from calib.base.device import on_gpu
from calib.base.errors import CalibError, ConfigError
from calib.base.progress import note
from calib.base.seeds import image_seed
from calib.dataset.generate import generate, trajectory
from calib.dataset.images import DrawnImage, bytes_per_image, write_image
from calib.dataset.load import load_manifest
from calib.dataset.manifest import ImageEntry, Manifest
from calib.dataset.sampling import State
from calib.dataset.settings import SamplerSettings
from calib.dataset.shards import Shard, add_entries
from calib.dataset.store import SAMPLES, StateDtype, StorageFormat, read_state, write_trajectory
from calib.models.architecture import Conditioning
from calib.models.encoding import ROWS_KEPT
from calib.models.memory import MemoryPlan, plan_memory
from calib.models.model import DiffusionModel
from calib.models.noise import RectifiedFlow
from calib.models.parallel import parts_for, shared_cores

import h5py
import mlx.core as mx
import numpy as np
import pytest
from damage import IMAGES, SETTINGS
from helpers import PROMPTS, contents, flip_byte, is_one_clear_line, run_here, run_in
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from tiny_models import enlarged
from watching import collection_of

QUICK = SETTINGS
BRIEF = SamplerSettings(num_steps=1, cfg_weight=0.0, batch_size=2)

#: How far a state may be from the same image's in batches of another size, relative to the spread of all values of
#: the state. The shapes of matrix products differ and with them the order of float32 sums: over 8 steps with
#: guidance 3 at most 1.3e-5 was seen between batches of 1, 2, 3 and 6. Storing as float16 rounds by up to 4.9e-4.
BATCH_TOLERANCE = 1e-4
#: GPUs multiply float32 with fewer bits (TF32 has 10); 1.3e-3 was seen on an H200 after a few steps.
GPU_BATCH_TOLERANCE = 5e-2


def make(model: DiffusionModel, folder: Path, num_images: int, given: SamplerSettings = QUICK, **more: Any) -> Path:
    generate(model, more.pop("prompts", PROMPTS), num_images, folder, given, **more)
    return folder


# Batches


def test_other_batch_sizes_agree_within_the_tolerance(model: DiffusionModel, tmp_path: Path) -> None:
    drawn, own = {}, replace(model, decode_latents=enlarged)  # states are compared, not pictures
    for size in (1, 2, 3):
        how = SamplerSettings(num_steps=4, cfg_weight=3.0, batch_size=size)
        folder = make(own, tmp_path / str(size), 3, how, dtype=StateDtype.FLOAT32)
        manifest = load_manifest(folder)
        assert manifest.batch_size == size
        drawn[size] = np.array([[read_state(folder, manifest, image, step) for image in range(3)] for step in range(5)])
    for size in (2, 3):
        for one, other in zip(drawn[1], drawn[size], strict=True):
            assert np.abs(one - other).max() <= (GPU_BATCH_TOLERANCE if on_gpu() else BATCH_TOLERANCE) * one.std()


@pytest.mark.parametrize("image", [0, 1, 2])
def test_what_fills_a_block_changes_nothing(quick: DiffusionModel, tmp_path: Path, image: int) -> None:
    """One image that is drawn alone, its block padded, has the bytes that it has among others."""
    folder = make(quick, tmp_path, 3, replace(QUICK, batch_size=3))
    before = contents(folder)
    for name in load_manifest(folder).images[image].files:
        (folder / name).unlink()
    make(quick, folder, 3, replace(QUICK, batch_size=3))
    assert contents(folder) == before


def test_a_block_of_only_padding_beside_one_image_is_the_same_image(quick: DiffusionModel, tmp_path: Path) -> None:
    alone = make(quick, tmp_path / "alone", 1, replace(QUICK, batch_size=3))
    among = make(quick, tmp_path / "among", 3, replace(QUICK, batch_size=3))
    found, expected = contents(alone), contents(among)
    del found["manifest.json"]
    assert len(found) == 3
    assert found.items() <= expected.items()


def test_the_batch_size_is_the_memorys_where_none_is_asked_for(quick: DiffusionModel, tmp_path: Path) -> None:
    planned = plan_memory(quick, guidance=True).batch_size
    folder = make(quick, tmp_path, 1, replace(QUICK, num_steps=1, batch_size=None))
    assert load_manifest(folder).batch_size == planned > 1


# Prompts


class Counted:
    """A model whose text encoder's calls are recorded."""

    def __init__(self, model: DiffusionModel):
        self.texts: list[str] = []
        self.unloaded: list[int] = []
        encode = model.encode_text

        def encode_text(text: str) -> Conditioning:
            self.texts.append(text)
            return encode(text)

        self.model = replace(model, encode_text=encode_text, unload_text=lambda: self.unloaded.append(len(self.texts)))


def test_a_prompt_is_encoded_once_and_the_empty_one_once_for_all(quick: DiffusionModel, tmp_path: Path) -> None:
    counted = Counted(quick)
    # Two images of a prompt in a block, and a last block of which two thirds are padding.
    texts = ("octopus", "octopus", "rocket", "red apple")
    make(counted.model, tmp_path, 4, replace(QUICK, batch_size=3), prompts=texts)
    assert sorted(counted.texts) == ["", "octopus", "red apple", "rocket"]
    assert counted.unloaded == []
    without = Counted(quick)
    make(without.model, tmp_path / "without", 2, replace(QUICK, cfg_weight=0.0))
    assert sorted(without.texts) == ["octopus", "red apple"], "no guidance, no empty prompt"


def test_conditioning_of_the_last_prompts_is_kept_and_no_more(model: DiffusionModel) -> None:
    counted = Counted(model)
    names = [f"prompt {i}" for i in range(ROWS_KEPT)]
    for name in names:
        counted.model.encode([name], 3.0)
    assert counted.texts == [names[0], "", *names[1:]], "the empty prompt is used all the time, and stays"
    counted.model.encode([names[-1]], 3.0)
    assert len(counted.texts) == ROWS_KEPT + 1
    counted.model.encode([names[0]], 3.0)
    assert counted.texts[-1] == names[0], "it has made room"


def small_memory(model: DiffusionModel, guidance: bool, batch_size: int | None = None, parts: int = 1) -> MemoryPlan:
    """The plan of a machine on which text encoders and transformer do not fit together."""
    plan = plan_memory(model, guidance, batch_size, parts=parts)
    needs = replace(plan.needs, decoders=1, text=100 * plan.needs.transformer)
    weights = needs.text + needs.transformer + needs.decoder
    short = MemoryPlan.of(needs, weights + max(plan.drawing // 2, needs.decoding) - 1, batch_size)
    assert not short.keep_text
    return short


def test_text_encoders_are_unloaded_where_memory_is_short_and_the_files_are_the_same(
    quick: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = replace(QUICK, num_steps=1)
    roomy = make(quick, tmp_path / "roomy", 5, brief)
    counted = Counted(quick)
    with monkeypatch.context() as patch:
        patch.setattr(calib.dataset.generate, "plan_memory", small_memory)
        short = make(counted.model, tmp_path / "short", 5, brief)
        assert counted.unloaded == [6], "once, after all five prompts and the empty one, before anything is drawn"
        # As with many images, whose prompts are encoded some at a time.
        patch.setattr(calib.models.encoding, "ENCODE_AHEAD", 2)
        again = Counted(quick)
        groups = make(again.model, tmp_path / "groups", 5, brief)
        assert again.unloaded == [3, 5, 6]
    assert contents(short) == contents(roomy)
    assert contents(groups) == contents(roomy)


# What is stored


@pytest.fixture(scope="module")
def trajectories(quick: DiffusionModel) -> Sequence[State]:
    """The states of the first two images, computed in the parts of a dataset."""
    seeds, rows = [image_seed(0, i) for i in (0, 1)], 4
    with shared_cores(rows):
        return list(trajectory(quick, PROMPTS[:2], seeds, QUICK, parts_for(rows)))


@pytest.mark.parametrize("storage", list(StorageFormat))
@pytest.mark.parametrize("dtype", list(StateDtype))
def test_states_are_stored_as_their_type_rounds_them(
    quick: DiffusionModel, trajectories: Sequence[State], tmp_path: Path, storage: StorageFormat, dtype: StateDtype
) -> None:
    folder = make(quick, tmp_path, 2, storage=storage, dtype=dtype)
    manifest = load_manifest(folder)
    for state in trajectories:
        for image in (0, 1):
            rounded = state.x[image].astype({"float16": mx.float16, "bfloat16": mx.bfloat16}.get(dtype, mx.float32))
            found = read_state(folder, manifest, image, state.step_index)
            assert found.dtype == (np.float16 if dtype is StateDtype.FLOAT16 else np.float32)
            np.testing.assert_array_equal(found.astype(np.float32), np.array(rounded.astype(mx.float32)))
    kept = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}[dtype]
    if storage is StorageFormat.HDF5:
        with h5py.File(folder / "samples/0001.h5", "r") as file:
            assert file["x"].attrs["dtype"] == dtype.value
            assert file["x"].dtype == kept
    else:
        with np.load(folder / "samples/0001_002.npz") as archive:
            assert archive["x"].dtype == kept


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_bfloat16_makes_the_round_trip_for_all_values(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    x = mx.array(values[np.isfinite(values)])
    stored = StateDtype.BFLOAT16.pack(x)
    assert stored.dtype == np.uint16
    expected = np.array(x.astype(mx.bfloat16).astype(mx.float32))
    np.testing.assert_array_equal(StateDtype.BFLOAT16.unpack(stored), expected)


@pytest.mark.parametrize("storage", list(StorageFormat))
def test_only_the_states_asked_for_are_stored_and_they_are_those_of_a_full_dataset(
    quick: DiffusionModel, tmp_path: Path, storage: StorageFormat
) -> None:
    four = replace(QUICK, num_steps=4)
    full = make(quick, tmp_path / "full", 2, four, storage=storage)
    some = make(quick, tmp_path / "some", 2, four, storage=storage, steps=(4, 0, 3))
    manifest = load_manifest(some)
    assert manifest.steps == [0, 3, 4]
    assert len(manifest.sigmas) == 5
    for image in (0, 1):
        if storage is StorageFormat.HDF5:
            with h5py.File(some / f"samples/{image:04d}.h5", "r") as file:
                assert file["step_index"][:].tolist() == [0, 3, 4]
                assert len(file["x"]) == 3
                np.testing.assert_array_equal(file["sigma"][:], np.float32([manifest.sigmas[i] for i in (0, 3, 4)]))
        else:
            files = sorted(path.name for path in some.glob(f"samples/{image:04d}*"))
            assert files == [f"{image:04d}_{step:03d}.npz" for step in (0, 3, 4)]
        for step in (0, 3, 4):
            expected = read_state(full, load_manifest(full), image, step)
            np.testing.assert_array_equal(read_state(some, manifest, image, step), expected)
        for name in (f"images/{image:04d}.png", f"latents/{image:04d}.npy"):
            np.testing.assert_array_equal(values(some / name), values(full / name))


def values(path: Path) -> NDArray[Any]:
    """Of a picture or a latent."""
    return np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))


def test_a_dataset_of_chosen_states_serves_its_schedule_and_no_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["num_images=2", "sampler.num_steps=4", "sampler.batch_size=2", "taps.include=['*.fc2']", "report=none"]
    schedule = ["timestep_schedule=list", "timestep_schedule.steps=[0,3]"]
    chosen = [*common, "dataset.steps=schedule", *schedule]
    for name, job in (("some", chosen), ("full", [*common, *schedule])):
        outcome = run_here(["generate", *job, f"data_dir={name}", f"hydra.run.dir=generate-{name}"], capsys)
        assert outcome.status == 0, outcome.err
        outcome = run_here(["collect", *job, f"data_dir={name}", f"hydra.run.dir={name}-run"], capsys)
        assert outcome.status == 0, outcome.err
    assert load_manifest(folder / "some").steps == [0, 3]
    found, expected = ((folder / f"{name}-run" / "layer_statistics.json").read_text() for name in ("some", "full"))
    assert found == expected
    line = is_one_clear_line(run_here(["collect", *common, "data_dir=some", "timestep_schedule=all"], capsys))
    assert "state 1" in line and "dataset.steps=all" in line
    line = is_one_clear_line(run_here(["run", *common, "data_dir=some", "timestep_schedule=all"], capsys))
    assert line.startswith("dataset.steps=all: some keeps 2 states of an image, others than these 5;")
    # More images of the same states, not of others.
    outcome = run_here(["generate", *chosen, "num_images=3", "data_dir=some"], capsys)
    assert outcome.status == 0, outcome.err
    line = is_one_clear_line(run_here(["generate", *common, "num_images=4", "data_dir=some"], capsys))
    assert line.startswith("dataset.steps=all: some keeps 2 states")
    assert sorted(load_manifest(folder / "some").images) == [0, 1, 2]


# Disk


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        (StorageFormat.HDF5, StateDtype.FLOAT16),
        (StorageFormat.HDF5, StateDtype.BFLOAT16),
        (StorageFormat.NPZ, StateDtype.FLOAT16),
        (StorageFormat.NPZ, StateDtype.FLOAT32),
    ],
)
def test_the_expected_bytes_are_at_least_and_not_far_above_what_is_written(
    quick: DiffusionModel, tmp_path: Path, storage: StorageFormat, dtype: StateDtype
) -> None:
    how = SamplerSettings(num_steps=12, cfg_weight=0.0, batch_size=3)
    folder = make(quick, tmp_path, 3, how, storage=storage, dtype=dtype)
    expected = 3 * bytes_per_image(load_manifest(folder), (64, 64))
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    on_disk = sum(-(-size // 4096) * 4096 for size in sizes)  # file systems give away blocks
    assert sum(sizes) <= expected
    assert on_disk <= expected
    assert expected <= 2.5 * sum(sizes)


def test_what_is_expected_is_said_before_and_what_remains_after_the_first_batch(
    quick: DiffusionModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(quick, tmp_path, 6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("generate: 6 images to do in batches of 2, up to ")
    assert lines[0].endswith(f" free in {tmp_path}")
    (estimate,) = [line for line in lines if " s an image; about " in line]
    assert "for the other 4, until " in estimate
    make(quick, tmp_path, 5)
    assert capsys.readouterr().err == "", "nothing to do, nothing to say"
    make(quick, tmp_path, 7)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("generate: 1 image to do")
    assert not [line for line in lines if "s an image" in line], "there is no other batch"


@pytest.mark.parametrize("storage", list(StorageFormat))
def test_fifty_steps_of_32_by_32_latents_take_the_room_of_their_values(
    manifest: Manifest, tmp_path: Path, storage: StorageFormat
) -> None:
    levels = np.linspace(1, 0, 51).tolist()
    large = replace(
        manifest,
        num_steps=50,
        steps=list(range(51)),
        sigmas=levels,
        timesteps=[1000 * level for level in levels],
        latent_shape=(32, 32, 16),
        storage=storage.value,
    )
    states = np.random.RandomState(0).randn(51, 32, 32, 16).astype(np.float16)
    names = write_trajectory(tmp_path, 0, states, large, {"image_id": 0})
    taken = sum((tmp_path / name).stat().st_size for name in names)
    assert states.nbytes == 1_671_168
    assert taken <= (1_700_000 if storage is StorageFormat.HDF5 else 1_770_000)
    assert {path.parent.name for path in tmp_path.rglob("*") if path.is_file()} == {SAMPLES}


# Shards


@pytest.fixture(scope="module")
def whole(quick: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes of seven images."""
    return contents(make(quick, tmp_path_factory.mktemp("whole"), 7, BRIEF))


@settings(max_examples=3)
@given(data=st.data())
def test_shards_in_any_order_give_the_files_of_one_process(
    quick: DiffusionModel, whole: dict[str, str], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    parts = tmp_path_factory.mktemp("parts")
    for num_images in (data.draw(st.integers(1, 6)), 7):
        count = data.draw(st.integers(1, 5))
        for index in data.draw(st.permutations(range(count))):
            before = set(load_manifest(parts).images) if (parts / "manifest.json").exists() else set()
            make(quick, parts, num_images, BRIEF, shard=Shard(index, count))
            found = set(load_manifest(parts).images)
            assert {image // 2 % count for image in found - before} <= {index}
            assert {image for image in range(num_images) if image // 2 % count == index} <= found
        assert found >= set(range(num_images))
    assert contents(parts) == whole


def test_a_shard_says_what_it_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", "num_images=5", "sampler.num_steps=1", "sampler.batch_size=2"]
    given += ["data_dir=dataset", "report=none"]
    said = []
    for index in (2, 0, 1):
        job = [*given, f"shard.index={index}", "shard.count=3", f"hydra.run.dir=run{index}"]
        outcome = run_here(job, capsys)
        assert outcome.status == 0, outcome.err
        said.append(outcome.out.splitlines()[0])
        metrics = json.loads((folder / f"run{index}" / "metrics.json").read_text())
        assert f", {metrics['images_generated']} new)" in said[-1]
    assert said == [
        "Dataset: dataset (shard 2 of 3, 1 image, 1 new)",
        "Dataset: dataset (shard 0 of 3, 3 images, 2 new)",
        "Dataset: dataset (shard 1 of 3, 5 images, 2 new)",
    ]


# What others left


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(
    model: DiffusionModel, dataset: Path
) -> None:
    left = [".manifest.json.a1.tmp", "samples/.0004.h5.b2.tmp", "images/.0004.png.c3.tmp"]
    living = dataset / "latents/.0005.npy.d4.tmp"
    for path in (*(dataset / name for name in left), living):
        path.write_bytes(b"half")
    with open(living, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        make(model, dataset, 5)
        assert living.read_bytes() == b"half"
    assert not any((dataset / name).exists() for name in left)
    make(model, dataset, 6)
    assert not living.exists()
    assert sorted(load_manifest(dataset).images) == list(range(6))


@pytest.mark.parametrize("kind", ["samples", "images", "latents"])
def test_a_file_that_is_not_what_was_written_is_drawn_again(model: DiffusionModel, dataset: Path, kind: str) -> None:
    before = contents(dataset)
    (path,) = (dataset / kind).glob("0001.*")
    flip_byte(path, path.stat().st_size - 40)
    assert contents(dataset) != before
    inode = (dataset / "samples/0000.h5").stat().st_ino
    make(model, dataset, IMAGES)
    assert contents(dataset) == before
    assert (dataset / "samples/0000.h5").stat().st_ino == inode, "the others are left as they are"


# Memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(
    model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn lives until it is written, one block behind at most; arrays of earlier blocks are gone."""
    drawn: list[weakref.ref[NDArray[Any]]] = []
    alive = []

    def watched(data_dir: Path, manifest: Manifest, image: DrawnImage) -> ImageEntry:
        drawn.append(weakref.ref(image.states))
        gc.collect()
        alive.append(sum(states() is not None for states in drawn))
        return write_image(data_dir, manifest, image)

    def peak(num_images: int) -> int:
        gc.collect()  # what other tests left
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        # One picture at a time: parts of a batch run side by side, and their peaks may meet or not.
        make(model, tmp_path / str(num_images), num_images, replace(BRIEF, batch_size=1))
        return mx.get_peak_memory() - before

    few = peak(4)
    monkeypatch.setattr(calib.dataset.writer, "write_image", watched)
    many = peak(10)
    assert len(drawn) == 10
    assert max(alive) <= 4
    assert many <= 1.05 * few


# What got lost, or cannot be


def test_images_without_their_manifest_are_not_drawn_over(model: DiffusionModel, dataset: Path) -> None:
    (dataset / "manifest.json").unlink()
    before = contents(dataset)
    with pytest.raises(CalibError, match=r"files of 4 images but no manifest.*calib rebuild-manifest"):
        make(model, dataset, IMAGES)
    line = is_one_clear_line(run_in(dataset.parent, "generate", "num_images=9", "data_dir=dataset"), status=1)
    assert "calib rebuild-manifest dataset" in line
    assert contents(dataset) == before


def test_other_text_encoders_are_another_dataset(model: DiffusionModel, dataset: Path, tmp_path: Path) -> None:
    other = replace(model, text_encoders="clip_l+t5")
    with pytest.raises(CalibError, match=r"text_encoders=emoji, not clip_l\+t5"):
        make(other, dataset, IMAGES + 1)
    with pytest.raises(CalibError, match=r"encoded by emoji, not clip_l\+t5"):
        collection_of(other, dataset, tmp_path / "cache", [0], TapSelection(include=("x_embedder",))).collect([0])


def test_an_image_that_cannot_be_stored_is_left_out_and_told_and_the_others_are_drawn(
    quick: DiffusionModel, tmp_path: Path
) -> None:
    """The model gives one image NaN: the second row of the first block."""

    class Failing(DiffusionModel):
        def denoise(self, x: mx.array, timestep: mx.array, sigma: mx.array, text: Conditioning, *more: Any) -> mx.array:
            good = super().denoise(x, timestep, sigma, text, *more)
            first = mx.all(text.tokens[1] == octopus)
            return mx.concatenate([good[:1], mx.where(first, mx.array(float("nan")), good[1:])])

    octopus = quick.encode([PROMPTS[1]], 0.0).tokens[0]
    failing = Failing.__new__(Failing)
    vars(failing).update(vars(quick))
    with pytest.raises(CalibError, match=r"image 1: the model drew NaN.*left out; 3 of 4 images done and kept"):
        make(failing, tmp_path, 4)
    assert sorted(load_manifest(tmp_path).images) == [0, 2, 3]
    make(quick, tmp_path, 4)
    assert sorted(load_manifest(tmp_path).images) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("computed", "stored", "factor", "told", "untold"),
    [
        (mx.float16, StateDtype.FLOAT16, np.nan, "drew NaN.* model.dtype=float32 may not", "dataset.dtype"),
        (mx.bfloat16, StateDtype.FLOAT32, np.inf, "drew NaN.* model.dtype=float32 may not", "dataset.dtype"),
        (mx.float32, StateDtype.FLOAT16, np.nan, "drew NaN.* see sampler.cfg_weight=3.0, sampler.shift=1.0", "dtype="),
        (mx.float32, StateDtype.FLOAT16, 1e6, "beyond float16's range.* dataset.dtype=float32", "model.dtype"),
        (mx.bfloat16, StateDtype.FLOAT16, 1e6, "beyond float16's range.* dataset.dtype=float32", "model.dtype"),
    ],
)
def test_advice_for_images_that_cannot_be_stored(
    quick: DiffusionModel, tmp_path: Path, computed: mx.Dtype, stored: StateDtype, factor: float, told: str, untold: str
) -> None:
    """It is none that is followed already. Six images have one line, which numbers five."""

    class Failing(DiffusionModel):
        def denoise(self, x: mx.array, *_: Any) -> mx.array:
            return x * factor

    failing = Failing.__new__(Failing)
    vars(failing).update(vars(quick), dtype=computed)
    given = SamplerSettings(num_steps=1, cfg_weight=3.0, batch_size=6)
    with pytest.raises(CalibError) as error:
        make(failing, tmp_path, 6, given, dtype=stored)
    line = str(error.value)
    assert line.startswith("images 0, 1, 2, 3, 4, … (6 in all): ") and "\n" not in line
    assert re.search(told, line) and untold not in line, line
    assert "left out; 0 of 6 images done and kept" in line


def test_a_picture_of_nan_is_left_out(quick: DiffusionModel, tmp_path: Path) -> None:
    """Its latent is as it should be: the decoder failed."""
    failing = DiffusionModel.__new__(DiffusionModel)
    vars(failing).update(vars(quick), decode_latents=lambda x: mx.full((1, 64, 64, 3), np.nan))
    with pytest.raises(CalibError, match=r"^image 0: the model drew NaN or infinity: left out; 0 of 1 image done"):
        make(failing, tmp_path, 1, BRIEF)


def test_levels_that_are_not_finite(model: DiffusionModel, tmp_path: Path) -> None:
    """Of a model of the user's own: calib's are finite at every shift that is taken."""
    failing = DiffusionModel.__new__(DiffusionModel)
    vars(failing).update(vars(model), sampler=RectifiedFlow(1e-9))
    with pytest.raises(ConfigError, match=r"^sampler\.shift=1\.0: emoji makes noise levels of it that are not finite"):
        make(failing, tmp_path / "dataset", 1, BRIEF)
    assert not (tmp_path / "dataset").exists()


def test_a_device_that_fails_ends_with_one_line_that_says_what_is_done(quick: DiffusionModel, tmp_path: Path) -> None:
    calls = 0

    class Failing(DiffusionModel):
        def denoise(self, *arguments: mx.array, **named: mx.array) -> mx.array:
            nonlocal calls
            calls += 1
            if calls > QUICK.num_steps:
                raise RuntimeError("[malloc] Unable to allocate 9 bytes.")
            return super().denoise(*arguments, **named)

    failing = Failing.__new__(Failing)
    vars(failing).update(vars(quick))
    with pytest.raises(CalibError, match=r"Unable to allocate 9 bytes.*2 of 4 images done and kept.*smaller") as error:
        make(failing, tmp_path, 4)
    assert "\n" not in str(error.value)
    instead = "a smaller sampler.batch_size or a smaller sampler.image_size or model.stream=true"
    assert str(error.value).endswith(f"with {instead}")
    assert sorted(load_manifest(tmp_path).images) == [0, 1]


def test_what_is_no_failure_of_the_device_is_not_called_one(quick: DiffusionModel, tmp_path: Path) -> None:
    """A time limit, say: submitit ends a job with an error that is a RuntimeError by descent."""

    class TimedOut(RuntimeError): ...

    class Ending(DiffusionModel):
        def denoise(self, *arguments: mx.array, **named: mx.array) -> mx.array:
            raise TimedOut("timed-out too many times")

    ending = Ending.__new__(Ending)
    vars(ending).update(vars(quick))
    with pytest.raises(TimedOut):
        make(ending, tmp_path, 2)


def test_a_slow_manifest_is_written_less_often_and_complete_in_the_end(
    quick: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []

    def slow(data_dir: Path, entries: Sequence[ImageEntry]) -> None:
        writes.append(len(entries))
        time.sleep(0.3)
        add_entries(data_dir, entries)

    monkeypatch.setattr(calib.dataset.writer, "add_entries", slow)
    singly = replace(BRIEF, batch_size=1)
    folder = make(quick, tmp_path / "slow", 7, singly)
    assert writes[0] == 1 and sum(writes) == 7 and len(writes) == 2
    monkeypatch.undo()
    assert contents(folder) == contents(make(quick, tmp_path / "plain", 7, singly))


def test_a_dataset_keeps_its_batch_size_and_says_so(
    model: DiffusionModel, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note.cache_clear()
    make(model, dataset, IMAGES + 1, replace(QUICK, batch_size=3))
    assert "begun with sampler.batch_size=2, which is kept" in capsys.readouterr().err
