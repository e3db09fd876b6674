"""Generation survives what happens to long jobs: kills, signals, company and full disks."""

import io
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import TypeAlias

from calib.dataset import prompts
from calib.dataset.generate import generate
from calib.dataset.settings import SamplerSettings
from calib.dataset.store import StorageFormat
from calib.models.model import DiffusionModel

import pytest
from helpers import (
    command,
    contents,
    end,
    environment,
    everything,
    exit_status,
    fill,
    is_one_clear_line,
    lines_of,
    listed,
    run_here,
    run_in,
    run_process,
    start_process,
    temporaries,
    wait_until,
)

STEPS = 2
#: Of each storage format's processes.
KILLS = 10
Undisturbed: TypeAlias = Callable[[int, StorageFormat], dict[str, str]]


def arguments(num_images: int, num_steps: int = STEPS, *more: str) -> list[str]:
    """Of ``calib generate`` for the dataset that :func:`undisturbed` makes."""
    sampler = (f"sampler.num_steps={num_steps}", "sampler.batch_size=2")
    own = ("data_dir=dataset", "hydra.run.dir=run", "report=none")
    return ["generate", f"num_images={num_images}", *sampler, *own, *more]


@pytest.fixture(scope="module")
def undisturbed(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What one process makes of so many images when nothing happens to it."""

    @cache
    def made(num_images: int, storage: StorageFormat) -> dict[str, str]:
        folder, settings = tmp_path_factory.mktemp("undisturbed"), SamplerSettings(num_steps=STEPS, batch_size=2)
        generate(model, prompts.emoji(), num_images, folder / "dataset", settings, storage=storage)
        return contents(folder / "dataset")

    return made


# kill -9


def kill_at_some_moment(work: Path, given: list[str], moment: str, chance: random.Random) -> bool:
    """Start a process and kill it; whether it was still at work.

    Args:
        moment: while it "starts", "draws" (and writes what is drawn), "writes" a file, or "lists" images as done.
    """
    left, pictures = temporaries(work), work / "dataset" / "images"
    goal = len(list(pictures.glob("*.png"))) + 2 * chance.choice([0, 0, 1])
    with open(work / "log", "w") as log:
        process = subprocess.Popen(command(*given), cwd=work, env=environment(), stdout=log, stderr=log)
        if moment == "starts":
            time.sleep(chance.uniform(0, 1.5))
        elif moment == "draws":
            wait_until(lambda: "images to do" in (work / "log").read_text(), process)
            wait_until(lambda: len(list(pictures.glob("*.png"))) >= goal, process)
            time.sleep(chance.uniform(0, 0.3))
        elif moment == "lists":
            wait_until(lambda: any(".manifest." in path.name for path in temporaries(work) - left), process, pause=0)
        else:
            wait_until(lambda: len(list(pictures.glob("*.png"))) >= goal, process)
            for _ in range(chance.randint(1, 6)):
                wait_until(lambda: not temporaries(work) <= left, process, pause=0)
                left.update(temporaries(work))
        process.kill()
        return process.wait() == -signal.SIGKILL


def kill_many_times(work: Path, storage: StorageFormat) -> tuple[int, int]:
    """Processes on one dataset, killed one after the other; a process that ends by itself is asked for more images.

    Returns:
        Images asked for in the end, and how many kills left a half-written file.
    """
    chance, num_images, killed, halves = random.Random(storage), 6, 0, 0
    while killed < KILLS:
        moment = chance.choice(["starts", "draws", "writes", "lists"])
        if kill_at_some_moment(work, arguments(num_images, STEPS, f"dataset={storage}"), moment, chance):
            killed += 1
        else:
            assert json.loads((work / "run" / "status.json").read_text())["state"] == "complete"
            assert listed(work / "dataset") == set(range(num_images))
            num_images += 2
        halves += bool(temporaries(work))
        listed(work / "dataset")
    return num_images, halves


@pytest.mark.slow
def test_killed_at_any_moment_the_next_process_goes_on_to_the_same_files(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    works = {storage: tmp_path / storage for storage in StorageFormat}
    for work in works.values():
        work.mkdir()
    with ThreadPoolExecutor() as pool:  # two datasets at once, to save time
        ends = list(pool.map(lambda storage: kill_many_times(works[storage], storage), works))
    assert sum(halves for _, halves in ends) >= 3, "too few kills met a half-written file"
    for (storage, work), (num_images, _) in zip(works.items(), ends, strict=True):
        num_images += 2
        kept = listed(work / "dataset")
        outcome = run_process(work, *arguments(num_images, STEPS, f"dataset={storage}"))
        assert outcome.status == 0, outcome.err
        assert f"({num_images} images, {num_images - len(kept)} new)" in outcome.out
        assert contents(work / "dataset") == undisturbed(num_images, storage)
        assert temporaries(work / "dataset") == set()


# Several processes


def test_shards_fill_one_dataset_at_the_same_time_and_one_of_them_may_die(
    undisturbed: Undisturbed, folder: Path
) -> None:
    shards = [arguments(8, STEPS, f"shard.index={i}", "shard.count=2", f"hydra.run.dir=run{i}") for i in range(2)]
    process = start_process(folder, *shards[1])
    wait_until(lambda: (folder / "dataset/samples/0002.h5").exists(), process)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    process = start_process(folder, *shards[1])
    wait_until(lambda: bool(temporaries(folder / "dataset")), process)
    outcome = run_in(folder, *shards[0])
    assert outcome.status == 0, outcome.err
    status, err = end(process)
    assert status == 0, err
    assert listed(folder / "dataset") == set(range(8))
    assert contents(folder / "dataset") == undisturbed(8, StorageFormat.HDF5)
    assert temporaries(folder) == set()


@pytest.fixture
def drawing(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of drawing four images, stopped; it goes on when it gets SIGCONT."""
    process = start_process(tmp_path, *arguments(4))
    wait_until((tmp_path / "dataset/manifest.json").exists, process)
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_on_the_same_shard_ends_with_one_clear_line(
    drawing: subprocess.Popen[str], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    outcome = run_in(tmp_path, *arguments(4), "hydra.run.dir=run2")
    assert "another process is drawing this dataset" in is_one_clear_line(outcome, status=1)
    assert json.loads((tmp_path / "run2" / "status.json").read_text())["state"] == "failed"
    drawing.send_signal(signal.SIGCONT)
    status, err = end(drawing)
    assert status == 0, err
    assert contents(tmp_path / "dataset") == undisturbed(4, StorageFormat.HDF5)


STAGES = [
    ["run", "hydra.run.dir=run2"],
    pytest.param(["generate", "-m", "keep_awake=false,true", "hydra.sweep.dir=run2"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("stage", STAGES, ids=["run", "sweep"])
def test_runs_and_sweeps_wait_for_the_process_that_draws_and_say_so(
    drawing: subprocess.Popen[str], undisturbed: Undisturbed, tmp_path: Path, stage: list[str]
) -> None:
    given = [*stage, *arguments(4)[1:], "timestep_schedule=quarters", "taps.include=[x_embedder]", "evaluation=none"]
    given += ["analysis=range", "quantizer=rtn"]
    if "-m" not in stage:
        given.remove("hydra.run.dir=run")
    waited = False

    class Listener(io.StringIO):
        """Lets the drawing process go on once this one says that it waits."""

        def write(self, text: str) -> int:
            nonlocal waited
            if "waiting for the process that draws dataset" in text:
                assert listed(tmp_path / "dataset") == set()
                waited = True
                drawing.send_signal(signal.SIGCONT)
            return super().write(text)

    with chdir(tmp_path), redirect_stderr(Listener()) as err, redirect_stdout(io.StringIO()) as out:
        status = exit_status(given)
    assert waited and status == 0, err.getvalue()
    assert end(drawing)[0] == 0
    assert "(4 images, 0 new)" in out.getvalue()
    assert contents(tmp_path / "dataset") == undisturbed(4, StorageFormat.HDF5)


# Signals


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_drawing_within_a_step(tmp_path: Path, number: signal.Signals, status: int) -> None:
    process = start_process(tmp_path, *arguments(2, num_steps=3000))  # minutes for the one block
    wait_until((tmp_path / "dataset/manifest.json").exists, process)
    time.sleep(1)
    process.send_signal(number)
    start = time.monotonic()
    found, err = end(process)
    assert time.monotonic() - start < 5, "a step takes some hundredths of a second"
    assert found == status, err
    assert lines_of(err) == ["interrupted; 0 of 2 images done and kept in dataset; the same command goes on from there"]
    assert listed(tmp_path / "dataset") == set()
    state = json.loads((tmp_path / "run" / "status.json").read_text())
    assert state["state"] == "failed"
    assert state["end"] is not None
    assert temporaries(tmp_path) == set()


def test_terminated_between_blocks_what_is_done_is_kept(undisturbed: Undisturbed, tmp_path: Path) -> None:
    process = start_process(tmp_path, *arguments(8))
    wait_until(lambda: len(listed(tmp_path / "dataset")) >= 2, process)
    process.terminate()
    status, err = end(process)
    assert status == 143, err
    kept = listed(tmp_path / "dataset")
    assert 2 <= len(kept) < 8
    (line,) = lines_of(err)
    assert line.startswith(f"interrupted; {len(kept)} of 8 images done and kept in dataset;")
    outcome = run_in(tmp_path, *arguments(8))
    assert outcome.status == 0, outcome.err
    assert f"(8 images, {8 - len(kept)} new)" in outcome.out
    assert contents(tmp_path / "dataset") == undisturbed(8, StorageFormat.HDF5)


@pytest.mark.slow
def test_an_interruption_that_python_swallows_is_not_lost(tmp_path: Path) -> None:
    """It arrives in a callback of the garbage collector, whose exceptions are printed and dropped."""
    code = """
import gc, os, signal, sys
from pathlib import Path
from typing import TypeAlias
from calib.cli.main import main

def callback(phase, info):
    if Path("dataset/manifest.json").exists():
        gc.callbacks.remove(callback)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10):
            pass  # the signal's handler runs between two instructions
        print("not reached")

gc.callbacks.append(callback)
gc.set_threshold(1, 1000, 1000)
main(sys.argv[1:])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(2, num_steps=300)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Exception ignored" in done.stderr, "the signal came in the callback"
    assert "not reached" not in done.stdout
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith("calib: interrupted; 0 of 2 images done")
    assert listed(tmp_path / "dataset") == set()


# A full disk


def test_a_disk_that_cannot_hold_the_images_is_refused_before_anything_is_made(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run_here([*arguments(100, 1), "data_dir=disk/dataset"], capsys)
    assert outcome.status == 1
    (line,) = lines_of(outcome.err)
    assert re.match(r"disk/dataset: 100 images \D* [\d.]+ MB", line)
    assert "2.1 MB are free" in line
    assert everything(small_disk) == []
    # What is left to do must fit, not what is there already.
    assert run_here([*arguments(12, 1), "data_dir=disk/dataset"], capsys).status == 0
    fill(small_disk, room=300_000)
    assert run_here([*arguments(14, 1), "data_dir=disk/dataset", "hydra.run.dir=run2"], capsys).status == 0
    before = everything(small_disk)
    outcome = run_here([*arguments(20, 1), "data_dir=disk/dataset", "hydra.run.dir=run3"], capsys)
    assert outcome.status == 1
    assert re.match(r"disk/dataset: 6 images \D* [\d.]+ kB", lines_of(outcome.err)[0])
    assert everything(small_disk) == before


@pytest.mark.parametrize(
    "run", [pytest.param("run", marks=pytest.mark.slow), "disk/run"], ids=["", "with the run directory"]
)
def test_a_disk_that_fills_while_images_are_drawn_loses_nothing(
    small_disk: Path, undisturbed: Undisturbed, folder: Path, run: str
) -> None:
    given = [*arguments(8), "data_dir=disk/dataset", f"hydra.run.dir={run}"]
    process = start_process(folder, *given)
    wait_until(lambda: bool(listed(small_disk / "dataset")), process)
    process.send_signal(signal.SIGSTOP)
    ballast = fill(small_disk)
    process.send_signal(signal.SIGCONT)
    status, err = end(process)
    assert status == 1, err
    kept = listed(small_disk / "dataset")
    assert 2 <= len(kept) < 8
    (line,) = lines_of(err)
    assert "No space left on device" in line
    assert f"{len(kept)} of 8 images done and kept in disk/dataset" in line
    assert temporaries(small_disk) == set()
    ballast.unlink()
    outcome = run_in(folder, *given)
    assert outcome.status == 0, outcome.err
    assert contents(small_disk / "dataset") == undisturbed(8, StorageFormat.HDF5)


def test_a_disk_that_is_full_from_the_start_ends_with_one_clear_line(small_disk: Path, folder: Path) -> None:
    fill(small_disk)
    outcome = run_in(folder, *arguments(1), "hydra.run.dir=disk/run")
    assert outcome.status == 1
    assert len(lines_of(outcome.err)) == 1
    assert "No space left on device" in outcome.err
