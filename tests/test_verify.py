"""``calib verify``: every kind of damage is found and named, a sound dataset gives nothing."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError
from calib.dataset.checks import Kind
from calib.dataset.generate import generate
from calib.dataset.load import load_manifest
from calib.dataset.repair import repair
from calib.dataset.shards import Shard, shard_lock
from calib.dataset.store import StateDtype, StorageFormat
from calib.dataset.verify import verify
from calib.models.model import DiffusionModel

import h5py
import numpy as np
import pytest
from damage import (
    LATENT,
    PICTURE,
    SETTINGS,
    STATE,
    STATES,
    assign,
    found,
    is_sound,
    picture_of,
    redrawn,
    restated,
    set_attribute,
    set_npz,
    set_states,
    swap,
    without_aside,
)
from helpers import PROMPTS, contents, everything, flip_byte

# Sound datasets


@pytest.mark.parametrize("storage", list(StorageFormat))
@pytest.mark.parametrize("dtype", list(StateDtype))
def test_a_sound_dataset_gives_nothing(
    quick: DiffusionModel, tmp_path: Path, storage: StorageFormat, dtype: StateDtype
) -> None:
    generate(quick, PROMPTS, 1, tmp_path, SETTINGS, storage=storage, dtype=dtype, steps=[0, 2])
    before = everything(tmp_path)
    assert is_sound(tmp_path)
    assert everything(tmp_path) == before


def test_the_shared_dataset_is_sound_and_its_storage_adds_up(data_dir: Path) -> None:
    report = verify(data_dir)
    assert report.findings == []
    assert report.notes == []
    sizes = {name: (data_dir / name).stat().st_size for name in contents(data_dir)}
    for part in ("samples", "latents", "images"):
        expected = [size for name, size in sizes.items() if name.startswith(part)]
        assert (report.storage[part].files, report.storage[part].bytes) == (4, sum(expected))
    assert report.storage["manifest"].bytes == sizes["manifest.json"]
    assert sum(part.bytes for part in report.storage.values()) == sum(sizes.values())
    assert report.verdict.startswith("sound: 4 images, ")


# Damage to bytes


@pytest.mark.parametrize("name", [PICTURE, LATENT, STATES])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "deleted", "foreign"])
def test_damaged_files_are_found(dataset: Path, name: str, damage: str) -> None:
    path = dataset / name
    if damage == "flipped":
        flip_byte(path, path.stat().st_size // 2)
    elif damage == "deleted":
        path.unlink()
    elif damage == "foreign":
        path.write_bytes(b"GIF89a" + bytes(999))
    else:
        os.truncate(path, 0 if damage == "emptied" else path.stat().st_size - 1)
    kind = "missing" if damage == "deleted" else "altered"
    assert found(verify(dataset)) == {kind: {name}}


@pytest.mark.parametrize("name", [PICTURE, LATENT, STATES])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "foreign", "folder"])
def test_unreadable_files_are_found_without_checksums_that_tell(dataset: Path, name: str, damage: str) -> None:
    path = dataset / name
    if damage == "foreign":
        path.write_bytes(b"GIF89a" + bytes(999))
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        os.truncate(path, 0 if damage == "emptied" else path.stat().st_size // 2)
    if damage != "folder":
        restated(dataset)
    assert found(verify(dataset)) == {"unreadable": {name}}


def test_a_flipped_bit_in_a_state_is_found_by_hdf5_itself(dataset: Path) -> None:
    path = dataset / STATES
    with h5py.File(path, "r") as file:
        stored = file["x"][1].tobytes()
    flip_byte(path, path.read_bytes().index(stored) + 100)
    restated(dataset)
    assert found(verify(dataset)) == {"unreadable": {STATES}}


# Damage to content, checksums made to hold

CONTENT: dict[str, tuple[Callable[[Path], None], dict[str, set[str]]]] = {
    "NaN in a state": (
        lambda d: set_states(d / STATES, lambda x: assign(x, (1, 0, 0, 0), np.nan)),
        {"not finite": {STATES}},
    ),
    "infinity in a state": (
        lambda d: set_states(d / STATES, lambda x: assign(x, (2, 3, 3, 3), np.inf)),
        {"not finite": {STATES}},
    ),
    "NaN in the latent": (
        lambda d: np.save(d / LATENT, np.full((16, 16, 16), np.nan, np.float32)),
        {"not finite": {LATENT}},
    ),
    "a value out of all bounds": (
        lambda d: set_states(d / STATES, lambda x: assign(x, (1, 0, 0, 0), 30000)),
        {"implausible": {STATES}},
    ),
    "zeros": (lambda d: set_states(d / STATES, lambda x: assign(x, 1, 0)), {"implausible": {STATES}}),
    "noise of another scale": (
        lambda d: set_states(d / STATES, lambda x: assign(x, 0, x[0] * 2)),
        {"implausible": {STATES}},
    ),
    "noise of another seed": (
        lambda d: set_states(d / STATES, lambda x: assign(x, 0, x[0][::-1])),
        {"wrong seed": {STATES}},
    ),
    "a state twice": (
        lambda d: set_states(d / STATES, lambda x: assign(x, 1, x[0])),
        {"implausible": {STATES}},
    ),
    "a constant latent": (
        lambda d: np.save(d / LATENT, np.ones((16, 16, 16), np.float32)),
        {"implausible": {LATENT}},
    ),
    "another image's latent": (
        lambda d: (d / LATENT).write_bytes((d / "latents/0002.npy").read_bytes()),
        {"disagrees": {LATENT}},
    ),
    "a latent of another shape": (
        lambda d: np.save(d / LATENT, np.load(d / LATENT)[:8]),
        {"disagrees": {LATENT}},
    ),
    "a constant picture": (
        lambda d: redrawn(d / PICTURE, np.full((64, 64, 3), 255, np.uint8), picture_of(d / PICTURE)[1]),
        {"constant picture": {PICTURE}},
    ),
    "a picture of another size": (
        lambda d: redrawn(d / PICTURE, picture_of(d / PICTURE)[0][:32], picture_of(d / PICTURE)[1]),
        {"disagrees": {PICTURE}},
    ),
    "a picture that says nothing": (
        lambda d: redrawn(d / PICTURE, picture_of(d / PICTURE)[0], {}),
        {"disagrees": {PICTURE}},
    ),
    "a picture of another prompt": (
        lambda d: redrawn(d / PICTURE, picture_of(d / PICTURE)[0], {**picture_of(d / PICTURE)[1], "prompt": "x"}),
        {"disagrees": {PICTURE}},
    ),
    "states of another prompt": (lambda d: set_attribute(d / STATES, "prompt", "x"), {"disagrees": {STATES}}),
    "states of another model": (lambda d: set_attribute(d / STATES, "model", "x"), {"mixed settings": {STATES}}),
    "states of other settings": (
        lambda d: set_attribute(d / STATES, "dataset", json.dumps({**load_manifest(d).settings(), "shift": 3.0})),
        {"mixed settings": {STATES}},
    ),
    "states of another format": (lambda d: set_attribute(d / STATES, "format", "x"), {"unreadable": {STATES}}),
}


@pytest.mark.parametrize("case", CONTENT)
def test_bad_content_is_found(dataset: Path, case: str) -> None:
    damage, expected = CONTENT[case]
    damage(dataset)
    restated(dataset)
    assert found(verify(dataset)) == expected


def test_other_noise_levels_or_types_are_found(dataset: Path) -> None:
    with h5py.File(dataset / STATES, "r+") as file:
        file["sigma"][1] = 0.4
        file["timestep"][1] = 400
        file["step_index"][1] = 0
        file["x"].attrs["dtype"] = "bfloat16"
    restated(dataset)
    report = verify(dataset)
    assert found(report) == {"disagrees": {STATES}}
    details = " ".join(finding.detail for finding in report.findings)
    assert all(word in details for word in ("step_index", "sigma", "timestep", "bfloat16"))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"step_index": np.int64(0)}, "disagrees"),
        ({"sigma": np.float32(0.25)}, "disagrees"),
        ({"timestep": np.float32(2)}, "disagrees"),
        ({"image_id": np.int64(2)}, "disagrees"),
        ({"is_final": np.bool_(True)}, "disagrees"),
        ({"is_final": None}, "unreadable"),
        ({"x": np.ones((1, 16, 16, 16), np.float32)}, "disagrees"),
        ({"x": np.ones((16, 16, 16), np.float16)}, "disagrees"),
        ({"x": np.ones((1, 16, 16, 16), np.float16)}, "implausible"),
        ({"x": np.full((1, 16, 16, 16), np.inf, np.float16)}, "not finite"),
        ({"x": np.array([{}], object)}, "unreadable"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_bad_states_of_npz_files_are_found(npz_dataset: Path, changes: dict[str, Any], kind: str) -> None:
    set_npz(npz_dataset / STATE, **changes)
    restated(npz_dataset)
    assert found(verify(npz_dataset)) == {kind: {STATE}}


def test_swapped_files_are_found(dataset: Path) -> None:
    for first in (PICTURE, LATENT, STATES):
        swap(dataset, first, first.replace("0001", "0002"))
    restated(dataset)
    report = verify(dataset)
    assert report.bad_images == {1, 2}
    assert {f.kind for f in report.findings} == {Kind.DISAGREES, Kind.SEED}
    assert {f.file for f in report.findings} >= {PICTURE, STATES}


# Damage to the manifest


ENTRY: list[tuple[dict[str, Any], str, set[str]]] = [
    ({"prompt": "x"}, "disagrees", {PICTURE, STATES}),
    ({"prompt": None}, "disagrees", {PICTURE, STATES}),
    ({"seed": 1}, "wrong seed", {"manifest.json"}),
    ({"num_steps": 3}, "mixed settings", {"manifest.json"}),
    ({"cfg_weight": 4.0}, "mixed settings", {"manifest.json"}),
    ({"filename": "images/0002.png"}, "disagrees", {"manifest.json"}),
    ({"filename": "../../secret"}, "disagrees", {"manifest.json"}),
    ({"samples": []}, "disagrees", {"manifest.json"}),
    ({"checksums": {}}, "altered", {PICTURE, LATENT, STATES}),
]


@pytest.mark.parametrize(("change", "kind", "files"), ENTRY, ids=[str(case[0]) for case in ENTRY])
def test_a_wrong_entry_is_found(dataset: Path, change: dict[str, Any], kind: str, files: set[str]) -> None:
    restated(dataset, lambda document: document["images"][1].update(change))
    report = verify(dataset)
    assert report.bad_images == {1}
    assert {f.file for f in report.findings if f.kind == kind} == files


def test_two_entries_of_one_image_are_found_and_repaired_without_drawing(dataset: Path) -> None:
    before = contents(dataset)
    restated(dataset, lambda document: document["images"].append(document["images"][1]))
    assert found(verify(dataset)) == {"duplicate": {"manifest.json"}}
    done = repair(dataset)
    assert done is not None and done.moved == [] and done.images == []
    assert without_aside(dataset) == before


def test_a_lost_entry_makes_orphans_and_a_gap_is_a_note(dataset: Path) -> None:
    restated(dataset, lambda document: document["images"].pop(1))
    report = verify(dataset)
    assert found(report, None) == {"orphan": {PICTURE, LATENT, STATES}}
    assert report.notes == ["1 image not drawn below the highest id (1)"]
    assert repair(dataset) is not None
    report = verify(dataset)
    assert report.sound
    assert len(report.notes) == 1


def test_foreign_files_and_leftovers_are_found_and_harmless_ones_are_not(dataset: Path) -> None:
    for name in ("samples/notes.txt", "images/deep/er.png", "latents/0009.npy", "images/.DS_Store", "README", ".x"):
        (dataset / name).parent.mkdir(exist_ok=True)
        (dataset / name).write_bytes(b"x")
    for name in (".manifest.json.abc.tmp", "samples/.0001.h5.abc.tmp"):
        (dataset / name).write_bytes(b"x")
    assert found(verify(dataset), None) == {
        "orphan": {"samples/notes.txt", "images/deep/er.png", "latents/0009.npy"},
        "temporary": {".manifest.json.abc.tmp", "samples/.0001.h5.abc.tmp"},
    }


def test_orphans_are_not_judged_while_another_process_draws(dataset: Path) -> None:
    (dataset / "latents/0009.npy").write_bytes(b"x")
    with shard_lock(dataset, Shard(1, 2), wait=False):
        report = verify(dataset)
        assert report.sound
        assert "another process" in report.notes[0]
        with pytest.raises(CalibError, match="another process is drawing"):
            repair(dataset)
    assert not verify(dataset).sound


def test_images_of_another_dataset_are_found(model: DiffusionModel, dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    generate(model, PROMPTS, 2, other, replace(SETTINGS, cfg_weight=2.0))
    theirs = json.loads((other / "manifest.json").read_text(encoding="utf-8"))["images"][1]
    for name in theirs["checksums"]:
        shutil.copy(other / name, dataset / name)
    restated(dataset, lambda document: document["images"].__setitem__(1, theirs))
    report = verify(dataset)
    assert found(report).keys() == {"mixed settings"}
    assert found(report)["mixed settings"] == {"manifest.json", PICTURE, STATES}


def test_a_manifest_that_most_images_disagree_with_is_itself_at_fault(dataset: Path) -> None:
    before = contents(dataset)
    restated(dataset, lambda document: document.update(shift=2.0))
    report = verify(dataset)
    assert report.manifest_is_wrong
    assert "rebuild-manifest" in report.verdict
    changed = contents(dataset)
    with pytest.raises(CalibError, match=r"rebuild-manifest .* --force"):
        repair(dataset)
    assert contents(dataset) == changed != before


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float64"}, {"storage": "zip"}, {"sigmas": [1.0]}, {"steps": []}, {"steps": [7]}, {"num_steps": "two"}],
    ids=str,
)
def test_impossible_settings_are_one_line_that_says_what_to_do(dataset: Path, change: dict[str, Any]) -> None:
    restated(dataset, lambda document: document.update(change))
    with pytest.raises(CalibError, match=r"manifest\.json: damaged .*rebuild-manifest"):
        verify(dataset)


@pytest.mark.parametrize(
    "change", [{"image_id": "1"}, {"samples": None}, {"filename": 3}, {"checksums": None}, {"seed": "x"}], ids=str
)
def test_an_impossible_entry_is_one_line_that_says_what_to_do(dataset: Path, change: dict[str, Any]) -> None:
    restated(dataset, lambda document: document["images"][1].update(change))
    with pytest.raises(CalibError, match=r"manifest\.json: damaged .*rebuild-manifest"):
        verify(dataset)
