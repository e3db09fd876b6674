"""Sweeps as people run them: jobs that share, fail, are killed, run side by side, and go on."""

import json
import os
import signal
import time
from pathlib import Path

from calib.activations.reader import ActivationFile
from calib.base.locks import is_locked
from calib.cli.sweep import _lacking
from calib.dataset.load import load_manifest
from calib.runs.standing import RunState, Standing

import pytest
from helpers import (
    TINY,
    contents,
    end,
    is_one_clear_line,
    run_here,
    run_in,
    run_process,
    run_without_rights,
    start_process,
    wait_until,
    well,
)

#: A job in a second: nothing is drawn again.
SMALL = (*TINY[:7], "quantizer.search=false", "evaluation=none", "taps.include=['*.fc2']", "report=none")

BROKEN = '''
"""A heuristic that is broken, until a file says that it was mended."""
from pathlib import Path
from calib.analysis.layers import PROBE, LayerSummary
from calib.analysis.plan import LayerPlan

def plan_layer(layer: LayerSummary) -> LayerPlan:
    if layer is not PROBE and not Path("mended").exists():
        raise ZeroDivisionError("a mistake of the user's own")
    return LayerPlan(4, 8)
'''


ANALYSES = ("analyze,analysis=range", "analyze,analysis=broken", "analyze,analysis=uniform")


@pytest.fixture(scope="module")
def of_statistics(tiny_run: Path) -> list[str]:
    """A sweep of jobs that take a tenth of a second: plans from what a run has collected of a few layers."""
    here = ("data_dir=dataset", "taps.include=['*.fc2']", "hydra.run.dir=swept")
    well(run_in(tiny_run.parent, "collect", *TINY, *here))
    given = (override for override in TINY if override != "analysis=range")
    return ["analyze", "-m", f"stats={tiny_run.parent / 'swept'}", *given]


def states(sweep: Path) -> dict[str, str]:
    """State of each job by its folder's name, without the hash."""
    found = {path.parent.name: json.loads(path.read_text())["state"] for path in sweep.glob("*/status.json")}
    return {name.rpartition("-")[0]: state for name, state in found.items()}


def the_sweep(folder: Path) -> Path:
    (sweep,) = folder.glob("multirun/*")
    return sweep


def times(run: Path) -> dict[Path, int]:
    """When each file of a run directory was written."""
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def own_heuristic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own analysis=broken beside calib's options."""
    (folder / "own" / "analysis").mkdir(parents=True)
    (folder / "own" / "analysis" / "broken.yaml").write_text("_target_: broken_heuristic.plan_layer\n")
    (folder / "broken_heuristic.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_a_job_that_fails_in_any_way_is_recorded_and_the_others_run(
    of_statistics: list[str], own_heuristic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*of_statistics, "analysis=range,broken,uniform", "--config-dir=own"]
    outcome = run_here(given, capsys)
    assert outcome.status == 1
    sweep = the_sweep(own_heuristic)
    assert states(sweep) == dict(zip(ANALYSES, ("complete", "failed", "complete"), strict=True))
    (failed,) = sweep.glob("analyze,analysis=broken-*")
    status = json.loads((failed / "status.json").read_text())
    raised = "raised ZeroDivisionError: a mistake of the user's own (broken_heuristic.py:9); it must return a LayerPlan"
    assert status["error"] == f"analysis._target_=broken_heuristic.plan_layer: {raised} for each layer"
    log = (failed / "run.log").read_text()
    assert "Traceback" in log and "broken_heuristic.py" in log
    assert "Traceback" not in outcome.err
    assert f"{failed.name}: {status['error']}" in outcome.err
    assert "3 jobs, 2 complete, 1 failed" in outcome.out
    assert f"1 of the sweep's 3 jobs failed ({failed.name})" in outcome.err

    # Mended, the same sweep runs what is missing, and nothing else.
    before = {run: times(run) for run in sweep.iterdir() if run.is_dir() and run != failed}
    (own_heuristic / "mended").touch()
    outcome = run_here(given, capsys)
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("Already complete: ") == 2
    assert set(states(sweep).values()) == {"complete"}
    assert len(states(sweep)) == 3
    assert json.loads((failed / "status.json").read_text())["error"] is None
    after = {run: times(run) for run in before}
    assert {run: {p: t for p, t in at.items() if ".hydra" not in p.parts} for run, at in after.items()} == {
        run: {p: t for p, t in at.items() if ".hydra" not in p.parts} for run, at in before.items()
    }


def test_jobs_that_cannot_begin_fail_alone(data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of datasets that lack what they list, and that cannot be read: known only when a job begins."""
    for name, manifest in (("lacking", (data_dir / "manifest.json").read_text()), ("damaged", "{")):
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(manifest)
    given = ["collect", "-m", f"data_dir=lacking,damaged,{data_dir}", "sampler.num_steps=8", "timestep_schedule=list"]
    given += ["timestep_schedule.steps=[0]", "generate_missing=false", "taps.include=[x_embedder]", "report=none"]
    outcome = run_here([*given, "hydra.sweep.dir=sweep"], capsys)
    assert outcome.status == 1
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("sweep/*/status.json")}
    assert sorted(status["state"] for status in found.values()) == ["complete", "failed", "failed"]
    errors = {name: status["error"] for name, status in found.items() if status["state"] == "failed"}
    (lacking,) = (name for name in errors if "lacking" in name)
    (damaged,) = (name for name in errors if "damaged" in name)
    assert "samples" in errors[lacking]
    assert errors[damaged].startswith("damaged/manifest.json: not valid JSON"), "said without the name of a class"
    assert "Traceback" in (folder / "sweep" / lacking / "run.log").read_text()


def test_no_jobs_at_once_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["-m", *SMALL, "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"]
    outcome = run_here(given, capsys)
    assert "hydra.launcher.n_jobs=0: must be 1 or more" in is_one_clear_line(outcome)
    assert not list(folder.iterdir())


def test_jobs_that_another_process_runs_are_not_called_failed() -> None:
    lacking = [
        Standing(Path("a"), RunState.RUNNING),
        Standing(Path("b"), RunState.FAILED, "x"),
        Standing(Path("c"), RunState.INCOMPLETE),
    ]
    told = _lacking(lacking, 4)
    assert "1 of the sweep's 4 jobs failed (b)" in told
    assert "1 of the sweep's 4 jobs are run by another process (a); wait for it" in told
    assert "1 of the sweep's 4 jobs ended without a word (c)" in told


def test_more_values_go_on_in_the_same_folder(
    of_statistics: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, *given = of_statistics
    assert run_here([stage, *given, "analysis=range,uniform"], capsys).status == 0
    outcome = run_here([stage, "analysis=uniform,range,cv", *reversed(given)], capsys)
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("Already complete: ") == 2
    assert len(states(the_sweep(folder))) == 3
    outcome = run_here([stage, *given, "analysis=range,uniform", "phase_bits=false"], capsys)
    assert outcome.status == 0 and "Already complete" not in outcome.out
    assert len(list(folder.glob("multirun/*"))) == 2, "another sweep, another folder"


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["-m", *SMALL, "analysis=range,uniform,cv"]
    process = start_process(folder, *given)

    def one_is_complete() -> bool:
        return any(
            json.loads(path.read_text())["state"] == "complete" for path in folder.glob("multirun/*/*/status.json")
        )

    wait_until(one_is_complete, process)
    process.kill()
    end(process)
    sweep = the_sweep(folder)
    complete = {name for name, state in states(sweep).items() if state == "complete"}
    assert complete and complete < {"analysis=range", "analysis=uniform", "analysis=cv"}
    outcome = run_here(given, capsys)
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("Already complete: ") == len(complete)
    assert set(states(sweep)) == {"analysis=range", "analysis=uniform", "analysis=cv"}
    assert "3 jobs, 3 complete" in outcome.out
    metrics = [json.loads(path.read_text()) for path in sweep.glob("*/metrics.json")]
    assert sum(found["images_generated"] for found in metrics) == 2, "drawn once"


def test_side_by_side_gives_what_one_after_the_other_gives(tmp_path: Path) -> None:
    """Jobs share one dataset and what is collected either way."""
    one, other = tmp_path / "serial", tmp_path / "joblib"
    given = ["-m", *SMALL, "timestep_schedule=quarters,all", "analysis=range"]
    one.mkdir()
    outcome = run_in(one, *given)
    assert outcome.status == 0, outcome.err
    other.mkdir()
    outcome = run_process(other, *given, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert outcome.status == 0, outcome.err
    check_shared(one, runs=2, drawings=1)
    check_shared(other, runs=2, drawings=1)
    check_side_by_side(one, other, outcome.err, runs=2)
    assert not list(tmp_path.rglob("*.html")), "report=none"


@pytest.mark.slow
def test_more_jobs_than_go_side_by_side_with_pages_and_evaluations(tmp_path: Path) -> None:
    one, other = tmp_path / "serial", tmp_path / "joblib"
    given = ["-m", *TINY[:-1], "taps.include=['*.fc2']", "timestep_schedule=quarters,all", "analysis=range,uniform"]
    one.mkdir()
    outcome = run_process(one, *given)
    assert outcome.status == 0, outcome.err
    other.mkdir()
    outcome = run_process(other, *given, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert outcome.status == 0, outcome.err
    for folder in (one, other):
        check_shared(folder, runs=4, drawings=2)
        assert len(list((folder / "calibration_cache").glob("evaluation/*.json"))) == 1
        assert (the_sweep(folder) / "comparison.html").stat().st_size > 10_000
    check_side_by_side(one, other, outcome.err, runs=4)


def check_shared(folder: Path, runs: int, drawings: int) -> None:
    """Images and statistics were made once for all runs; ``drawings`` counts the folders of drawn images."""
    made = [path for path in the_sweep(folder).iterdir() if path.is_dir()]
    assert len(made) == runs
    drawn = sorted((folder / "calibration_data").iterdir())
    assert [sorted(load_manifest(dataset).images) for dataset in drawn] == [[0, 1]] * drawings
    metrics = [json.loads((run / "metrics.json").read_text()) for run in made]
    assert sorted(found["images_generated"] for found in metrics) == [*[0] * (runs - 1), 2], "drawn once"
    assert len(list((folder / "calibration_cache").glob("activations/*/step_*.npz"))) == 5
    assert not list(folder.rglob("*.tmp"))


def check_side_by_side(one: Path, other: Path, said: str, runs: int) -> None:
    """The sweep in ``other`` ran in two processes, and made what that in ``one`` made."""
    assert "2 jobs side by side" in said
    assert said.count(" done in ") == runs
    assert "collect 2 images" not in said, "progress of jobs side by side goes to files of their own"
    for run in (path for path in the_sweep(one).iterdir() if path.is_dir()):
        twin = the_sweep(other) / run.name
        assert "Layer Statistics Summary:" in (twin / "console.txt").read_text()
        plans = [json.loads((path / "quantization_config.json").read_text()) for path in (run, twin)]
        assert plans[0] == plans[1]
        # Products of another number of threads are summed in another order.
        ranges = [json.loads((path / "layer_statistics.json").read_text()) for path in (run, twin)]
        for layer, found in ranges[0].items():
            assert ranges[1][layer]["max"] == pytest.approx(found["max"], rel=1e-3), layer
        with ActivationFile(run / "activations.h5") as a, ActivationFile(twin / "activations.h5") as b:
            assert a.steps == b.steps
        assert {f for f in contents(run) if "hydra" not in f} == {
            f for f in contents(twin) if "hydra" not in f and f != "console.txt"
        }


def held(folder: Path) -> list[Path]:
    """Run directories that a living process works in."""
    return [lock for lock in folder.rglob("multirun/*/*/.lock") if is_locked(lock)]


@pytest.mark.slow
def test_killed_side_by_side_it_leaves_no_process_and_goes_on(folder: Path) -> None:
    given = ["-m", *SMALL, "analysis=range,uniform,cv", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = start_process(folder, *given)
    wait_until(lambda: any(folder.glob("multirun/*/*/status.json")), process)
    os.kill(process.pid, signal.SIGKILL)
    end_of_all = time.monotonic() + 20
    process.wait()
    while held(folder) and time.monotonic() < end_of_all:
        time.sleep(0.1)
    assert not held(folder), "workers end with the process that started them"
    outcome = run_process(folder, *given)
    assert outcome.status == 0, outcome.err
    assert set(states(the_sweep(folder))) == {"analysis=range", "analysis=uniform", "analysis=cv"}
    assert "3 jobs, 3 complete" in outcome.out


def test_a_multirun_folder_that_cannot_be_written_is_one_clear_line(folder: Path) -> None:
    (folder / "multirun").mkdir(mode=0o555)
    outcome = run_without_rights(folder, "-m", *SMALL, "seed=1,2", f"data_dir={folder}/d", f"cache_dir={folder}/c")
    assert outcome.status == 2
    assert "hydra.sweep.dir=multirun/" in outcome.err and "cannot be written" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not list((folder / "multirun").iterdir())


def test_of_a_sweep_the_first_jobs_configuration_can_be_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(["-m", "seed=3,4", "--cfg", "job"], capsys)
    assert outcome.status == 0, outcome.err
    assert "\nseed: 3\n" in outcome.out
    assert not list(folder.iterdir())
