"""``calib verify``: every kind of damage is found and named, a sound dataset gives nothing, a repair loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.dataset.checks import Kind
from calib.dataset.generate import SamplerSettings, generate
from calib.dataset.load import load_manifest
from calib.dataset.repair import repair
from calib.dataset.shards import Shard, shard_lock
from calib.dataset.store import StateDtype, StorageFormat
from calib.dataset.verify import Report, verify
from calib.errors import CalibError
from calib.files import checksum
from calib.models.model import DiffusionModel

import h5py
import numpy as np
import pytest
from helpers import PROMPTS, contents, environment, everything, flip_byte, is_one_clear_line, run_here, run_process
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SETTINGS = SamplerSettings(num_steps=2, cfg_weight=3.0, batch_size=2)
IMAGES = 4
PICTURE, LATENT, STATES, STATE = "images/0001.png", "latents/0001.npy", "samples/0001.h5", "samples/0001_001.npz"


@pytest.fixture(scope="session")
def drawn(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> dict[StorageFormat, Path]:
    """Four images of two steps in either storage; tests copy them."""
    folders = {storage: tmp_path_factory.mktemp("drawn") / storage for storage in StorageFormat}
    for storage, folder in folders.items():
        generate(model, PROMPTS, IMAGES, folder, SETTINGS, storage=storage)
    return folders


@pytest.fixture
def dataset(drawn: dict[StorageFormat, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn[StorageFormat.HDF5], tmp_path / "dataset"))


@pytest.fixture
def npz_dataset(drawn: dict[StorageFormat, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn[StorageFormat.NPZ], tmp_path / "dataset"))


def restated(folder: Path, change: Callable[[dict[str, Any]], object] = lambda document: None) -> None:
    """Make all checksums hold for what lies there, and ``change`` the manifest."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for entry in document["images"]:
        for name in entry["checksums"]:
            if (folder / name).exists():
                entry["checksums"][name] = checksum(folder / name)
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def redrawn(path: Path, pixels: Any, facts: Mapping[str, str]) -> None:
    """A picture with other pixels or another text."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    Image.fromarray(pixels).save(path, pnginfo=info)


def picture_of(path: Path) -> tuple[Any, dict[str, str]]:
    with Image.open(path) as picture:
        return np.array(picture), dict(picture.text)


def set_states(path: Path, change: Callable[[Any], None]) -> None:
    with h5py.File(path, "r+") as file:
        x = file["x"][:]
        change(x)
        file["x"][:] = x


def set_attribute(path: Path, key: str, value: Any) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs[key] = value


def set_npz(path: Path, **changes: Any) -> None:
    with np.load(path) as archive:
        content = {**archive, **changes}
    np.savez(path, **{key: value for key, value in content.items() if value is not None})


def swap(folder: Path, first: str, second: str) -> None:
    (folder / first).rename(folder / "x")
    (folder / second).rename(folder / first)
    (folder / "x").rename(folder / second)


def assign(x: Any, place: Any, value: Any) -> None:
    x[place] = value


def found(report: Report, image: int | None = 1) -> dict[str, set[str]]:
    """Files by kind; all of one image or of none."""
    assert {finding.image_id for finding in report.findings} == {image}, report.findings
    kinds: dict[str, set[str]] = {}
    for finding in report.findings:
        kinds.setdefault(finding.kind.value, set()).add(finding.file)
    return kinds


def is_sound(folder: Path) -> bool:
    report = verify(folder)
    assert report.notes == []
    return report.sound


# Sound datasets


@pytest.mark.parametrize("storage", list(StorageFormat))
@pytest.mark.parametrize("dtype", list(StateDtype))
def test_a_sound_dataset_gives_nothing(
    model: DiffusionModel, tmp_path: Path, storage: StorageFormat, dtype: StateDtype
) -> None:
    generate(model, PROMPTS, 1, tmp_path, SETTINGS, storage=storage, dtype=dtype, steps=[0, 2])
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


# Repair


def without_aside(folder: Path) -> dict[str, str]:
    return {name: value for name, value in contents(folder).items() if not name.startswith("aside/")}


def worsen(folder: Path) -> None:
    """One damage of each sort: bytes, content, entry, foreign, leftover."""
    flip_byte(folder / PICTURE, 200)
    (folder / "latents/0002.npy").unlink()
    (folder / "samples/0009.h5").write_bytes(b"x")
    (folder / "images/.0001.png.abc.tmp").write_bytes(b"x")
    (folder / "aside").mkdir()
    (folder / "aside/mine").write_text("kept")


def test_repair_and_generate_give_the_same_bytes_and_nothing_is_deleted(model: DiffusionModel, dataset: Path) -> None:
    before = contents(dataset)
    worsen(dataset)
    worst = {path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    done = repair(dataset)
    assert done is not None
    assert done.images == [1, 2]
    assert verify(dataset).sound
    assert {path.read_bytes() for path in dataset.rglob("*") if path.is_file()} >= worst
    assert sorted(load_manifest(dataset).images) == [0, 3]
    moved = {PICTURE, LATENT, STATES, "images/0002.png", "samples/0002.h5", "samples/0009.h5"}
    assert set(done.moved) == {*moved, "images/.0001.png.abc.tmp"}
    assert all((done.aside / name).is_file() and not (dataset / name).exists() for name in done.moved)
    assert repair(dataset) is None
    generate(model, PROMPTS, IMAGES, dataset, SETTINGS)
    assert without_aside(dataset) == before
    assert (dataset / "aside/mine").read_text() == "kept"


def test_repeated_repairs_never_overwrite(model: DiffusionModel, dataset: Path) -> None:
    for content in (b"1", b"2", b"3"):
        (dataset / "samples/0009.h5").write_bytes(content)
        assert repair(dataset) is not None
    assert {path.read_bytes() for path in (dataset / "aside").rglob("0009.h5")} == {b"1", b"2", b"3"}


def test_an_entry_that_names_anothers_files_does_not_take_them_along(model: DiffusionModel, dataset: Path) -> None:
    before = contents(dataset)
    outside = dataset.parent / "outside"
    outside.write_text("not the dataset's")
    entry = {"filename": "images/0002.png", "latent_filename": "../outside", "samples": ["manifest.json"]}
    restated(dataset, lambda document: document["images"][1].update(entry))
    done = repair(dataset)
    assert done is not None
    assert set(done.moved) == {PICTURE, LATENT, STATES}
    assert outside.exists()
    generate(model, PROMPTS, IMAGES, dataset, SETTINGS)
    assert without_aside(dataset) == before


def test_a_repair_that_is_killed_is_finished_by_the_next(model: DiffusionModel, dataset: Path) -> None:
    """Killed after each of its steps in turn, by a process of its own that stops itself there."""
    before = contents(dataset)
    worsen(dataset)
    code = (
        "import os, shutil, signal, sys; import calib.dataset.repair as r; from calib.cli import main\n"
        "moved, move = [], shutil.move\n"
        "def killing(*names):\n"
        "    if len(moved) == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    moved.append(move(*names))\n"
        "r.shutil.move = killing\n"
        "main(sys.argv[2:])\n"
    )
    for kills in (0, 2):
        arguments = [sys.executable, "-c", code, str(kills), "verify", str(dataset), "--repair"]
        done = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not verify(dataset).sound
        assert verify(dataset).bad_images == set()
    assert repair(dataset) is not None
    assert verify(dataset).sound
    generate(model, PROMPTS, IMAGES, dataset, SETTINGS)
    assert without_aside(dataset) == before


# The command


def test_the_command_prints_tables_and_a_verdict(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(["verify", str(dataset)], capsys)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1].startswith("sound: 4 images, ")
    assert "per image" in outcome.out
    worsen(dataset)
    outcome = run_here(["verify", str(dataset)], capsys)
    assert (outcome.status, outcome.err) == (1, "")
    lines = outcome.out.splitlines()
    assert lines[-1].startswith("NOT sound: 2 of 4 images bad; calib verify ")
    assert next(line.split() for line in lines if line.startswith("altered"))[:3] == ["altered", "1", "1"]
    for word in (PICTURE, "latents/0002.npy", "samples/0009.h5", "images/.0001.png.abc.tmp"):
        assert word in outcome.out
    outcome = run_here(["verify", str(dataset), "--repair"], capsys)
    assert (outcome.status, outcome.err) == (0, "")
    assert "what remains is sound: 2 images" in outcome.out.splitlines()[-1]
    assert run_here(["verify", str(dataset)], capsys).status == 0


def test_many_findings_are_grouped(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(500):
        (dataset / f"samples/{i:05d}.npz").touch()
    outcome = run_here(["verify", str(dataset)], capsys)
    assert len(outcome.out.splitlines()) < 20
    assert "… and 497 more" in outcome.out
    outcome = run_here(["verify", str(dataset), "--json"], capsys)
    assert len(json.loads(outcome.out)["findings"]) == 500


def test_json_is_one_document(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worsen(dataset)
    outcome = run_here(["verify", str(dataset), "--json"], capsys)
    document = json.loads(outcome.out)
    assert outcome.status == 1
    assert document["sound"] is False
    assert document["bad_images"] == [1, 2]
    assert {"kind": "missing", "image_id": 2, "file": "latents/0002.npy", "detail": "no such file"} in document[
        "findings"
    ]
    assert document["storage"]["images"]["files"] == 5
    outcome = run_here(["verify", str(dataset), "--json", "--repair"], capsys)
    assert outcome.status == 0
    assert json.loads(outcome.out)["repair"]["images"] == [1, 2]
    outcome = run_here(["verify", str(dataset), "--json"], capsys)
    assert outcome.status == 0
    assert json.loads(outcome.out)["sound"] is True


def test_no_dataset_is_one_line_and_nothing_is_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("x")
    Path("empty").mkdir()
    for name in ("nowhere", "file", "empty"):
        for options in ([], ["--repair"]):
            line = is_one_clear_line(run_here(["verify", name, *options], capsys), status=1)
            assert name in line
            assert "calib generate" in line
    assert everything(folder) == ["empty", "file"]
    outcome = run_here(["verify", "nowhere", "--json"], capsys)
    assert outcome.status == 1
    assert "nowhere" in json.loads(outcome.out)["error"]


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--jsn"], ["--rep", "a"]], ids=" ".join)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert "calib verify --help" in is_one_clear_line(run_here(["verify", *arguments], capsys), status=2)


def test_help_and_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(["verify", "--help"], capsys)
    assert outcome.status == 0
    assert "--repair" in outcome.out
    assert "verify DIR" in run_here(["--help"], capsys).out
    assert "'verify'" in is_one_clear_line(run_here(["verfy"], capsys))


def test_a_damaged_manifest_offers_to_rebuild_it(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "manifest.json").write_text("{")
    line = is_one_clear_line(run_here(["verify", str(dataset)], capsys), status=1)
    assert f"calib rebuild-manifest {dataset}" in line


def test_processes_end_with_the_right_status(dataset: Path) -> None:
    assert run_process(dataset.parent, "verify", "dataset").status == 0
    flip_byte(dataset / STATES, 5000)
    outcome = run_process(dataset.parent, "verify", "dataset", "--json")
    assert outcome.status == 1
    assert json.loads(outcome.out)["bad_images"] == [1]


def test_a_read_only_dataset_is_verified_and_its_repair_refused(dataset: Path) -> None:
    """By a user without special rights, as root may write anywhere."""
    flip_byte(dataset / PICTURE, 200)
    before = everything(dataset)
    parts = (*(path for path in dataset.rglob("*") if path.is_dir()), dataset)
    for part in parts:
        part.chmod(0o555)
    for part in dataset.parents[:-1]:
        part.chmod(part.stat().st_mode | 0o011)
    try:
        code = "import os, sys; from calib.cli import main; os.geteuid() or os.setuid(65534); main(sys.argv[1:])"

        def run(*options: str) -> subprocess.CompletedProcess[str]:
            arguments = [sys.executable, "-c", code, "verify", str(dataset), *options]
            return subprocess.run(arguments, env=environment(), capture_output=True, text=True)

        done = run("--json")
        assert done.returncode == 1
        assert json.loads(done.stdout)["bad_images"] == [1]
        done = run("--repair")
        assert done.returncode == 1
        assert done.stderr == f"calib: {dataset}: cannot be written (Permission denied)\n"
        assert everything(dataset) == before
    finally:
        for part in parts:
            part.chmod(0o755)


def test_an_interrupted_verify_ends_at_once(dataset: Path) -> None:
    code = (
        "import time, calib.dataset.verify as v; from calib.cli import main; import sys\n"
        "v.check_image = lambda *a: (print('at work', flush=True), time.sleep(0.5))\n"
        "main(sys.argv[1:])\n"
    )
    restated(
        dataset,
        lambda document: document["images"].extend({**document["images"][0], "image_id": i} for i in range(10, 200)),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "verify", str(dataset)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 3
    assert process.returncode == 130
    assert err.splitlines()[-1] == "calib: interrupted; nothing was changed"
