"""The dataset: the same bytes however the work is split, interrupted or repeated, in the layout of DESIGN section 5."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError
from calib.base.files import checksum
from calib.base.seeds import image_seed
from calib.dataset.generate import generate, trajectory
from calib.dataset.load import load_manifest
from calib.dataset.manifest import Manifest
from calib.dataset.settings import SamplerSettings
from calib.dataset.store import StateDtype, StorageFormat, read_state
from calib.models import emoji
from calib.models.model import DiffusionModel
from calib.models.parallel import parts_for, shared_cores

import h5py
import mlx.core as mx
import numpy as np
import pytest
from damage import IMAGES, SETTINGS
from helpers import PROMPTS, SAMPLER, contents, flip_byte, pipeline_of
from PIL import Image

QUICK = SETTINGS


def make(model: DiffusionModel, folder: Path, num_images: int, settings: SamplerSettings = QUICK, **more: Any) -> Path:
    generate(model, more.pop("prompts", PROMPTS), num_images, folder, settings, **more)
    return folder


def test_the_folder_holds_what_the_design_says_and_nothing_else(data_dir: Path) -> None:
    expected = ["manifest.json"]
    for image in range(4):
        expected += [f"images/{image:04d}.png", f"latents/{image:04d}.npy", f"samples/{image:04d}.h5"]
    assert sorted(contents(data_dir)) == sorted(expected)
    assert not list(data_dir.rglob("*.tmp"))


def test_the_manifest_says_how_every_image_was_made(data_dir: Path, model: DiffusionModel) -> None:
    document = json.loads((data_dir / "manifest.json").read_text(encoding="utf-8"))
    assert document["format_version"] == 2
    assert document["model"] == "emoji"
    assert document["fingerprint"] == model.fingerprint
    assert (document["num_steps"], document["cfg_weight"], document["shift"]) == (8, 3.0, 1.0)
    assert (document["seed"], document["batch_size"]) == (0, 2)
    assert document["latent_shape"] == [16, 16, 16]
    assert (document["storage"], document["dtype"], document["steps"]) == ("hdf5", "float16", list(range(9)))
    assert len(document["sigmas"]) == len(document["timesteps"]) == 9
    assert {"mlx", "numpy", "diffusionkit", "calib", "python"} <= set(document["versions"])
    assert [entry["image_id"] for entry in document["images"]] == [0, 1, 2, 3]
    for i, entry in enumerate(document["images"]):
        assert entry["prompt"] == PROMPTS[i]
        assert entry["seed"] == image_seed(0, i)
        assert (entry["cfg_weight"], entry["num_steps"]) == (3.0, 8)
        assert entry["filename"] == f"images/{i:04d}.png"
        assert entry["latent_filename"] == f"latents/{i:04d}.npy"
        assert entry["samples"] == [f"samples/{i:04d}.h5"]
        named = {entry["filename"], entry["latent_filename"], *entry["samples"]}
        assert entry["checksums"] == {name: checksum(data_dir / name) for name in named}


def test_seeds_are_a_function_of_base_seed_and_image_and_rarely_meet() -> None:
    seeds = [image_seed(base, image) for base in range(20) for image in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds[:2] == [image_seed(0, 0), image_seed(0, 1)]


def drawn_states(model: DiffusionModel, images: tuple[int, ...], settings: SamplerSettings) -> list[np.ndarray]:
    texts, seeds = [PROMPTS[i] for i in images], [image_seed(0, i) for i in images]
    rows = 2 * len(images)
    with shared_cores(rows):
        return [np.array(state.x) for state in trajectory(model, texts, seeds, settings, parts_for(rows))]


def test_hdf5_samples_hold_every_state(data_dir: Path, model: DiffusionModel, manifest: Manifest) -> None:
    states = drawn_states(model, (2, 3), SAMPLER)
    for row, image in enumerate((2, 3)):
        with h5py.File(data_dir / f"samples/{image:04d}.h5", "r") as file:
            assert file["x"].shape == (9, 16, 16, 16)
            assert file["x"].dtype == np.float16
            assert file["x"].fletcher32
            assert file["step_index"][:].tolist() == list(range(9))
            np.testing.assert_array_equal(file["sigma"][:], np.float32(manifest.sigmas))
            np.testing.assert_array_equal(file["timestep"][:], np.float32(manifest.timesteps))
            assert file.attrs["prompt"] == PROMPTS[image]
            assert file.attrs["image_id"] == image
            assert file.attrs["seed"] == image_seed(0, image)
            for step in range(9):
                expected = states[step][row].astype(np.float16)
                np.testing.assert_array_equal(file["x"][step], expected)
                np.testing.assert_array_equal(read_state(data_dir, manifest, image, step), expected)


def test_npz_samples_have_the_layout_of_older_datasets(quick: DiffusionModel, tmp_path: Path) -> None:
    folder = make(quick, tmp_path, 2, storage=StorageFormat.NPZ, dtype=StateDtype.FLOAT32)
    manifest, states = load_manifest(folder), drawn_states(quick, (0, 1), QUICK)
    for image in (0, 1):
        assert manifest.images[image].samples == [f"samples/{image:04d}_{step:03d}.npz" for step in range(3)]
        for step in range(3):
            with np.load(folder / f"samples/{image:04d}_{step:03d}.npz") as archive:
                assert set(archive) == {"x", "timestep", "sigma", "step_index", "image_id", "is_final"}
                assert archive["x"].shape == (1, 16, 16, 16)
                assert archive["x"].dtype == np.float32
                np.testing.assert_array_equal(archive["x"][0], states[step][image])
                assert archive["step_index"] == step
                assert archive["image_id"] == image
                assert archive["is_final"] == (step == 2)
                assert archive["sigma"] == np.float32(manifest.sigmas[step])
                assert archive["timestep"] == np.float32(manifest.timesteps[step])
            np.testing.assert_array_equal(read_state(folder, manifest, image, step), states[step][image])


def test_latents_are_finished_and_processed_out(data_dir: Path, model: DiffusionModel) -> None:
    final = drawn_states(model, (0, 1), SAMPLER)[-1]
    expected = np.array(model.latent_format.process_out(mx.array(final)))
    for image in (0, 1):
        np.testing.assert_array_equal(np.load(data_dir / f"latents/{image:04d}.npy"), expected[image])


def test_pictures_explain_themselves(data_dir: Path, model: DiffusionModel) -> None:
    for image in range(4):
        with Image.open(data_dir / f"images/{image:04d}.png") as picture:
            assert picture.size == (64, 64)
            assert picture.mode == "RGB"
            text = picture.text
        assert text["prompt"] == PROMPTS[image]
        assert int(text["seed"]) == image_seed(0, image)
        assert float(text["cfg_weight"]) == 3.0
        assert int(text["num_steps"]) == 8
        assert int(text["image_id"]) == image
        assert (text["model"], text["fingerprint"]) == ("emoji", model.fingerprint)


def test_a_prompt_in_any_language_is_kept(quick: DiffusionModel, tmp_path: Path) -> None:
    texts = ("Süße Öl-Äpfel — 日本語 😀", "a=b, 'c' \"d\"")
    folder = make(quick, tmp_path, 2, replace(QUICK, num_steps=1), prompts=texts)
    assert [load_manifest(folder).images[i].prompt for i in (0, 1)] == list(texts)
    for image, prompt in enumerate(texts):
        with Image.open(folder / f"images/{image:04d}.png") as picture:
            assert picture.text["prompt"] == prompt
        with h5py.File(folder / f"samples/{image:04d}.h5", "r") as file:
            assert file.attrs["prompt"] == prompt


def test_prompts_start_again_when_they_run_out(quick: DiffusionModel, tmp_path: Path) -> None:
    folder = make(quick, tmp_path, 3, replace(QUICK, num_steps=1), prompts=("octopus", "rocket"))
    images = load_manifest(folder).images
    assert [images[i].prompt for i in range(3)] == ["octopus", "rocket", "octopus"]
    assert images[0].seed != images[2].seed
    assert (folder / "images/0000.png").read_bytes() != (folder / "images/0002.png").read_bytes()


def test_a_seed_gives_diffusionkits_pixels(
    model: DiffusionModel, single_settings: SamplerSettings, tmp_path: Path
) -> None:
    copy = emoji.load()
    folder = make(model, tmp_path, 2, single_settings)
    for image in (0, 1):
        text = copy.encode([PROMPTS[image]], 3.0)
        pipeline = pipeline_of(copy)
        latents, _ = pipeline.denoise_latents(
            text.tokens, text.pooled, num_steps=8, cfg_weight=3.0, latent_size=(16, 16), seed=image_seed(0, image)
        )
        decoded = pipeline.decode_latents_to_image(latents)
        expected = np.array((mx.concatenate(decoded, axis=0) * 255).astype(mx.uint8))
        with Image.open(folder / f"images/{image:04d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), expected)


# The same bytes


@pytest.mark.parametrize("batch_size", [2, 3])
def test_two_and_then_four_images_are_the_bytes_of_four_at_once(
    quick: DiffusionModel, tmp_path: Path, batch_size: int
) -> None:
    settings = replace(QUICK, batch_size=batch_size)
    at_once = make(quick, tmp_path / "once", 4, settings)
    in_turn = make(quick, tmp_path / "turn", 2, settings)
    assert len(load_manifest(in_turn).images) == 2
    make(quick, in_turn, 4, settings)
    assert contents(in_turn) == contents(at_once)


def test_a_resume_keeps_the_datasets_own_batch_size(quick: DiffusionModel, tmp_path: Path) -> None:
    at_once = make(quick, tmp_path / "once", 4, replace(QUICK, batch_size=3))
    in_turn = make(quick, tmp_path / "turn", 1, replace(QUICK, batch_size=3))
    make(quick, in_turn, 4, replace(QUICK, batch_size=2))
    assert load_manifest(in_turn).batch_size == 3
    assert contents(in_turn) == contents(at_once)


@pytest.mark.parametrize("storage", list(StorageFormat))
def test_lost_files_are_drawn_again_to_the_same_bytes(
    model: DiffusionModel, drawn: dict[StorageFormat, Path], tmp_path: Path, storage: StorageFormat
) -> None:
    folder = Path(shutil.copytree(drawn[storage], tmp_path / "dataset"))
    before = contents(folder)
    lost = ["images/0001.png", "latents/0002.npy", load_manifest(folder).images[0].samples[-1]]
    for name in lost:
        (folder / name).unlink()
    make(model, folder, IMAGES, storage=storage)
    assert contents(folder) == before


def test_asking_again_draws_nothing(model: DiffusionModel, dataset: Path) -> None:
    def traces() -> dict[str, tuple[int, int]]:
        """Which file on disk it is, and when it was written."""
        stats = {name: (dataset / name).stat() for name in contents(dataset)}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    before = traces()
    make(model, dataset, IMAGES)
    make(model, dataset, 1)
    assert traces() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": replace(QUICK, num_steps=4)}, ("num_steps=2", "4")),
        ({"settings": replace(QUICK, cfg_weight=2.0)}, ("cfg_weight=3.0", "2.0")),
        ({"settings": replace(QUICK, shift=3.0)}, ("shift=1.0", "3.0")),
        ({"seed": 1}, ("seed=0", "1")),
        ({"storage": StorageFormat.NPZ}, ("storage=hdf5", "npz")),
        ({"dtype": StateDtype.FLOAT32}, ("dtype=float16", "float32")),
        ({"prompts": ("rocket", *PROMPTS)}, ("prompt",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_in_the_same_folder_are_refused(
    model: DiffusionModel, dataset: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    before = contents(dataset)
    with pytest.raises(CalibError) as error:
        make(model, dataset, IMAGES + 1, **change)
    assert contents(dataset) == before
    assert str(dataset) in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_other_weights_in_the_same_folder_are_refused(model: DiffusionModel, dataset: Path) -> None:
    path = dataset / "manifest.json"
    path.write_text(path.read_text().replace(model.fingerprint, "0123456789abcdef"))
    with pytest.raises(CalibError, match="fingerprint=0123456789abcdef"):
        make(model, dataset, IMAGES + 1)


# Damage


@pytest.mark.parametrize("storage", list(StorageFormat))
@pytest.mark.parametrize("damage", ["flipped", "truncated", "foreign", "empty", "missing"])
def test_a_damaged_state_is_an_error_that_names_the_file_and_drawing_again_mends_it(
    model: DiffusionModel, drawn: dict[StorageFormat, Path], tmp_path: Path, storage: StorageFormat, damage: str
) -> None:
    folder = Path(shutil.copytree(drawn[storage], tmp_path / "dataset"))
    before, manifest = contents(folder), load_manifest(folder)
    entry = manifest.images[1]
    path = folder / entry.samples[-1]
    stored = np.array(read_state(folder, manifest, 1, 2)).tobytes()
    if damage == "flipped":
        flip_byte(path, path.read_bytes().index(stored) + 100)
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "foreign":
        path.write_bytes(b"GIF89a" + bytes(2000))
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(CalibError, match=path.name) as error:
        read_state(folder, manifest, 1, 2)
    assert f"calib verify {folder} says what else is wrong" in str(error.value)
    assert "\n" not in str(error.value)
    make(model, folder, IMAGES, storage=storage)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": "other"}', '{"format": "calib-dataset", "format_version": 99}', "\x00\xff"],
)
def test_a_foreign_or_damaged_manifest_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(CalibError, match=r"manifest\.json") as error:
        load_manifest(tmp_path)
    assert "\n" not in str(error.value)


def test_a_manifest_that_lacks_a_field_is_an_error_that_names_it(data_dir: Path, tmp_path: Path) -> None:
    document = json.loads((data_dir / "manifest.json").read_text())
    for broken in (
        {key: value for key, value in document.items() if key != "sigmas"},
        {**document, "images": [{"image_id": 0}]},
        {**document, "images": None},
        {**document, "images": [None]},
        {**document, "latent_shape": 3},
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(CalibError, match=r"manifest\.json"):
            load_manifest(tmp_path)


def test_latents_that_do_not_fit_the_stored_type_are_refused_and_leave_no_image(
    quick: DiffusionModel, tmp_path: Path
) -> None:
    with pytest.raises(CalibError, match=r"dataset\.dtype=float32"):
        make(quick, tmp_path, 1, replace(QUICK, num_steps=2, cfg_weight=1e7))
    assert load_manifest(tmp_path).images == {}
    assert set(contents(tmp_path)) == {"manifest.json"}
    # Nothing is lost by beginning anew, as the line advises.
    make(quick, tmp_path, 1, replace(QUICK, cfg_weight=1.0), dtype=StateDtype.FLOAT32)
    assert load_manifest(tmp_path).dtype == "float32"
