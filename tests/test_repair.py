"""Repair moves what is wrong aside and nothing is lost; the command says what it found."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from calib.dataset.generate import generate
from calib.dataset.load import load_manifest
from calib.dataset.repair import repair
from calib.dataset.verify import verify
from calib.models.model import DiffusionModel

import pytest
from damage import IMAGES, LATENT, PICTURE, SETTINGS, STATES, restated, without_aside
from helpers import (
    PROMPTS,
    contents,
    environment,
    everything,
    flip_byte,
    is_one_clear_line,
    run_here,
    run_process,
    run_without_rights,
)

# Repair


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
        "import os, shutil, signal, sys; import calib.dataset.repair as r; from calib.cli.main import main\n"
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
    flip_byte(dataset / PICTURE, 200)
    for lock in dataset.glob(".*"):
        lock.unlink()
    before = everything(dataset)
    parts = (*(path for path in dataset.rglob("*") if path.is_dir()), dataset)
    for part in parts:
        part.chmod(0o555)
    try:
        outcome = run_without_rights(dataset.parent, "verify", "dataset", "--json")
        assert outcome.status == 1
        assert json.loads(outcome.out)["bad_images"] == [1]
        line = is_one_clear_line(run_without_rights(dataset.parent, "verify", "dataset", "--repair"), status=1)
        assert line == "dataset: cannot be written (Permission denied)"
        assert everything(dataset) == before
    finally:
        for part in parts:
            part.chmod(0o755)


def test_an_interrupted_verify_ends_at_once(dataset: Path) -> None:
    code = (
        "import time, calib.dataset.verify as v; from calib.cli.main import main; import sys\n"
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
