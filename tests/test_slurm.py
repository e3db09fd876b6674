"""Scale-out on a real SLURM, started here: shards as arrays, jobs that are killed and requeued, sweeps that fail.

Skipped, with the reason, where SLURM is not installed or does not come up.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slurm_cluster
from helpers import Outcome, command, contents, environment, run_here, run_process
from test_merge import datasets

SHARDS, IMAGES = 8, 16
DRAWN = ("sampler.num_steps=3", "sampler.batch_size=2", "data_dir=dataset")
WHOLE = (f"num_images={IMAGES}", *DRAWN)
COLLECTED = (*WHOLE, "timestep_schedule=quarters", "taps.include=['*.fc2']")
LAUNCHER = ("-m", "hydra/launcher=submitit_slurm")
ALL_SHARDS = (f"shard.index=range(0,{SHARDS})", f"shard.count={SHARDS}")
SECONDS = 120

BROKEN = '''
"""A heuristic with a mistake."""
from calib.analysis.layers import LayerSummary
from calib.analysis.plan import LayerPlan

def plan_layer(layer: LayerSummary) -> LayerPlan:
    if layer.num_samples > 1:  # not where it is checked
        raise ZeroDivisionError("a mistake of the user's own")
    return LayerPlan(4, 8)
'''


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm_cluster.Cluster]:
    try:
        running = slurm_cluster.running()
        cluster = running.__enter__()
    except slurm_cluster.NoSlurm as error:
        pytest.skip(f"no SLURM here: {error}")
    yield cluster
    running.__exit__(None, None, None)


@pytest.fixture(scope="module")
def unsharded(cluster: slurm_cluster.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, and statistics of it, made by one process."""
    folder = tmp_path_factory.mktemp("unsharded")
    outcome = run_process(folder, "collect", *COLLECTED, "generate_missing=true", "hydra.run.dir=whole")
    assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cluster's jobs work."""
    return tmp_path_factory.mktemp("sharded")


def submit(cluster: slurm_cluster.Cluster, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """``calib`` in a process that hands jobs to the cluster and waits for them."""
    both = environment() | {key: cluster.environment[key] for key in ("SLURM_CONF", "PATH")}
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*arguments), cwd=folder, env=both, stdout=pipe, stderr=pipe, text=True)


def outcome_of(process: "subprocess.Popen[str]") -> Outcome:
    out, err = process.communicate(timeout=SECONDS)
    return Outcome(process.returncode, out, err)


def sbatch(cluster: slurm_cluster.Cluster, folder: Path, script: str, *flags: str) -> str:
    """Submit a user's own script; the job's id."""
    (folder / "job.sh").write_text(f"#!/bin/bash\n{script}\n")
    both = environment() | {key: cluster.environment[key] for key in ("SLURM_CONF", "PATH")}
    asked = ["sbatch", "--parsable", "--output=%x-%a.log", "--open-mode=append", *flags, "job.sh"]
    done = subprocess.run(asked, cwd=folder, env=both, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def wait_until(condition: Callable[[], bool], cluster: slurm_cluster.Cluster, pause: float = 0.003) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"it does not come about; jobs: {cluster.jobs()}"
        time.sleep(pause)


def state(run: Path) -> str | None:
    """What the ``status.json`` of a run directory says; None before there is one."""
    return json.loads((run / "status.json").read_text())["state"] if (run / "status.json").exists() else None


def kill(cluster: slurm_cluster.Cluster, task: int) -> None:
    """kill -9 the processes of one task of the array that is running."""
    for pid, own in cluster.processes().items():
        if own.get("SLURM_ARRAY_TASK_ID") == str(task) and "SLURM_PROCID" in own:
            os.kill(pid, signal.SIGKILL)


def shard_run(sweep: Path, index: int) -> Path | None:
    """Run directory of one shard of a sweep, once it is there."""
    return next((run for run in sweep.glob("*") if f"shard.index={index}-" in run.name), None)


def requeue_while_running(cluster: slurm_cluster.Cluster, sweep: Path, index: int) -> None:
    """``scontrol requeue`` one shard's job at work, and kill it before it can end in order."""

    def is_at_work() -> bool:
        run = shard_run(sweep, index)
        return run is not None and state(run) == "running"

    wait_until(is_at_work, cluster)
    (job,) = (job for job in cluster.jobs() if job.endswith(f"_{index}"))
    cluster.run("scontrol", "requeue", job)
    kill(cluster, index)


def starts(sweep: Path, index: int) -> int:
    """How many times SLURM has started the job of one shard."""
    (log,) = sweep.glob(f".submitit/*_{index}/*_log.out")
    return log.read_text().count("Starting with JobEnvironment")


def check_equal(joined: Path, whole: Path) -> None:
    """Two run directories hold the same statistics, to the bit."""
    found, expected = datasets(joined / "activations.h5"), datasets(whole / "activations.h5")
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    statistics = "layer_statistics.json"
    assert (joined / statistics).read_bytes() == (whole / statistics).read_bytes()


def merge(*arguments: Any, capsys: pytest.CaptureFixture[str]) -> Outcome:
    return run_here(["merge", *map(str, arguments)], capsys)


@pytest.fixture(scope="module")
def dataset(cluster: slurm_cluster.Cluster, sharded: Path) -> Path:
    """The dataset that eight jobs drew, one of which was killed and requeued."""
    sweep = sharded / "drawn"
    process = submit(cluster, sharded, "generate", *LAUNCHER, *ALL_SHARDS, *WHOLE, "hydra.sweep.dir=drawn")
    requeue_while_running(cluster, sweep, 3)
    outcome = outcome_of(process)
    assert outcome.status == 0, outcome.out + outcome.err
    assert "8 jobs, 8 complete" in outcome.out
    assert [starts(sweep, index) for index in range(SHARDS)] == [1, 1, 1, 2, 1, 1, 1, 1]
    return sharded / "dataset"


@pytest.fixture(scope="module")
def collected(cluster: slurm_cluster.Cluster, sharded: Path, dataset: Path) -> Path:
    """The sweep folder of eight jobs that collected, one of which was killed and requeued."""
    sweep = sharded / "shards"
    process = submit(cluster, sharded, "collect", *LAUNCHER, *ALL_SHARDS, *COLLECTED, "hydra.sweep.dir=shards")
    requeue_while_running(cluster, sweep, 5)
    outcome = outcome_of(process)
    assert outcome.status == 0, outcome.out + outcome.err
    assert "8 jobs, 8 complete" in outcome.out
    assert [starts(sweep, index) for index in range(SHARDS)] == [1, 1, 1, 1, 1, 2, 1, 1]
    return sweep


def test_eight_shards_draw_the_dataset_of_one_process_though_one_is_killed_and_requeued(
    dataset: Path, unsharded: Path
) -> None:
    assert contents(dataset) == contents(unsharded / "dataset")


def test_eight_shards_collect_what_one_process_does_though_one_is_killed_and_requeued(
    collected: Path, unsharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = merge(collected, "--into", tmp_path / "whole", capsys=capsys)
    assert outcome.status == 0, outcome.err
    assert outcome.out == f"{tmp_path / 'whole'}: 16 images of 8 shards\n"
    check_equal(tmp_path / "whole", unsharded / "whole")


def test_a_plain_array_collects_the_same_and_a_killed_task_keeps_its_steps(
    cluster: slurm_cluster.Cluster,
    sharded: Path,
    collected: Path,
    unsharded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = 6
    run = shard_run(collected, task)
    assert run is not None
    cache = sharded / json.loads((run / "collection_metadata.json").read_text())["cache"]
    for path in cache.glob("step_*.npz"):  # the other shards find theirs
        path.unlink()
    script = (
        f"exec {' '.join(map(_quoted, command('collect', *COLLECTED)))} "
        f"shard.index=$SLURM_ARRAY_TASK_ID shard.count={SHARDS} hydra.run.dir=array/$SLURM_ARRAY_TASK_ID"
    )
    job = sbatch(cluster, sharded, script, f"--array=0-{SHARDS - 1}")
    wait_until(lambda: any(cache.glob("step_*.npz")), cluster)
    kill(cluster, task)
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("step_*.npz")}
    assert 0 < len(kept) < 4, "killed in the middle"
    wait_until(lambda: cluster.jobs()[f"{job}_{task}"] == "FAILED", cluster, pause=0.1)
    cluster.run("scontrol", "requeue", f"{job}_{task}")
    tasks = [f"{job}_{i}" for i in range(SHARDS)]
    wait_until(lambda: {cluster.jobs()[one] for one in tasks} == {"COMPLETED"}, cluster, pause=0.1)
    now = {path: path.stat().st_mtime_ns for path in cache.glob("step_*.npz")}
    assert len(now) == 4
    assert {path: now[path] for path in kept} == kept, "steps that were collected are not collected again"
    assert merge(*(sharded / "array").iterdir(), "--into", tmp_path / "whole", capsys=capsys).status == 0
    check_equal(tmp_path / "whole", unsharded / "whole")


def test_a_requeued_job_draws_only_what_is_missing(
    cluster: slurm_cluster.Cluster, unsharded: Path, tmp_path: Path
) -> None:
    """A user's own script; SLURM ends it with SIGTERM, as before a preemption, and starts it again."""
    more = 2 * IMAGES
    drawn = command("generate", f"num_images={more}", *DRAWN, "hydra.run.dir=run")
    job = sbatch(cluster, tmp_path, f"exec {' '.join(map(_quoted, drawn))}")
    manifest = tmp_path / "dataset" / "manifest.json"

    def images() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(manifest.read_text())["images"] if manifest.exists() else []
        return found

    wait_until(lambda: len(images()) >= 4, cluster, pause=0.05)
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: cluster.jobs()[job] == "PENDING", cluster, pause=0.05)
    kept = len(images())
    assert 4 <= kept < more
    wait_until(lambda: cluster.jobs()[job] == "COMPLETED", cluster, pause=0.1)
    assert len(images()) == more
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images_generated"] == more - kept
    found, whole = contents(tmp_path / "dataset"), contents(unsharded / "dataset")
    assert {name: found[name] for name in whole if name != "manifest.json"} == {
        name: value for name, value in whole.items() if name != "manifest.json"
    }


def test_a_sweep_says_which_job_failed_on_the_cluster(
    cluster: slurm_cluster.Cluster, unsharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unsharded / "own" / "analysis").mkdir(parents=True)
    (unsharded / "own" / "analysis" / "broken.yaml").write_text("_target_: broken_heuristic.plan_layer\n")
    (unsharded / "broken_heuristic.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(unsharded))
    given = ("analyze", *LAUNCHER, "stats=whole", "analysis=range,broken", "--config-dir=own", "hydra.sweep.dir=plans")
    outcome = outcome_of(submit(cluster, unsharded, *given))
    assert outcome.status == 1, outcome.out + outcome.err
    assert "2 jobs, 1 complete, 1 failed" in outcome.out
    assert "ZeroDivisionError: a mistake of the user's own" in outcome.out
    assert "Traceback" not in outcome.err
    (failed,) = (unsharded / "plans").glob("*analysis=broken*")
    assert "Traceback" in (failed / "run.log").read_text()
    assert state(failed) == "failed"


def _quoted(word: str) -> str:
    return f"'{word}'" if "'" not in word else f'"{word}"'
