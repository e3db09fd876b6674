"""Results of a run directory stay until those of a later job exist, whatever ends it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from calib.base.files import write_json, write_text
from calib.base.layout import ACTIVATIONS, EXCHANGE, LOCK, METRICS, NEXT, PAGE, PLAN, STATUS
from calib.runs.directory import RunDirectory
from calib.runs.exchange import exchange, prepare, settle
from calib.runs.find import read_runs
from calib.runs.standing import RunState, changed_files, results_of, standing

import pytest
from helpers import TINY, contents, end, environment, run_here, start_process, wait_until, well

#: Kills itself in the middle of an exchange in argv[1], before the change to the disk of number argv[2].
KILLED = """
import os, signal, sys
from pathlib import Path
from calib.runs.exchange import exchange
left = int(sys.argv[2])
def counted(change):
    def changed(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return change(*arguments, **options)
    return changed
for name in ("replace", "unlink", "rmdir", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
exchange(Path(sys.argv[1]))
"""

OLD = {
    **{PLAN: "old plan", PAGE: "old page", METRICS: '{"psnr": 1}', "images/pictures.png": "old", "mine.txt": "mine"},
    **{f"quantized/{name}": "old" for name in ("config.json", "model.safetensors", "phases.safetensors")},
    **{"images/full/0000.png": "old", "images/full/0001.png": "old", "run.log": "old and new"},
    STATUS: '{"state": "complete", "fingerprint": "old"}',
}
NEW = {
    **{PLAN: "new plan", METRICS: '{"psnr": 2}', "images/full/0000.png": "new"},
    **{f"quantized/{name}": "new" for name in ("config.json", "model.safetensors")},
    STATUS: '{"state": "complete", "fingerprint": "new"}',
}
STALE = [PAGE, METRICS, PLAN, "quantized", "images/pictures.png", "images/full"]
AFTER = NEW | {name: OLD[name] for name in ("mine.txt", "run.log")}


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        write_text(folder / name, content)
    return folder


def texts(home: Path) -> dict[str, str]:
    """All files by name, but for the lock."""
    found = {path.relative_to(home).as_posix(): path for path in home.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in found.items() if name != LOCK}


@pytest.fixture
def decided(tmp_path: Path) -> Path:
    """A run directory with old results, and new ones that are to take their places."""
    home = written(tmp_path / "run", OLD)
    written(home / NEXT, NEW)
    prepare(home, STALE)
    return home


def test_exchange(decided: Path) -> None:
    exchange(decided)
    assert texts(decided) == AFTER
    assert sorted(path.name for path in decided.iterdir()) == sorted({name.partition("/")[0] for name in AFTER})


def test_killed_at_every_change(decided: Path, tmp_path: Path) -> None:
    """Whoever opens the directory next finds the new results, all of them and nothing else."""
    openers: list[Callable[[Path], object]] = [settle, standing, lambda home: read_runs([str(home)])]
    for change in range(100):
        home = Path(shutil.copytree(decided, tmp_path / f"killed{change}"))
        script = [sys.executable, "-c", KILLED, str(home), str(change)]
        status = subprocess.run(script, env=environment(), check=False).returncode
        openers[change % 3](home)
        assert {name: text for name, text in texts(home).items() if not name.startswith(NEXT)} == AFTER, change
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert change > 12


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "plan=run", "evaluation.num_images=1"),
        ("quantize", "plan=run"),
        ("analyze", "stats=run"),
        ("convergence", "run"),
        ("merge", "run", "--into", "whole"),
    ],
)
def test_a_source_is_settled(decided: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    """Whoever reads results that are not all in their places puts them there first; here they are no one's."""
    with contextlib.chdir(decided.parent):
        assert run_here(command, capsys).status in (1, 2)
    assert texts(decided) == AFTER


@pytest.mark.parametrize("state", ["running", "failed", None])
def test_undecided(decided: Path, state: str | None) -> None:
    """Until the new results are complete, the old ones are the results."""
    if state is None:
        (decided / NEXT / STATUS).unlink()
    else:
        write_json(decided / NEXT / STATUS, {"state": state, "error": "out of memory"})
    settle(decided)
    assert {name: text for name, text in texts(decided).items() if not name.startswith(NEXT)} == OLD
    assert results_of(decided).state is RunState.COMPLETE
    latest = {"running": RunState.INCOMPLETE, "failed": RunState.FAILED, None: RunState.COMPLETE}
    assert standing(decided).state is latest[state]
    (found,) = read_runs([str(decided)])
    assert found.state is RunState.COMPLETE and found.metrics == {"psnr": 1}
    assert ("a later job here is not complete" in found.why) is (state is not None)


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    """The list of obsolete names is a file, which may be a stranger's."""
    written(tmp_path, {"secret.txt": "mine", "quantization_config.json": "mine"})
    home = written(tmp_path / "run", OLD)
    written(home / NEXT, NEW | {EXCHANGE: json.dumps({"stale": ["../secret.txt", "mine.txt", str(tmp_path), "."]})})
    settle(home)
    assert (tmp_path / "secret.txt").read_text() == "mine"
    assert texts(home)["mine.txt"] == "mine" and texts(home)[PLAN] == "new plan"


# Jobs


def job(home: Path, stage: str, fingerprint: str, files: dict[str, str], error: BaseException | None = None) -> None:
    run = RunDirectory(home, stage, fingerprint)
    with run.job({}, {}):
        written(run.path, files)
        run.add_metrics(stage, {f"{stage}_{fingerprint}": 1.0})
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_a_job_that_fails(tmp_path: Path, error: BaseException) -> None:
    home = tmp_path / "run"
    job(home, "analyze", "a", {PLAN: "a"})
    before = contents(home)
    with pytest.raises(type(error)):
        job(home, "analyze", "b", {PLAN: "b"}, error)
    after = {name: content for name, content in contents(home).items() if not name.startswith(NEXT)}
    assert after | {"run.log": ""} == before | {"run.log": ""}
    assert standing(home).state is RunState.FAILED
    assert RunDirectory(home, "analyze", "a").is_complete(), "and what failed is gone"
    assert contents(home) | {"run.log": ""} == before | {"run.log": ""}
    job(home, "analyze", "b", {PLAN: "c"})
    assert (home / PLAN).read_text() == "c" and not (home / NEXT).exists()


def test_later_products_go_and_metrics_stay_with_theirs(tmp_path: Path) -> None:
    home = tmp_path / "run"
    job(home, "collect", "a", {ACTIVATIONS: "a"})
    job(home, "analyze", "a", {PLAN: "a"})
    job(home, "quantize", "a", {"quantized/config.json": "{}"})
    job(home, "evaluate", "a", {"evaluation.txt": "a", "images/full/0000.png": "a"})
    metrics = {f"{stage}_a": 1.0 for stage in ("collect", "analyze", "quantize", "evaluate")}
    assert json.loads((home / METRICS).read_text()) == metrics
    job(home, "analyze", "b", {PLAN: "b"})
    assert json.loads((home / METRICS).read_text()) == {"collect_a": 1.0, "analyze_b": 1.0}
    assert set(contents(home)) == {ACTIVATIONS, PLAN, METRICS, STATUS, "run.log", "env.json"}


def test_a_later_stage_does_not_bless_a_change(tmp_path: Path) -> None:
    home = tmp_path / "run"
    job(home, "analyze", "a", {PLAN: "a"})
    job(home, "quantize", "a", {"quantized/config.json": "{}"})
    (home / "quantized" / "config.json").write_text("[]")
    job(home, "evaluate", "a", {"evaluation.txt": "a"})
    assert changed_files(home) == ["quantized/config.json"]


def test_a_job_killed_in_a_used_directory(tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = (f"data_dir={tiny_run.parent / 'dataset'}", "cache_dir=cache", "hydra.run.dir=run")
    shutil.copytree(tiny_run.parent / "calibration_cache", folder / "cache")
    shutil.copytree(tiny_run, folder / "run")
    before = contents(folder / "run")
    shared += ("analysis=uniform", "evaluation.num_images=0")
    process = start_process(folder, *TINY, *shared)
    wait_until((folder / "run" / NEXT / PLAN).exists, process)
    os.kill(process.pid, signal.SIGKILL)
    assert end(process)[0] == -signal.SIGKILL
    after = {name: content for name, content in contents(folder / "run").items() if not name.startswith(NEXT)}
    assert after | {"run.log": ""} == before | {"run.log": ""}
    well(run_here([*TINY, *shared], capsys))
    assert not (folder / "run" / NEXT).exists()
    assert contents(folder / "run")[PLAN] != before[PLAN]
    assert not (folder / "run" / "evaluation.txt").exists(), "of the plan before"


def test_a_sweep_that_fails_when_it_is_run_again(
    tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run, folder / "made")
    given = ["analyze", "-m", "stats=made", "analysis=range,uniform", "hydra.sweep.dir=sweep", "report=none"]
    well(run_here(given, capsys))
    jobs = sorted(path.parent for path in folder.glob("sweep/*/status.json"))
    before = {run: contents(run) for run in jobs}
    assert len(before) == 2
    sound = (folder / "made" / ACTIVATIONS).read_bytes()
    (folder / "made" / ACTIVATIONS).write_bytes(sound[:1000])
    outcome = run_here(given, capsys)
    assert outcome.status == 1 and "2 failed" in outcome.out
    for run, files in before.items():
        kept = {name: content for name, content in contents(run).items() if not name.startswith(NEXT)}
        assert kept | {"run.log": ""} == files | {"run.log": ""}
    assert "a later job here is not complete" in run_here(["compare", "sweep"], capsys).out
    (folder / "made" / ACTIVATIONS).write_bytes(sound)
    outcome = well(run_here(given, capsys))
    assert outcome.out.count("Already complete: ") == 2
    assert {run: contents(run) | {"run.log": ""} for run in jobs} == {
        run: files | {"run.log": ""} for run, files in before.items()
    }
    outcome = run_here([*given, "hydra.job.chdir=true"], capsys)
    assert outcome.status == 2 and "hydra.job.chdir=true" in outcome.err
