"""A lost manifest is restored to the byte; datasets of the older layout are read, verified, collected from, rebuilt."""

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calib.activations.record import StepRecord
from calib.activations.taps import TapKind, TapSelection
from calib.base.errors import CalibError
from calib.base.seeds import image_seed
from calib.dataset.generate import generate
from calib.dataset.images import DrawnImage, write_image
from calib.dataset.load import load_manifest
from calib.dataset.manifest import Manifest
from calib.dataset.rebuild import rebuild_manifest
from calib.dataset.repair import repair
from calib.dataset.settings import SamplerSettings
from calib.dataset.shards import Shard, shard_lock
from calib.dataset.store import StateDtype, StorageFormat, read_state
from calib.dataset.verify import verify
from calib.models.model import DiffusionModel

import numpy as np
import pytest
from helpers import PROMPTS, contents, everything, is_one_clear_line, run_here, run_process
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from watching import collected, collection_of

SETTINGS = SamplerSettings(num_steps=2, cfg_weight=3.0, batch_size=2)
TEXTS = ("Süße Öl-Äpfel — 日本語 😀", "a=b, 'c' \"d\"", "  two\nlines\t", "")


@pytest.fixture(scope="session")
def drawn(quick: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of two steps; tests copy them."""
    folder = tmp_path_factory.mktemp("drawn") / "dataset"
    generate(quick, PROMPTS, 4, folder, SETTINGS)
    return folder


@pytest.fixture
def dataset(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "dataset"))


def write_synthetic(folder: Path, manifest: Manifest, image_ids: Sequence[int]) -> None:
    """A sound dataset of calib's that needed no model: straight lines from noise to other noise."""
    manifest = replace(manifest, images={})
    sigmas = np.array([manifest.sigmas[step] for step in manifest.steps])[:, None, None, None]
    values = np.random.default_rng(0)
    for image_id in image_ids:
        seed = image_seed(0, image_id)
        noise = np.random.RandomState(seed).randn(16, 16, 16).transpose(1, 2, 0)
        latent = values.standard_normal((16, 16, 16)).astype(np.float32)
        states = (sigmas * noise + (1 - sigmas) * latent).astype(np.float16)
        drawn = DrawnImage(image_id, "octopus", seed, states, latent, values.random((8, 8, 3)))
        manifest.images[image_id] = write_image(folder, manifest, drawn)
    manifest.save(folder)


def check_restored(folder: Path) -> None:
    """A manifest that is lost, then one that is damaged, come back to the byte; nothing else changes."""
    before = contents(folder)
    (folder / "manifest.json").unlink()
    done = rebuild_manifest(folder)
    assert (done.left_out, done.unknown, done.kept) == ([], [], None)
    assert contents(folder) == before
    assert verify(folder).sound


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        (StorageFormat.HDF5, StateDtype.FLOAT16),
        (StorageFormat.HDF5, StateDtype.BFLOAT16),
        (StorageFormat.NPZ, StateDtype.FLOAT32),
    ],
)
def test_a_lost_manifest_comes_back_to_the_byte(
    quick: DiffusionModel, tmp_path: Path, storage: StorageFormat, dtype: StateDtype
) -> None:
    settings = replace(SETTINGS, cfg_weight=2.5, shift=3.0)
    generate(quick, TEXTS, 4, tmp_path, settings, seed=7, storage=storage, dtype=dtype, steps=[0, 2])
    check_restored(tmp_path)


def test_shards_in_any_order_come_back_to_the_byte(quick: DiffusionModel, tmp_path: Path) -> None:
    for index in (1, 0):
        generate(quick, PROMPTS, 5, tmp_path, SETTINGS, shard=Shard(index, 2))
    check_restored(tmp_path)


@pytest.mark.parametrize("storage", list(StorageFormat))
def test_large_image_ids_come_back_to_the_byte(manifest: Manifest, tmp_path: Path, storage: StorageFormat) -> None:
    write_synthetic(tmp_path, replace(manifest, storage=storage.value, steps=[0, 8]), (9, 9999, 10000, 123456))
    check_restored(tmp_path)


def test_a_readable_manifest_is_replaced_by_force_alone_and_kept(dataset: Path) -> None:
    before = contents(dataset)
    with pytest.raises(CalibError, match="--force"):
        rebuild_manifest(dataset)
    assert contents(dataset) == before
    old = (dataset / "manifest.json").read_bytes()
    changed = old.replace(b'"shift": 1.0', b'"shift": 2.0')
    (dataset / "manifest.json").write_bytes(changed)
    done = rebuild_manifest(dataset, force=True)
    assert done.kept is not None
    assert done.kept.name.startswith("manifest.json.old-")
    assert done.kept.read_bytes() == changed
    assert (dataset / "manifest.json").read_bytes() == old


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "calib-dataset", "format_version": 2}', "\xff"])
def test_a_damaged_manifest_is_kept_beside_the_restored_one(dataset: Path, content: str) -> None:
    before = contents(dataset)
    for _ in range(2):
        (dataset / "manifest.json").write_text(content, encoding="latin-1")
        done = rebuild_manifest(dataset)
        assert done.kept is not None
        assert done.kept.read_text(encoding="latin-1") == content
    kept = {name for name in contents(dataset) if name.startswith("manifest.json.damaged-")}
    assert len(kept) == 2
    assert {name: value for name, value in contents(dataset).items() if name not in kept} == before
    assert verify(dataset).sound


def test_images_that_are_not_whole_are_listed_and_left_out(quick: DiffusionModel, dataset: Path) -> None:
    before = contents(dataset)
    (dataset / "manifest.json").unlink()
    (dataset / "latents/0001.npy").unlink()
    path = dataset / "samples/0002.h5"
    os.truncate(path, path.stat().st_size // 2)
    done = rebuild_manifest(dataset)
    assert {(f.image_id, f.kind, f.file) for f in done.left_out} == {
        (1, "missing", "latents/0001.npy"),
        (2, "unreadable", "samples/0002.h5"),
    }
    assert sorted(load_manifest(dataset).images) == [0, 3]
    generate(quick, PROMPTS, 4, dataset, SETTINGS)
    assert contents(dataset) == before


def test_the_settings_of_most_images_win(quick: DiffusionModel, dataset: Path, tmp_path: Path) -> None:
    expected = [line for line in (dataset / "manifest.json").read_text().splitlines() if '"image_id": 0' not in line]
    other = tmp_path / "other"
    generate(quick, PROMPTS, 1, other, replace(SETTINGS, cfg_weight=2.0))
    (other / "manifest.json").unlink()
    shutil.copytree(other, dataset, dirs_exist_ok=True)
    (dataset / "manifest.json").unlink()
    done = rebuild_manifest(dataset)
    assert {(f.image_id, f.kind) for f in done.left_out} >= {(0, "mixed settings")}
    assert {f.image_id for f in done.left_out} == {0}
    assert (dataset / "manifest.json").read_text().splitlines() == expected


def test_what_lies_aside_is_not_rebuilt(dataset: Path) -> None:
    (dataset / "latents/0003.npy").unlink()
    assert repair(dataset) is not None
    before = contents(dataset)
    (dataset / "manifest.json").unlink()
    assert rebuild_manifest(dataset).images == 3
    assert contents(dataset) == before


def test_a_dataset_that_is_being_drawn_is_left_alone(dataset: Path) -> None:
    (dataset / "manifest.json").unlink()
    before = contents(dataset)
    for shard in (Shard(), Shard(1, 3)):
        with (
            shard_lock(dataset, shard, wait=False),
            pytest.raises(CalibError, match="another process is drawing"),
        ):
            rebuild_manifest(dataset)
    assert contents(dataset) == before


def test_the_command_says_what_it_did(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = is_one_clear_line(run_here(["rebuild-manifest", str(dataset)], capsys), status=1)
    assert "--force" in line
    (dataset / "manifest.json").write_text("{")
    (dataset / "latents/0001.npy").unlink()
    outcome = run_here(["rebuild-manifest", str(dataset)], capsys)
    assert (outcome.status, outcome.err) == (0, "")
    assert "3 images" in outcome.out
    assert "manifest.json.damaged-" in outcome.out
    assert "latents/0001.npy" in outcome.out
    outcome = run_here(["rebuild-manifest", "--help"], capsys)
    assert outcome.status == 0
    assert "never deleted" in outcome.out


def test_no_dataset_is_one_line_and_nothing_is_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("x")
    Path("empty").mkdir()
    for name in ("nowhere", "file", "empty"):
        assert name in is_one_clear_line(run_here(["rebuild-manifest", name], capsys), status=1)
    is_one_clear_line(run_here(["rebuild-manifest"], capsys), status=2)
    assert everything(folder) == ["empty", "file"]


def test_a_process_restores_it_too(dataset: Path) -> None:
    before = contents(dataset)
    (dataset / "manifest.json").unlink()
    outcome = run_process(dataset.parent, "rebuild-manifest", "dataset")
    assert (outcome.status, outcome.err) == (0, "")
    assert contents(dataset) == before
    assert is_one_clear_line(run_process(dataset.parent, "rebuild-manifest", "dataset"), status=1)


# The older layout, written by NumPy alone


def write_older(
    folder: Path,
    ours: Path,
    dtype: str = "float16",
    steps: tuple[int, ...] = (0, 3, 8),
    latent_size: int | list[int] = 16,
    with_folder: bool = True,
    save: Callable[..., None] = np.savez,
) -> Path:
    """The states of ``ours`` as older scripts stored them."""
    manifest = load_manifest(ours)
    for part in ("samples", "latents", "images"):
        (folder / part).mkdir(parents=True)
    images = []
    for image_id, entry in manifest.images.items():
        for step in steps:
            save(
                folder / f"samples/{image_id:04d}_{step:03d}.npz",
                x=read_state(ours, manifest, image_id, step)[None].astype(dtype),
                timestep=np.asarray(manifest.timesteps[step], dtype),
                sigma=np.asarray(manifest.sigmas[step], dtype),
                step_index=np.asarray(step),
                image_id=np.asarray(image_id),
                is_final=np.asarray(step == manifest.num_steps),
            )
        with Image.open(ours / entry.filename) as picture:
            Image.fromarray(np.asarray(picture)).save(folder / entry.filename)
        np.save(folder / entry.latent_filename, np.load(ours / entry.latent_filename)[None].astype(dtype))
        names = {"filename": entry.filename, "latent_filename": entry.latent_filename}
        images.append(
            {
                "image_id": image_id,
                "prompt": entry.prompt,
                "seed": entry.seed,
                "cfg_weight": entry.cfg_weight,
                **(names if with_folder else {key: name.split("/")[1] for key, name in names.items()}),
            }
        )
    document = {
        "num_steps": manifest.num_steps,
        "cfg_scale": manifest.cfg_weight,
        "latent_size": latent_size,
        "model_version": "argmaxinc/mlx-stable-diffusion-3-medium",
        "created": "2025-01-31",
        "images": images,
    }
    (folder / "manifest.json").write_text(json.dumps(document, indent=2))
    return folder


@pytest.fixture
def older(data_dir: Path, tmp_path: Path) -> Path:
    return write_older(tmp_path / "older", data_dir)


def statistics(model: DiffusionModel, folder: Path, cache_dir: Path, steps: list[int]) -> dict[int, StepRecord]:
    taps = TapSelection(kind=TapKind.LINEAR, include=("mm_block_0.*",))
    return collected(collection_of(model, folder, cache_dir, [0, 2], taps), steps)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("latent_size", "with_folder"), [(16, True), ([16, 16], False)])
def test_older_datasets_are_loaded_verified_and_collected_from(
    model: DiffusionModel, data_dir: Path, tmp_path: Path, dtype: str, latent_size: Any, with_folder: bool
) -> None:
    older = write_older(tmp_path / "older", data_dir, dtype, latent_size=latent_size, with_folder=with_folder)
    before = contents(older)
    manifest, ours = load_manifest(older), load_manifest(data_dir)
    assert manifest.is_older
    assert (manifest.steps, manifest.dtype, manifest.latent_shape) == ([0, 3, 8], dtype, (16, 16, 16))
    assert (manifest.num_steps, manifest.cfg_weight) == (8, 3.0)
    assert [asdict(e)["prompt"] for e in manifest.images.values()] == list(PROMPTS[:4])
    for step in (0, 3, 8):
        np.testing.assert_array_equal(read_state(older, manifest, 1, step), read_state(data_dir, ours, 1, step))
    report = verify(older)
    assert report.findings == []
    assert report.verdict.startswith("sound: 4 images")
    found, expected = (statistics(model, folder, tmp_path / "cache", [0, 8]) for folder in (older, data_dir))
    for step, record in expected.items():
        assert found[step].seen.keys() == record.seen.keys()
        for name, own in record.seen.items():
            np.testing.assert_array_equal(found[step].seen[name].statistics.maximum, own.statistics.maximum)
            np.testing.assert_array_equal(found[step].seen[name].statistics.minimum, own.statistics.minimum)
    assert len(list((tmp_path / "cache" / "activations").iterdir())) == 2, "their caches are not mistaken"
    assert contents(older) == before


def test_seventeen_of_fifty_one_steps_suffice(manifest: Manifest, tmp_path: Path) -> None:
    steps = tuple(range(0, 49, 3))
    sigmas = np.linspace(1, 0, 51).astype(np.float32).astype(float)
    times = [1000 * sigma for sigma in sigmas]
    ours = replace(manifest, num_steps=50, sigmas=list(sigmas), timesteps=times, steps=list(steps))
    write_synthetic(tmp_path / "ours", ours, (0, 1))
    older = write_older(tmp_path / "older", tmp_path / "ours", steps=steps)
    assert load_manifest(older).steps == list(steps)
    assert verify(older).sound


OLDER_DAMAGE: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "a lost state": (lambda d: (d / "samples/0000_003.npz").unlink(), {"samples/0000_003.npz": "missing"}),
    "a cut state": (lambda d: os.truncate(d / "samples/0000_000.npz", 999), {"samples/0000_000.npz": "unreadable"}),
    "an empty state": (lambda d: os.truncate(d / "samples/0001_000.npz", 0), {"samples/0001_000.npz": "unreadable"}),
    "a lost picture": (lambda d: (d / "images/0001.png").unlink(), {"images/0001.png": "missing"}),
    "a truncated picture": (lambda d: os.truncate(d / "images/0001.png", 999), {"images/0001.png": "unreadable"}),
    "a lost latent": (lambda d: (d / "latents/0001.npy").unlink(), {"latents/0001.npy": "missing"}),
    "a truncated latent": (lambda d: os.truncate(d / "latents/0001.npy", 999), {"latents/0001.npy": "unreadable"}),
    "another image's state": (
        lambda d: shutil.copy(d / "samples/0002_003.npz", d / "samples/0001_003.npz"),
        {"samples/0001_003.npz": "disagrees"},
    ),
    "another image's latent": (
        lambda d: shutil.copy(d / "latents/0002.npy", d / "latents/0001.npy"),
        {"latents/0001.npy": "disagrees"},
    ),
    "a foreign state": (
        lambda d: shutil.copy(d / "samples/0002_003.npz", d / "samples/0007_003.npz"),
        {"samples/0007_003.npz": "orphan"},
    ),
    "a stray step": (
        lambda d: shutil.copy(d / "samples/0002_003.npz", d / "samples/0002_004.npz"),
        {"samples/0002_004.npz": "orphan"},
    ),
}


@pytest.mark.parametrize("case", OLDER_DAMAGE)
def test_damage_to_an_older_dataset_is_found_and_moved_aside(older: Path, case: str) -> None:
    damage, expected = OLDER_DAMAGE[case]
    damage(older)
    before = {path.read_bytes() for path in older.rglob("*") if path.is_file()}
    document = json.loads((older / "manifest.json").read_text())
    report = verify(older)
    assert {finding.file: finding.kind for finding in report.findings} == expected
    assert repair(older) is not None
    assert verify(older).sound
    assert {path.read_bytes() for path in older.rglob("*") if path.is_file()} >= before
    repaired = json.loads((older / "manifest.json").read_text())
    kept = [entry for entry in document["images"] if entry["image_id"] not in report.bad_images]
    assert repaired == {**document, "images": kept}


def test_an_older_dataset_of_mixed_guidance_is_found(older: Path) -> None:
    path = older / "manifest.json"
    document = json.loads(path.read_text())
    document["images"][2]["cfg_weight"] = 5.0
    path.write_text(json.dumps(document))
    assert {(f.image_id, f.kind) for f in verify(older).findings} == {(2, "mixed settings")}


@pytest.mark.parametrize("name", ["samples/0000_003.npz", "images/0001.png", "latents/0001.npy"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_damage_makes_verify_fail(data_dir: Path, tmp_path: Path, name: str, save: Callable[..., None]) -> None:
    """There are no checksums to stop readers from meeting it."""
    older = write_older(tmp_path / "older", data_dir, save=save)
    sound, rng = (older / name).read_bytes(), random.Random(name)
    for _ in range(12):
        content = bytearray(sound)
        for _ in range(rng.choice((1, 8))):
            content[rng.randrange(min(len(content), rng.choice((64, 400, 10**9))))] = rng.randrange(256)
        (older / name).write_bytes(content)
        assert {finding.file for finding in verify(older).findings} <= {name}


def test_a_rebuilt_older_manifest_holds_what_is_known_and_lists_the_rest(
    older: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = older / "manifest.json"
    document = json.loads(path.read_text())
    path.unlink()
    outcome = run_here(["rebuild-manifest", str(older)], capsys)
    assert outcome.status == 0, outcome.err
    for word in ("cfg_scale:", "prompt of 4 images (0, 1, 2, 3):", "seed of 4 images", "model_version:"):
        assert f"unknown: {word}" in outcome.out
    assert "num_steps" not in outcome.out
    rebuilt = json.loads(path.read_text())
    assert rebuilt["num_steps"] == 8
    assert rebuilt["latent_size"] == [16, 16]
    assert rebuilt["cfg_scale"] is None
    for entry, lost in zip(rebuilt["images"], document["images"], strict=True):
        assert entry == {**lost, "prompt": None, "seed": None, "cfg_weight": None}
    # What it asks for is enough.
    assert "cfg_scale is unknown" in is_one_clear_line(run_here(["verify", str(older)], capsys), status=1)
    rebuilt["cfg_scale"] = 3.0
    path.write_text(json.dumps(rebuilt))
    assert verify(older).sound
    assert load_manifest(older).images[0].prompt is None


def test_collect_refuses_images_whose_prompt_is_unknown(model: DiffusionModel, older: Path) -> None:
    path = older / "manifest.json"
    document = json.loads(path.read_text())
    document["images"][2]["prompt"] = None
    path.write_text(json.dumps(document))
    with pytest.raises(CalibError, match="prompt of image 2 is unknown"):
        statistics(model, older, older.parent / "cache", [0])


def test_a_rebuilt_older_manifest_uses_what_pictures_say(older: Path) -> None:
    path = older / "manifest.json"
    document = json.loads(path.read_text())
    path.unlink()
    for entry in document["images"]:
        info = PngInfo()
        for key, value in (("Prompt", entry["prompt"]), ("seed", entry["seed"]), ("guidance_scale", 3.0)):
            info.add_text(key, str(value))
        info.add_text("model", document["model_version"])
        with Image.open(older / entry["filename"]) as picture:
            picture.load()
        picture.save(older / entry["filename"], pnginfo=info)
    assert rebuild_manifest(older).unknown == []
    expected = {key: value for key, value in document.items() if key != "created"} | {"latent_size": [16, 16]}
    assert json.loads(path.read_text()) == expected
    assert verify(older).sound


def test_a_rebuilt_older_manifest_lists_what_cannot_be_read(older: Path) -> None:
    (older / "manifest.json").unlink()
    (older / "latents/0000.npy").unlink()
    (older / "images/0001.png").unlink()
    for image_id in range(4):
        (older / f"samples/{image_id:04d}_008.npz").unlink()
    (older / "samples/0002_003.npz").write_bytes(b"x")
    unknown = rebuild_manifest(older).unknown
    for words in ("num_steps:", "latents/ of 1 image (0)", "images/ of 1 image (1)", "states of 1 image (2)"):
        assert any(words in line for line in unknown), unknown
    with pytest.raises(CalibError, match="num_steps is unknown"):
        load_manifest(older)


def test_states_of_no_known_kind_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/0000_000.npz").write_bytes(b"x")
    with pytest.raises(CalibError, match="nothing there says how it was made"):
        rebuild_manifest(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
