"""Collection survives what happens to long jobs: errors, kills, signals, company and full disks."""

import io
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from calib.activations.observer_mlx import MlxObserver
from calib.models.model import DiffusionModel, weights_fingerprint

import pytest
from helpers import (
    contents,
    end,
    everything,
    exit_status,
    fill,
    lines_of,
    run_here,
    run_in,
    start_process,
    temporaries,
    wait_until,
)
from watching import EVERY_TAP, FEW, collection_of

STEPS = 9


def arguments(data_dir: Path, *more: str) -> list[str]:
    """Of ``calib collect`` of some taps of four images at nine steps: 18 forwards, some two seconds."""
    given = ("sampler.num_steps=8", "timestep_schedule=all", "collect.batch_size=2", "taps=all", "storage=sampled")
    taps = "taps.include=['*.image.mlp.*','x_embedder','mm_block_1']"
    return ["collect", f"data_dir={data_dir}", *given, taps, "report=none", *more]


RUN = "hydra.run.dir=run"


def finished(folder: Path) -> list[Path]:
    """The steps in the cache below ``folder``."""
    return sorted(folder.glob("calibration_cache/activations/*/step_????.npz"))


def state_of(run: Path) -> str:
    return str(json.loads((run / "status.json").read_text())["state"])


@pytest.fixture(scope="module")
def undisturbed(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a process that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = run_in(folder, *arguments(data_dir, RUN))
    assert outcome.status == 0, outcome.err
    assert len(finished(folder)) == STEPS
    return folder


def check_same_end(folder: Path, undisturbed: Path, run: str = "run") -> None:
    """The same statistics, to the bit, in the run directory and the cache; nothing half-made."""
    for name in ("activations.h5", "layer_statistics.json", "collection_metadata.json"):
        assert (folder / run / name).read_bytes() == (undisturbed / "run" / name).read_bytes(), name
    cache = "calibration_cache"
    assert contents(folder / cache) == contents(undisturbed / cache)
    assert temporaries(folder) == set()
    assert state_of(folder / run) == "complete"


# Errors


@pytest.mark.parametrize("error", [pytest.param(RuntimeError, marks=pytest.mark.slow), KeyboardInterrupt])
@pytest.mark.parametrize("where", ["see", "end_forward", "settle", "results"])
def test_the_model_is_the_loaded_one_again_however_a_collection_ends(
    model: DiffusionModel,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    where: str,
) -> None:
    before, fingerprint = [id(module) for module in model.transformer.modules()], weights_fingerprint(model.transformer)
    calls = 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return original(*arguments)

    original = getattr(MlxObserver, where)
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(MlxObserver, where, failing)
        collection_of(model, data_dir, tmp_path, [0, 1], EVERY_TAP).collect([0, 3, 8])
    assert [id(module) for module in model.transformer.modules()] == before
    assert weights_fingerprint(model.transformer) == fingerprint
    assert not any("_modulation_params" in module for _, module in model.transformer.named_modules())
    assert temporaries(tmp_path) == set()


def test_a_cache_that_cannot_be_written_to_leaves_the_model_as_it_was(
    model: DiffusionModel, data_dir: Path, tmp_path: Path
) -> None:
    before = [id(module) for module in model.transformer.modules()]
    collection = collection_of(model, data_dir, tmp_path, [0, 1], FEW)
    collection.cache.path(3).mkdir(parents=True)  # in the way of the file of that name
    (collection.cache.path(3) / "x").write_text("")
    with pytest.raises(Exception, match=r"step_0003\.npz"):
        collection.collect([0, 3, 8])
    assert [id(module) for module in model.transformer.modules()] == before
    assert temporaries(tmp_path) == set()


# kill -9 and signals


def test_killed_in_the_middle_it_goes_on_from_the_last_finished_step(
    data_dir: Path, undisturbed: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_process(folder, *arguments(data_dir, RUN))
    wait_until(lambda: len(finished(folder)) >= 3, process)
    process.kill()
    status, err = end(process)
    assert status == -signal.SIGKILL, err
    before = {path: path.stat().st_mtime_ns for path in finished(folder)}
    assert 3 <= len(before) < STEPS
    assert not (folder / "run" / "activations.h5").exists()
    assert state_of(folder / "run") == "running"
    outcome = run_here(arguments(data_dir, RUN), capsys)
    assert outcome.status == 0, outcome.err
    left = STEPS - len(before)
    assert f"collect 4 images at {left} steps: {2 * left} forwards" in outcome.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    check_same_end(folder, undisturbed)


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_ends_it_in_order_with_what_is_finished_kept(
    data_dir: Path, folder: Path, number: signal.Signals, expected: int
) -> None:
    process = start_process(folder, *arguments(data_dir, RUN))
    wait_until(lambda: len(finished(folder)) >= 2, process)
    process.send_signal(number)
    status, err = end(process)
    assert status == expected, err
    (line,) = lines_of(err)
    assert line.startswith("interrupted; ")
    assert "the same command goes on" in line
    assert "ignored" not in err, err
    assert 2 <= len(finished(folder)) < STEPS
    assert temporaries(folder) == set()
    assert state_of(folder / "run") == "failed"


# Several processes


def test_two_processes_that_collect_the_same_take_turns_and_the_second_says_so(
    data_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    first = start_process(tmp_path, *arguments(data_dir, RUN))
    wait_until(lambda: bool(finished(tmp_path)), first)
    first.send_signal(signal.SIGSTOP)
    before: list[Path] = []

    class Listener(io.StringIO):
        """Lets the first process go on once this one says that it waits."""

        def write(self, text: str) -> int:
            if "waiting for the process that collects the same statistics" in text:
                before.extend(finished(tmp_path))
                first.send_signal(signal.SIGCONT)
            return super().write(text)

    with chdir(tmp_path), redirect_stderr(Listener()) as err, redirect_stdout(io.StringIO()):
        status = exit_status(arguments(data_dir, "hydra.run.dir=run2"))
    assert status == 0, err.getvalue()
    assert end(first)[0] == 0
    assert 1 <= len(before) < STEPS
    assert "images at" not in err.getvalue(), "nothing was left to collect"
    check_same_end(tmp_path, undisturbed)
    check_same_end(tmp_path, undisturbed, "run2")


@pytest.mark.slow
def test_shards_have_places_of_their_own_in_the_cache(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        given = ["collect", f"data_dir={data_dir}", "sampler.num_steps=8", "timestep_schedule=list"]
        given += ["timestep_schedule.steps=[3]", "taps.include=[x_embedder]", "collect.batch_size=1", "report=none"]
        outcome = run_here([*given, f"hydra.run.dir=run{i}", f"shard.index={i}", "shard.count=3"], capsys)
        assert outcome.status == 0, outcome.err
        assert f"Shard {i} of 3: calib merge joins the shards' run directories" in outcome.out
    images = [json.loads((folder / f"run{i}" / "collection_metadata.json").read_text())["image_ids"] for i in range(3)]
    assert images == [[0, 3], [1], [2]]
    assert len(list((folder / "calibration_cache" / "activations").iterdir())) == 3


# A full disk


@pytest.fixture
def held(small_disk: Path, folder: Path, data_dir: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process that collects into a cache on the small disk, stopped when a step is there; and its arguments."""
    schedule = ("sampler.num_steps=8", "timestep_schedule=all", "collect.batch_size=2", "taps.include=['*.fc2']")
    kept = ("storage=sampled", "storage.rows_per_image=1", "cache_dir=disk/cache", "report=none")
    given = ["collect", f"data_dir={data_dir}", *schedule, *kept, RUN]
    process = start_process(folder, *given)
    wait_until(lambda: bool(list(small_disk.rglob("step_????.npz"))), process)
    process.send_signal(signal.SIGSTOP)
    yield process, given
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_disk_that_fills_under_the_cache_loses_nothing(
    held: tuple[subprocess.Popen[str], list[str]], small_disk: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process, given = held
    ballast = fill(small_disk)
    process.send_signal(signal.SIGCONT)
    status, err = end(process)
    assert status == 1, err
    (line,) = lines_of(err)
    assert "disk/cache/activations/" in line
    assert "No space left on device" in line
    assert temporaries(small_disk) == set()
    assert state_of(folder / "run") == "failed"
    kept = list(small_disk.rglob("step_????.npz"))
    assert 1 <= len(kept) < STEPS
    ballast.unlink()
    shutil.move(small_disk / "cache", folder / "calibration_cache")  # two megabytes are not enough for all
    outcome = run_here([argument for argument in given if not argument.startswith("cache_dir")], capsys)
    assert outcome.status == 0, outcome.err
    assert f"collect 4 images at {STEPS - len(kept)} steps" in outcome.err


def test_a_disk_with_no_room_for_the_activations_is_told_and_what_was_collected_is_kept(
    small_disk: Path, folder: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["timestep_schedule=quarters" if a.startswith("timestep") else a for a in arguments(data_dir)]
    outcome = run_here([*given, "hydra.run.dir=disk/run"], capsys)
    assert outcome.status == 1, outcome
    (line,) = lines_of(outcome.err)
    assert line.endswith("disk/run/activations.h5: No space left on device")
    assert temporaries(small_disk) == set()
    assert not (small_disk / "run" / "activations.h5").exists()
    assert not (small_disk / "run" / "layer_statistics.json").exists()
    assert state_of(small_disk / "run") == "failed"
    outcome = run_here([*given, RUN], capsys)
    assert outcome.status == 0, outcome.err
    assert "images at" not in outcome.err, "all was in the cache"
    assert "activations.h5" in everything(folder / "run")
